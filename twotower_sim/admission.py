"""Waiting queues: in which order a replica admits requests. A policy is one class and one entry.

Order is strict: only the head is ever admitted. A queue knows prompts, never true output lengths.
"""

from collections import deque
from heapq import heappop, heappush
from typing import Protocol

from twotower_sim.schedule import Sequence


class Queue(Protocol):
    def __len__(self) -> int: ...
    def head(self) -> Sequence: ...
    def take(self) -> Sequence:
        """Remove the head."""
        ...

    def add(self, seq: Sequence) -> None: ...
    def give_back(self, seq: Sequence) -> None:
        """Return a sequence that was preempted."""
        ...


class Fcfs(deque[Sequence]):
    """First come, first served; preempted sequences go to the front."""

    take, add, give_back = deque.popleft, deque.append, deque.appendleft

    def head(self) -> Sequence:
        return self[0]


class ShortestPrompt(list[tuple[int, int, Sequence]]):
    """The shortest prompt first, preempted sequences included; ties by request id."""

    def head(self) -> Sequence:
        return self[0][2]

    def take(self) -> Sequence:
        return heappop(self)[2]

    def add(self, seq: Sequence) -> None:
        heappush(self, (seq.input_tokens, seq.request, seq))

    give_back = add


ADMISSION: dict[str, type[Queue]] = {"fcfs": Fcfs, "shortest_prompt": ShortestPrompt}
