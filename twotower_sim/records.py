"""What happened to each request: written by engines, read by metrics."""

from array import array

import numpy as np

NOT_YET = -1


class Records:
    """Columns by request id, shared by all replicas, and one segment for every decode between (re)starts.

    Times are integer nanoseconds on the simulation clock.
    """

    def __init__(self, requests: int) -> None:
        self.arrival_ns = array("q", [NOT_YET]) * requests
        self.admit_ns = array("q", [NOT_YET]) * requests  # first admission
        self.prefilled_ns = array("q", [NOT_YET]) * requests  # end of the first complete prefill
        self.finish_ns = array("q", [NOT_YET]) * requests
        self.replica = array("h", [NOT_YET]) * requests
        self.preemptions = array("i", [0]) * requests
        self.nfe = array("q", [0]) * requests  # denoise passes, where an engine counts them itself
        self._segments = array("q")
        self._log = array("q")

    def admit(self, request: int, time_ns: int, replica: int) -> None:
        self.replica[request] = replica
        if self.admit_ns[request] == NOT_YET:
            self.admit_ns[request] = time_ns

    def prefilled(self, request: int, time_ns: int) -> None:
        if self.prefilled_ns[request] == NOT_YET:
            self.prefilled_ns[request] = time_ns

    def finish(self, request: int, time_ns: int) -> None:
        self.finish_ns[request] = time_ns

    def add_segment(self, request: int, done: int, start_tick: int, end_tick: int, replica: int, start_ns: int) -> None:
        """``request`` decoded on ``replica`` in the ticks [start_tick, end_tick), from ``start_ns`` on, with ``done``
        units (tokens or blocks) before."""
        self._segments.extend((request, done, start_tick, end_tick, replica, start_ns))

    def log(self, request: int, unit: int, size: int, ready_ns: int, visible_ns: int, level: int = 0) -> None:
        """Unit ``unit`` (block or burst) of ``request`` became visible; ``size``: its denoise steps, or its tokens;
        ``level``: of the gamma that a block had."""
        self._log.extend((request, unit, size, ready_ns, visible_ns, level))

    def units(self) -> np.ndarray:
        """Rows (request, unit, size, ready_ns, visible_ns, level) as int64 (n, 6), by request, then by time."""
        return _by_request(self._log, 6)

    def segments(self) -> np.ndarray:
        """Rows (request, done, start_tick, end_tick, replica, start_ns) as int64 (n, 6), by request, then by time; once
        the run is over."""
        return _by_request(self._segments, 6)


def _by_request(rows: array, columns: int) -> np.ndarray:
    table = np.frombuffer(rows, np.int64).reshape(-1, columns)
    table[:] = table[np.argsort(table[:, 0], kind="stable")]
    return table
