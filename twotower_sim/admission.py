"""Waiting queues: in which order a replica admits requests. A policy is one class and one entry.

Order is strict: only the head is ever admitted. A queue knows prompts, never true output lengths.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol, TypeVar

from twotower_sim.schedule import Sequence

S = TypeVar("S", bound=Sequence)


class Queue(Protocol[S]):
    def __len__(self) -> int: ...
    def head(self) -> S: ...
    def take(self) -> S:
        """Remove the head."""
        ...

    def add(self, seq: S) -> None: ...
    def give_back(self, seq: S) -> None:
        """Return a sequence that was preempted."""
        ...


class Fcfs(deque[S]):
    """First come, first served; preempted sequences go to the front."""

    take, add, give_back = deque.popleft, deque.append, deque.appendleft

    def head(self) -> S:
        return self[0]


class ShortestPrompt(list[tuple[int, int, S]]):
    """The shortest prompt first, preempted sequences included; ties by request id."""

    def head(self) -> S:
        return self[0][2]

    def take(self) -> S:
        return heappop(self)[2]

    def add(self, seq: S) -> None:
        heappush(self, (seq.input_tokens, seq.request, seq))

    give_back = add


ADMISSION: dict[str, Callable[[], Queue[Any]]] = {"fcfs": Fcfs, "shortest_prompt": ShortestPrompt}
