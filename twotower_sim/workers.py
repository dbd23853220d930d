"""Where independent work is done: on the cores of this machine, or on a cluster that is there already."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

from twotower_sim.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
BACKENDS = ("loky", "dask", "ray")
CONNECT_S = 10
PATIENCE_S = 60
AHEAD = 64
"""Work that is given away at least, if there is so much, before a result has come."""


@dataclass(frozen=True)
class Workers:
    """``loky``: ``jobs`` processes of one thread each, None for one a core; one does the work in this process. ``dask``
    and ``ray``: all workers of the cluster whose scheduler is at the address."""

    jobs: int | None = None
    backend: str = "loky"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"--backend: found {self.backend!r}; allowed: {', '.join(BACKENDS)}")
        if self.backend == "dask" and not self.scheduler:
            raise InputError("--backend dask: needs --scheduler ADDRESS, as tcp://host:8786")
        if self.backend == "loky" and self.scheduler:
            raise InputError("--scheduler: has no effect without --backend dask or ray")
        if self.backend != "loky" and self.jobs is not None:
            raise InputError(f"--jobs: has no effect with --backend {self.backend}, which uses all of its workers")

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results as they come, in any order. Raises InputError where the workers cannot be reached or are lost."""
        return {"loky": self._loky, "dask": self._dask, "ray": self._ray}[self.backend](function, items)

    def _loky(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from joblib.externals.loky.process_executor import BrokenProcessPool

        jobs = min(self.jobs or cpu_count(), len(items))
        if jobs <= 1:
            yield from map(function, items)
            return
        here = delayed(partial(_bound_to, os.getpid(), function))
        try:
            with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
                # one at a time, so that a sweep that is killed loses only what was in flight
                parallel = Parallel(return_as="generator_unordered", batch_size=1, max_nbytes=None)
                yield from parallel(here(item) for item in items)
        except BrokenProcessPool:
            raise InputError(
                "a worker was killed, perhaps for want of memory; with fewer --jobs there is more for each"
            ) from None

    def _dask(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Not through joblib, which keeps the work for itself where the cluster has one worker left."""
        try:
            import distributed
            from distributed.comm.core import CommClosedError
            from distributed.scheduler import KilledWorker
        except ModuleNotFoundError as error:
            raise InputError(f"--backend dask needs {error.name}: pip install 'twotower-sim[cluster]'") from None
        where = f"--scheduler {self.scheduler}"
        try:
            client = distributed.Client(self.scheduler, timeout=CONNECT_S)
        except (OSError, ValueError, TypeError, ImportError) as error:  # also for addresses that are none
            raise InputError(f"{where}: cannot be reached: {str(error).splitlines()[0]:.200}") from None

        def wait(waiting: list[Any]) -> tuple[list[Any], list[Any]]:
            while True:
                try:
                    done, rest = distributed.wait(waiting, PATIENCE_S, "FIRST_COMPLETED")
                    return [future.result() for future in done], list(rest)
                except TimeoutError:
                    if not client.ncores():
                        raise InputError(f"{where}: has had no workers for {PATIENCE_S} s") from None

        with client:
            try:
                slots = sum(client.ncores().values())
                yield from _a_few_at_a_time(lambda item: client.submit(function, item, pure=False), wait, items, slots)
            except (KilledWorker, distributed.CancelledError, CommClosedError) as error:
                raise InputError(
                    f"{where}: was lost: {(str(error) or type(error).__name__).splitlines()[0]:.200}"
                ) from None

    def _ray(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise InputError(f"--backend ray needs {error.name}: pip install ray") from None
        try:
            _knock(self.scheduler or "")
            ray.init(address=self.scheduler, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"--scheduler {self.scheduler}: cannot be reached: {error!s:.200}") from None

        def wait(waiting: list[Any]) -> tuple[list[Any], list[Any]]:
            done, rest = ray.wait(waiting)
            return ray.get(done), rest

        try:
            remote = ray.remote(function)
            yield from _a_few_at_a_time(remote.remote, wait, items, int(ray.cluster_resources().get("CPU", 1)))
        except ray.exceptions.RayError as error:
            raise InputError(f"--backend ray: was lost: {str(error).splitlines()[0]:.200}") from None
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens, which Ray itself waits for minutes to say."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_S).close()


def _a_few_at_a_time(
    submit: Callable[[Item], Any],
    wait: Callable[[list[Any]], tuple[list[Result], list[Any]]],
    items: Sequence[Item],
    slots: int,
) -> Iterator[Result]:
    """``wait``: results of what is done of what was submitted, and what is not."""
    ahead, todo, waiting = max(4 * slots, AHEAD), iter(items), list[Any]()
    while True:
        waiting += [submit(item) for item in islice(todo, ahead - len(waiting))]
        if not waiting:
            return
        results, waiting = wait(waiting)
        yield from results


def _bound_to(parent: int, function: Callable[[Item], Result], item: Item) -> Result:
    """In a process that is to end when its ``parent`` does, even if that is killed. Ctrl-C, which a terminal sends to
    all processes, is the parent's to answer."""
    _watch(parent)
    return function(item)


@cache
def _watch(parent: int) -> None:
    def end_with_it() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_it, daemon=True).start()
