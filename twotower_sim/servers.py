"""The two kinds of servers that ``tandem.py`` joins, and what goes from one to the other."""

from twotower_sim.admission import Queue
from twotower_sim.kv_cache import Cache
from twotower_sim.rounds import Task


class TandemTask(Task):
    """A request inside this replica."""

    __slots__ = ("home", "desk", "extending")

    def __init__(self, request: int, input_tokens: int, output_tokens: int) -> None:
        super().__init__(request, input_tokens, output_tokens)
        self.home: ContextServer | None = None
        self.desk: DenoiserServer | None = None
        self.extending = False  # its block is done and the extend pass, due or under way, is not


class ContextServer:
    """One context server's batch and memory."""

    def __init__(self, index: int, queue: Queue[TandemTask], cache: Cache) -> None:
        self.index, self.queue, self.cache = index, queue, cache
        self.running: dict[int, TandemTask] = {}  # admitted here, in that order
        self.due: dict[int, TandemTask] = {}  # to be extended, longest waiting first
        self.partial: TandemTask | None = None
        self.busy = False
        self.link_free_ns = 0
        self.queued_tokens = 0
        self.seats_peak = 0


class DenoiserServer:
    """One denoiser server's batch and memory."""

    def __init__(self, index: int, cache: Cache, seats: int) -> None:
        self.index, self.cache, self.seats = index, cache, seats
        self.holds: dict[int, TandemTask] = {}  # whose keys and values are here
        self.present: dict[int, TandemTask] = {}  # with an open block here
        self.context = 0  # tokens that these attend to
        self.assigned: dict[int, TandemTask] = {}  # that count as its load: with a block here or on the way
        self.busy = False
