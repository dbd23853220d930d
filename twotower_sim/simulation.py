"""The one composition root: a validated scenario becomes workload, memory, latency, engines and fleet, and runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twotower_sim import scenario as ask
from twotower_sim.admission import ADMISSION
from twotower_sim.costing import drafter_of, latency_of
from twotower_sim.decoders import BlockDecoder, BurstDecoder, TokenDecoder
from twotower_sim.engine import Engine
from twotower_sim.errors import InputError
from twotower_sim.fleet import Fleet
from twotower_sim.gpu import Gpu, load_gpu
from twotower_sim.kv_cache import Cache, KvCache, PrefixCache, check_block_tokens
from twotower_sim.latency import Latency
from twotower_sim.load import classes_of, load_requests
from twotower_sim.luck import BlockLuck, load_section, luck_of
from twotower_sim.memory import NO_DRAFTER, MemoryPlan, plan_memory
from twotower_sim.model import Tower, load_tower
from twotower_sim.plan import Bursts
from twotower_sim.policy import POLICIES
from twotower_sim.profile import Profile, load_profile
from twotower_sim.records import Records
from twotower_sim.replica import Limits, Round
from twotower_sim.requests import Requests
from twotower_sim.rounds import Passes, RoundEngine, Task
from twotower_sim.scenario_workload import ClosedLoopWorkload
from twotower_sim.schedule import BlockSchedule, Schedule, Sequence, TokenSchedule
from twotower_sim.servers import ContextServer, DenoiserServer, TandemTask
from twotower_sim.tandem import Tandem

DEFAULT_GPU = "h100-sxm"

Observer = Callable[[int, Round], None]
Replica = Engine | RoundEngine | Tandem
Blocks = ask.TwoTower | ask.BlockDiffusion


@dataclass
class Run:
    """A scenario with everything it resolved to, and, after ``simulate``, what happened."""

    scenario: ask.Scenario
    tower: Tower
    gpu: Gpu
    gpus: int
    memory: MemoryPlan
    latency: Latency
    requests: Requests
    classes: np.ndarray  # of each request, an index into workload.class_names
    luck: BlockLuck | None  # None: no blocks
    rejected: np.ndarray  # ids of requests that can never fit
    provenance: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    may_be_fast: bool = True  # take engine.py where it applies; rounds.py gives the same result
    records: Records = field(init=False)
    engines: list[Replica] = field(init=False)

    @property
    def fast(self) -> bool:
        """Whether every sequence takes one pass a round and knows its future when it starts: engine.py applies."""
        scenario, scheduler = self.scenario, self.scenario.scheduler
        plain = (scheduler.policy, scheduler.steps_per_round, scheduler.max_extends_per_round) == ("fdfo", 1, None)
        cached = not isinstance(scenario.memory.prefix_cache, ask.NoPrefixCache)
        known = isinstance(scenario.decoding, ask.Autoregressive) or (self.luck is not None and not self.luck.queue)
        return self.may_be_fast and plain and known and not cached and not scenario.tandem


def prepare(scenario: ask.Scenario, base: Path = Path(), given: Requests | None = None) -> Run:
    """Load and check all that a scenario names; paths are relative to ``base``. ``given``: requests in the place of its
    workload's. Raises InputError."""
    warnings: list[str] = []
    decoding, hardware = scenario.decoding, scenario.deployment
    tower = load_tower(scenario.model, base, scenario.memory.state_dtype)
    for degree in hardware.degrees:
        tower.check_parallel(degree, hardware.expert_parallel)
    warnings += tower.notes
    warnings += _warn_without_effect(scenario)
    if isinstance(decoding, ask.TwoTower | ask.MockAr) and tower.towers == 1:
        raise InputError(
            f"model {scenario.model} has one tower; decoding.kind {decoding.kind} needs two, as in "
            "nemotron-twotower-30b-a3b"
        )
    profile = None
    if isinstance(scenario.latency, ask.ProfileLatency):
        profile = load_section("latency", scenario.latency.path, base, warnings)
    gpu, name = _gpu(hardware.gpu, base, profile, warnings)
    scenario = scenario.model_copy(update={"deployment": hardware.model_copy(update={"gpu": name})})
    memory = _memory(scenario, tower, gpu, base)
    if memory.overcommitted:
        warnings.append(f"memory is taken as given, though {memory.overcommitted}")
    requests, classes, notes = (given, classes_of(scenario, len(given)), []) if given else load_requests(scenario, base)
    warnings += notes
    warnings += _prefix_cache_warnings(scenario, tower, requests)
    latency, provenance = latency_of(scenario, tower, gpu, base, profile, warnings)
    luck = None
    if isinstance(decoding, Blocks):
        of = requests.output_tokens, classes
        luck, provenance["commits"] = luck_of(scenario, decoding, tower, base, *of, warnings)
    if isinstance(decoding, ask.Speculative):
        provenance["acceptance"] = "given: acceptance of drafts in the scenario"
    rejected = _oversized(scenario, tower, requests, memory)
    efficiency = f"efficiency {gpu.sources.get('efficiency', 'of unstated source')}"
    provenance["gpu"] = f"{gpu.name}: {profile.of('device') if profile and gpu is profile.device else efficiency}"
    provenance["model"] = f"{tower.name}: bytes and FLOPs computed from its dimensions"
    gpu = _costing(gpu, scenario.cost)
    provenance |= gpu.costs
    resolved = memory, latency, requests, classes, luck, rejected, provenance, warnings
    return Run(scenario, tower, gpu, gpus_of(scenario), *resolved)


def gpus_of(scenario: ask.Scenario) -> int:
    """GPUs of all replicas."""
    hardware = scenario.deployment
    context, denoiser = hardware.degrees
    if not scenario.split:
        return hardware.replicas * context
    m, n = scenario.tandem or (1, 1)
    return hardware.replicas * (m * context + n * denoiser)


def _memory(scenario: ask.Scenario, tower: Tower, gpu: Gpu, base: Path) -> MemoryPlan:
    decoding, hardware, scheduler, memory = scenario.decoding, scenario.deployment, scenario.scheduler, scenario.memory
    states, rows, drafter = 1, decoding.pass_tokens, NO_DRAFTER
    if isinstance(decoding, ask.Speculative):
        states = rows = 1 + decoding.draft_tokens
        drafter = drafter_of(decoding, scenario, base).bytes_on_gpu(tower, hardware.degrees[0])
    return plan_memory(
        tower,
        gpu,
        two_tower=isinstance(decoding, ask.TwoTower | ask.MockAr),
        split=scenario.split,
        tensor_parallel=hardware.degrees[0],
        denoiser_tensor_parallel=hardware.degrees[1],
        utilization=memory.gpu_memory_utilization,
        kv_block_tokens=memory.kv_block_tokens,
        pass_tokens=rows,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kv_blocks=memory.kv_blocks,
        state_slots=memory.state_slots,
        checkpoints=isinstance(memory.prefix_cache, ask.HybridPrefixCache),
        servers=scenario.tandem,
        drafter=drafter,
        states_per_sequence=states,
    )


def _prefix_cache_warnings(scenario: ask.Scenario, tower: Tower, requests: Requests) -> list[str]:
    """About a prefix cache that cannot be what a user expects. Raises InputError."""
    cache, kv_block = scenario.memory.prefix_cache, scenario.memory.kv_block_tokens
    if isinstance(cache, ask.NoPrefixCache):
        return []
    warnings = []
    if requests.prefixes is None:
        warnings.append("memory.prefix_cache: the workload names no shared prefixes, so only a preempted request hits")
    else:
        check_block_tokens(requests.prefixes, kv_block)
    if isinstance(cache, ask.HybridPrefixCache) and cache.state_checkpoint_every % kv_block:
        raise InputError(
            f"memory.prefix_cache.state_checkpoint_every: found {cache.state_checkpoint_every}; expected a multiple "
            f"of memory.kv_block_tokens, {kv_block}"
        )
    if isinstance(cache, ask.AttentionPrefixCache) and tower.layers("M"):
        warnings.append(
            f"memory.prefix_cache attention resumes prompts without their Mamba states, which {tower.name} needs: "
            "its hits are those of a model without Mamba layers"
        )
    return warnings


# ---------------------------------------------------------------------- running


def simulate(run: Run, observe: Observer | None = None, progress: Callable[[int], None] = lambda done: None) -> Run:
    """Replay the requests; fills ``records`` and ``engines``. ``progress`` hears how many requests have arrived (in a
    closed loop, completed)."""
    scenario, requests = run.scenario, run.requests
    users = scenario.workload if isinstance(scenario.workload, ClosedLoopWorkload) else None
    live = users is not None or requests.after is not None
    run.records = Records(len(requests))
    run.latency.extrapolated.clear()
    ids = np.delete(np.arange(len(requests)), run.rejected)
    for request in run.rejected.tolist():
        run.records.arrival_ns[request] = int(requests.arrival_ns[request])
    fleet = Fleet(
        scenario.router.kind, scenario.seed, _sequences(run), run.records.arrival_ns.__setitem__, live=live
    )  # fmt: skip
    make = _tandem if scenario.tandem else _fast_engine if run.fast else _round_engine
    run.engines = []
    for index in range(scenario.deployment.replicas):
        engine = make(run, index, fleet, fleet.completed if live else None, observe)
        run.engines.append(engine)
        fleet.add(engine)
    try:
        if users:
            fleet.run_closed(ids, users.concurrency, round(users.think_time_s * 1e9), progress)
        elif requests.after:
            fleet.run_turns(requests, run.rejected, progress)
        else:
            fleet.run_open(requests, ids, progress)
    except OverflowError:
        raise InputError("the run goes on for more than 146 years; check the units of rates and latencies") from None
    run.warnings += _afterwards(run)
    return run


def _afterwards(run: Run) -> list[str]:
    """What only a run shows."""
    warnings = []
    seats, asked = max(engine.seats_peak for engine in run.engines), run.scenario.scheduler.max_num_seqs
    if seats == run.memory.state_slots < asked:
        warnings.append(f"Mamba states in memory ({seats}) bounded the batch, not max_num_seqs {asked}")
    if shares := extrapolated_share(run):
        beyond = ", ".join(f"{name} in {share:.2%} of rounds" for name, share in shares.items())
        warnings.append(f"latency is extrapolated beyond what was measured: {beyond}")
    return warnings


def _limits(run: Run) -> Limits:
    scheduler, memory = run.scenario.scheduler, run.memory
    return Limits(
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
        memory.kv_blocks,
        run.scenario.memory.kv_block_tokens,
        memory.state_slots,
        scheduler.chunked_prefill,
        scheduler.prefill,
    )


def _queue(run: Run):
    return ADMISSION[run.scenario.scheduler.admission]()


def _fast_engine(run: Run, index: int, fleet: Fleet, on_finish, observe: Observer | None) -> Engine:
    schedule = schedule_of(run.scenario)
    ticks = schedule.ticks(int(np.delete(run.requests.output_tokens, run.rejected).max()))
    return Engine(
        index, run.latency, schedule, _limits(run), _queue(run), run.records, ticks, on_finish, observe
    )  # fmt: skip


def _round_engine(run: Run, index: int, fleet: Fleet, on_finish, observe: Observer | None) -> RoundEngine:
    cache = _cache(run, run.memory.kv_blocks, run.memory.state_slots)
    return round_engine(run, index, _decoder(run), cache, on_finish, observe)


def round_engine(run: Run, index: int, decoder: Passes, cache: Cache, on_finish, observe: Observer | None):
    """The engine of a replica under the scenario's rules, whatever decodes."""
    return RoundEngine(
        index, run.latency, decoder, _limits(run), _queue(run), cache, run.records, on_finish, observe
    )  # fmt: skip


def _decoder(run: Run) -> Passes:
    decoding, scheduler, kv_block = run.scenario.decoding, run.scenario.scheduler, run.scenario.memory.kv_block_tokens
    if isinstance(decoding, ask.Speculative):
        k, acceptance = decoding.draft_tokens, decoding.acceptance
        each = acceptance if isinstance(acceptance, list) else [acceptance] * k
        return BurstDecoder(kv_block, Bursts(each, run.scenario.seed, run.requests.output_tokens), run.records)
    if not isinstance(decoding, Blocks):
        return TokenDecoder(kv_block, prefill_gives_token=isinstance(decoding, ask.Autoregressive))
    luck, limits = run.luck, (scheduler.steps_per_round, scheduler.max_extends_per_round)
    assert luck is not None
    return BlockDecoder(decoding.block_size, POLICIES[scheduler.policy], *limits, luck, luck.level, run.records)


def _cache(run: Run, blocks: int, state_slots: int) -> Cache:
    asked, kv_block = run.scenario.memory.prefix_cache, run.scenario.memory.kv_block_tokens
    if isinstance(asked, ask.NoPrefixCache):
        return KvCache(blocks, kv_block)
    every = asked.state_checkpoint_every if isinstance(asked, ask.HybridPrefixCache) else None
    drafts = isinstance(run.scenario.decoding, ask.Speculative)
    return PrefixCache(blocks, kv_block, run.requests, every, state_slots, drafts)


def _tandem(run: Run, index: int, fleet: Fleet, on_finish, observe: Observer | None) -> Tandem:
    scenario, luck = run.scenario, run.luck
    placement, kv_block = scenario.deployment.placement, scenario.memory.kv_block_tokens
    assert scenario.tandem is not None
    assert luck is not None
    assert not isinstance(placement, ask.Colocated)
    (m, n), (context, denoiser) = scenario.tandem, run.memory.sides
    contexts = [
        ContextServer(i, _queue(run), _cache(run, context.kv_blocks, context.state_slots)) for i in range(m)
    ]  # fmt: skip
    seats = min(denoiser.state_slots, scenario.scheduler.max_num_seqs)
    denoisers = [DenoiserServer(i, KvCache(denoiser.kv_blocks, kv_block), seats) for i in range(n)]
    return Tandem(
        fleet.env,
        index,
        run.latency,
        _limits(run),
        scenario.decoding.pass_tokens,
        contexts,
        denoisers,
        luck,
        luck.level,
        run.records,
        blocking=placement.transfer == "blocking",
        sticky=not isinstance(placement, ask.Pools) or placement.assignment == "sticky",
        max_extends=scenario.scheduler.max_extends_per_round,
        on_finish=on_finish,
        observe=observe,
    )


def schedule_of(scenario: ask.Scenario) -> Schedule:
    """What a sequence of the fast engine does in each round; of the others, what memory a request needs."""
    decoding, kv_block = scenario.decoding, scenario.memory.kv_block_tokens
    if isinstance(decoding, Blocks):
        return BlockSchedule(kv_block, decoding.block_size, decoding.most_steps)
    return TokenSchedule(kv_block)


def extrapolated_share(run: Run) -> dict[str, float]:
    """By kind of pass, the share of rounds in which it was beyond what the latency's profile holds."""
    rounds = sum(engine.rounds for engine in run.engines)
    return {name: round(count / rounds, 9) for name, count in sorted(run.latency.extrapolated.items())}


def _warn_without_effect(scenario: ask.Scenario) -> list[str]:
    kinds = f"decoding.kind {scenario.decoding.kind} and latency.kind {scenario.latency.kind}"
    found = without_effect(scenario)
    return [f"set, but without effect with {kinds}: {', '.join(found)}"] if found else []


def without_effect(scenario: ask.Scenario) -> list[str]:
    """Keys that are set and not read under the kinds chosen."""
    decoding, latency, hardware, scheduler = (
        scenario.decoding,
        scenario.latency,
        scenario.deployment,
        scenario.scheduler,
    )
    read = {
        "two_tower": {"denoise", "extend", "transfer"},
        "mock_ar": {"denoise", "decode", "transfer"},
        "block_diffusion": {"denoise", "extend"},
        "speculative": {"decode", "draft"},
        "autoregressive": {"decode"},
    }[decoding.kind]
    found = []
    if not isinstance(decoding, Blocks):
        found += ["commits"] * ("commits" in scenario.model_fields_set)
        of_blocks = scheduler.model_fields_set & {"policy", "steps_per_round", "max_extends_per_round"}
        found += [f"scheduler.{name}" for name in sorted(of_blocks)]
    placement = hardware.placement
    if not isinstance(decoding, ask.TwoTower | ask.MockAr):
        found += ["deployment.placement"] * ("placement" in hardware.model_fields_set)
    elif not isinstance(placement, ask.Colocated):
        if placement.link and not isinstance(latency, ask.RooflineLatency):
            found.append("deployment.placement.link")
        if "transfer" in placement.model_fields_set and not scenario.tandem:
            found.append("deployment.placement.transfer")
    if isinstance(latency, ask.AffineLatency):
        passes = ("decode", "denoise", "draft", "extend", "transfer")
        found += [f"latency.{name}" for name in passes if name not in read and getattr(latency, name)]
    context, denoiser = hardware.degrees
    if denoiser != context and not isinstance(decoding, ask.TwoTower | ask.MockAr):
        found.append("deployment.tensor_parallel.denoiser")
    if hardware.expert_parallel and (set(hardware.degrees) == {1} or not isinstance(latency, ask.RooflineLatency)):
        found.append("deployment.expert_parallel")
    return found


def gpu_of(scenario: ask.Scenario, base: Path) -> Gpu:
    """Of the deployment. Raises InputError."""
    latency = scenario.latency
    profile = load_profile(latency.path, base) if isinstance(latency, ask.ProfileLatency) else None
    return _costing(_gpu(scenario.deployment.gpu, base, profile, [])[0], scenario.cost)


def _costing(gpu: Gpu, cost: ask.Cost) -> Gpu:
    """What the scenario says of price and power stands in the place of what the GPU's file says. Raises InputError."""
    given = cost.model_dump(exclude_none=True)
    sources = gpu.sources | dict.fromkeys(given, "given in the scenario")
    gpu = gpu.model_copy(update=given | {"sources": sources})
    if gpu.power_w is not None and gpu.idle_power_w is not None and gpu.idle_power_w > gpu.power_w:
        raise InputError(f"gpu {gpu.name}: idle_power_w is {gpu.idle_power_w:g}; at most power_w, {gpu.power_w:g}")
    return gpu


def _gpu(asked: str | None, base: Path, profile: Profile | None, warnings: list[str]) -> tuple[Gpu, str]:
    """The GPU and the name by which a scenario gets it again: that of the latency's profile unless another is asked."""
    device = profile.device if profile else None
    if device and asked in (None, device.name):
        return device, device.name
    name = asked or DEFAULT_GPU
    gpu = load_gpu(name, base)
    if profile:
        measured = device.name if device else profile.of("latency").device
        warnings.append(f"latency was measured on {measured}; memory and price are those of {gpu.name}")
    return gpu, name


def _sequences(run: Run) -> Callable[[int], Sequence]:
    inputs, outputs = run.requests.input_tokens, run.requests.output_tokens
    fast, plans = run.fast, run.luck.plans if run.luck else None
    task = TandemTask if run.scenario.tandem else Task

    def sequence(request: int) -> Sequence:
        lengths = int(inputs[request]), int(outputs[request])
        if fast:
            return Sequence(request, *lengths, plans.of(request) if plans else None)
        return task(request, *lengths)

    return sequence


def _oversized(scenario: ask.Scenario, tower: Tower, requests: Requests, memory: MemoryPlan) -> np.ndarray:
    """Ids of requests that can never run here. Raises InputError unless the scenario rejects them."""
    peak = schedule_of(scenario).peak_tokens(requests.input_tokens, requests.output_tokens)
    if isinstance(scenario.decoding, ask.Speculative):
        peak = peak + 1  # a burst is written whole
    blocks = min(side.kv_blocks for side in memory.sides)
    room = blocks * scenario.memory.kv_block_tokens
    limits = [
        (room, f"the KV cache holds {room} tokens ({blocks} blocks)"),
        (tower.max_positions, f"{tower.name} has {tower.max_positions} positions (max_position_embeddings)"),
    ]
    if not scenario.scheduler.chunked_prefill:
        budget = scenario.scheduler.max_num_batched_tokens
        limits.append((budget, f"without chunked_prefill a round holds {budget} tokens (max_num_batched_tokens)"))
    most, why = min(limits)
    over = np.flatnonzero(peak > most)
    if len(over) and scenario.memory.oversized == "fail":
        first = int(over[0])
        raise InputError(
            f"request {first} ({requests.input_tokens[first]} input, {requests.output_tokens[first]} output tokens) "
            f"needs {peak[first]} tokens at once; {why}. {len(over)} of {len(requests)} requests can never fit; "
            "set memory.oversized to reject to leave them out"
        )
    if len(over) == len(requests):
        raise InputError(f"no request fits: {why}")
    return over
