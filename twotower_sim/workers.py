"""Where independent work is done: on the cores of this machine, or on a cluster that is there already."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from twotower_sim.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
BACKENDS = ("loky", "dask", "ray")
CONNECT_S = 20


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
        from joblib import cpu_count, parallel_config
        from joblib.externals.loky.process_executor import BrokenProcessPool

        jobs = max(min(self.jobs or cpu_count(), len(items)), 1)
        try:
            if jobs == 1:
                yield from map(function, items)
            else:
                with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
                    yield from _as_they_come(function, items)
        except BrokenProcessPool:
            raise InputError(
                "a worker was killed, perhaps for want of memory; with fewer --jobs there is more for each"
            ) from None

    def _dask(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        try:
            import distributed
            from distributed.comm.core import CommClosedError
            from joblib import parallel_config
        except ModuleNotFoundError as error:
            raise InputError(f"--backend dask needs {error.name}: pip install 'twotower-sim[cluster]'") from None
        where = f"--scheduler {self.scheduler}"
        try:
            client = distributed.Client(self.scheduler, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError, ImportError) as error:  # also for addresses that are none
            raise InputError(f"{where}: cannot be reached: {str(error).splitlines()[0]:.200}") from None
        lost = distributed.scheduler.KilledWorker, distributed.CancelledError, CommClosedError
        with client:
            if not client.ncores():
                raise InputError(f"{where}: has no workers")
            try:
                with parallel_config(backend="dask", client=client):
                    yield from _as_they_come(function, items)
            except lost as error:
                raise InputError(f"{where}: was lost: {error!s:.200}") from None

    def _ray(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise InputError(f"--backend ray needs {error.name}: pip install ray") from None
        try:
            ray.init(address=self.scheduler, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--scheduler {self.scheduler}: cannot be reached: {error!s:.200}") from None
        try:
            remote = ray.remote(function)
            waiting: list[Any] = [remote.remote(item) for item in items]
            while waiting:
                done, waiting = ray.wait(waiting)
                yield from ray.get(done)
        except ray.exceptions.RaySystemError as error:
            raise InputError(f"--backend ray: was lost: {error!s:.200}") from None
        finally:
            ray.shutdown()


def _as_they_come(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Through joblib, one at a time, so that a sweep that is killed loses only what was in flight."""
    from joblib import Parallel, delayed

    parallel = Parallel(return_as="generator_unordered", batch_size=1, max_nbytes=None)
    yield from parallel(delayed(function)(item) for item in items)
