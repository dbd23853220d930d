"""Waiting queues: in which order a replica admits requests. A policy is one class and one entry."""

from collections import deque
from heapq import heappop, heappush
from typing import Protocol

from twotower_sim.schedule import Sequence


class Queue(Protocol):
    """Strict order: only the head is ever admitted. It knows prompts, never true output lengths."""

    def __len__(self) -> int: ...
    def head(self) -> Sequence: ...
    def pop(self) -> Sequence: ...
    def push(self, seq: Sequence) -> None: ...
    def push_back(self, seq: Sequence) -> None:
        """Return a preempted sequence."""


class Fcfs:
    """First come, first served; preempted sequences go to the front."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()
        self.pop = self._waiting.popleft
        self.push = self._waiting.append
        self.push_back = self._waiting.appendleft

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self) -> Sequence:
        return self._waiting[0]


class ShortestPrompt:
    """The shortest prompt first, preempted sequences included; ties by request id."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self) -> Sequence:
        return self._waiting[0][2]

    def pop(self) -> Sequence:
        return heappop(self._waiting)[2]

    def push(self, seq: Sequence) -> None:
        heappush(self._waiting, (seq.input_tokens, seq.request, seq))

    push_back = push


ADMISSION: dict[str, type[Queue]] = {"fcfs": Fcfs, "shortest_prompt": ShortestPrompt}
