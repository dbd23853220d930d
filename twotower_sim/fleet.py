"""Replicas behind a router, and the load that comes at them: SimPy carries arrivals and completions.

Order of events at one instant: rounds that end; requests that arrive; then rounds that start.

With open load, nothing happens because a request completes, so replicas are *lazy*: a replica catches up when
somebody touches it. In a closed loop, and in conversations, completions cause arrivals, so each replica is *live*: a
process that runs one round at a time. Both give the same result (a test holds them against each other).
"""

from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np
import simpy
from simpy.events import Event, EventPriority

from twotower_sim.requests import LATEST_NS, Dependencies, Requests
from twotower_sim.router import LOAD_BLIND, ROUTERS
from twotower_sim.schedule import Sequence

CHUNK = 65536
AFTER = EventPriority(2)  # SimPy's own are 0 and 1


class Replica(Protocol):
    """An engine, as the fleet drives it."""

    @property
    def driven(self) -> bool:
        """By ``advance`` and ``settle``; else by events of its own on the fleet's clock."""
        ...

    @property
    def clock_ns(self) -> int: ...
    @property
    def idle(self) -> bool: ...
    @property
    def outstanding_requests(self) -> int: ...
    @property
    def outstanding_tokens(self) -> int: ...
    def submit(self, seq: Any, now_ns: int) -> None: ...
    def settle(self, now_ns: int) -> None: ...
    def advance(self, until_ns: int) -> None: ...


class _RoundStart(Event):
    """Happens now, after every ordinary event of this instant."""

    def __init__(self, env: simpy.Environment) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, priority=AFTER)


class Fleet:
    """Routes requests to replicas on a SimPy clock of integer nanoseconds."""

    def __init__(
        self,
        router: str,
        seed: int,
        sequence: Callable[[int], Sequence],
        arrived: Callable[[int, int], None],
        live: bool,
    ) -> None:
        """``sequence`` makes the sequence of a request id; ``arrived(request, now_ns)`` hears of every arrival."""
        self.env = simpy.Environment(0)  # integer times stay integers
        self.replicas: list[Replica] = []
        self._route, self._blind, self._seed = ROUTERS[router], router in LOAD_BLIND, seed
        self._sequence, self._arrived, self._live = sequence, arrived, live
        self._bells: list[Event | None] = []  # of replicas that idle
        self._waiting: dict[int, Event] = {}  # completions that a user waits for
        self._turns: _Turns | None = None
        self._routed = self._completed = 0

    def add(self, replica: Replica) -> None:
        self.replicas.append(replica)
        self._bells.append(None)
        if self._live and replica.driven:
            self.env.process(self._drive(len(self.replicas) - 1))

    def submit(self, request: int) -> None:
        """A request arrives now."""
        now = int(self.env.now)
        if not self._blind:
            for replica in self.replicas:
                replica.settle(now)
        index = self._route(request, self._routed, self.replicas, self._seed)
        self._routed += 1
        self._arrived(request, now)
        self.replicas[index].submit(self._sequence(request), now)
        if (bell := self._bells[index]) is not None:
            self._bells[index] = None
            bell.succeed()
        if self._turns:
            self._turns.happened(request, dispatch=True)

    def completed(self, request: int, now_ns: int) -> None:
        """A live replica calls this when a request finishes."""
        self._completed += 1
        if self._turns:
            self._turns.happened(request, dispatch=False)
        else:
            self._waiting.pop(request).succeed()

    def _drive(self, index: int) -> Generator[Event, None, None]:
        replica = self.replicas[index]
        while True:
            if replica.idle:
                self._bells[index] = bell = self.env.event()
                yield bell
            yield _RoundStart(self.env)
            replica.advance(int(self.env.now) + 1)
            yield self.env.timeout(replica.clock_ns - self.env.now)
            replica.settle(replica.clock_ns)

    def run_open(self, requests: Requests, ids: np.ndarray, progress: Callable[[int], None]) -> None:
        """Requests arrive at their times, whatever the replicas do. Raises OverflowError if they take too long."""
        self.env.process(self._arrivals(requests, ids, progress))
        self.env.run()
        for replica in self.replicas:
            replica.advance(LATEST_NS)
            if replica.outstanding_requests:
                raise OverflowError

    def _arrivals(self, requests, ids, progress) -> Generator[Event, None, None]:
        env, submit = self.env, self.submit
        for low in range(0, len(ids), CHUNK):
            chunk = ids[low : low + CHUNK]
            for request, at in zip(chunk.tolist(), requests.arrival_ns[chunk].tolist(), strict=True):
                if at > env.now:
                    yield env.timeout(at - env.now)
                submit(request)
            progress(low + len(chunk))

    def run_turns(self, requests: Requests, rejected: np.ndarray, progress: Callable[[int], None]) -> None:
        """Requests arrive when what they wait for lets them; ``rejected`` ones finish as they arrive. Raises
        OverflowError if they take too long."""
        assert requests.after is not None
        refused = set(rejected.tolist())

        def arrive(request: int) -> None:
            if request not in refused:
                self.submit(request)
                progress(self._routed)
                return
            self._arrived(request, int(self.env.now))
            for dispatch in (True, False):
                turns.happened(request, dispatch)

        self._turns = turns = _Turns(self.env, requests.arrival_ns, requests.after, arrive)
        self.env.run()
        if turns.waiting or any(replica.outstanding_requests for replica in self.replicas):
            raise OverflowError

    def run_closed(self, ids: np.ndarray, concurrency: int, think_ns: int, progress: Callable[[int], None]) -> None:
        """``concurrency`` users take the next request as soon as they have thought about their last answer."""
        queue = iter(ids.tolist())
        users = [self.env.process(self._user(queue, think_ns, progress)) for _ in range(min(concurrency, len(ids)))]
        self.env.run(self.env.all_of(users))

    def _user(self, queue, think_ns: int, progress) -> Generator[Event, None, None]:
        for request in queue:
            self._waiting[request] = finished = self.env.event()
            self.submit(request)
            yield finished
            progress(self._completed)
            if think_ns:
                yield self.env.timeout(think_ns)


class _Turns:
    """Lets requests arrive, each when the last of what it waits for has happened and its delay is over."""

    def __init__(
        self, env: simpy.Environment, arrival_ns: np.ndarray, after: Dependencies, arrive: Callable[[int], None]
    ) -> None:
        self._env, self._arrive = env, arrive
        waits = np.diff(after.first)
        self._left = waits.tolist()
        self._due_ns = np.where(after.binding | (waits == 0), arrival_ns, 0).tolist()
        self._followers: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        follower = np.repeat(np.arange(len(waits)), waits).tolist()
        columns = after.on.tolist(), after.dispatch.tolist(), follower, after.delay_ns.tolist()
        for on, dispatch, request, delay_ns in zip(*columns, strict=True):
            self._followers.setdefault((on, dispatch), []).append((request, delay_ns))
        env.process(self._first())

    def _first(self) -> Generator[Event, None, None]:
        """Requests that wait for nothing, at their times."""
        alone = [request for request, left in enumerate(self._left) if not left]
        for request in sorted(alone, key=self._due_ns.__getitem__):
            if self._due_ns[request] > self._env.now:
                yield self._env.timeout(self._due_ns[request] - self._env.now)
            self._arrive(request)

    @property
    def waiting(self) -> bool:
        """Whether somebody still waits."""
        return any(self._left)

    def happened(self, request: int, dispatch: bool) -> None:
        """``request`` arrived (``dispatch``) or finished now."""
        now_ns = int(self._env.now)
        for follower, delay_ns in self._followers.pop((request, dispatch), ()):
            self._due_ns[follower] = max(self._due_ns[follower], now_ns + delay_ns)
            self._left[follower] -= 1
            if not self._left[follower]:
                self._env.process(self._later(follower))

    def _later(self, request: int) -> Generator[Event, None, None]:
        if self._due_ns[request] > self._env.now:
            yield self._env.timeout(self._due_ns[request] - self._env.now)
        self._arrive(request)
