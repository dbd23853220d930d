"""The one composition root: a validated scenario becomes workload, memory, latency, engines and fleet, and runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twotower_sim import scenario as ask
from twotower_sim import workload
from twotower_sim.admission import ADMISSION
from twotower_sim.affine import Pass, Prefill, autoregressive_affine, two_tower_affine
from twotower_sim.commits import CommitLaw, ConstantCommits, FittedCommits
from twotower_sim.engine import Engine, Limits, Round
from twotower_sim.errors import InputError
from twotower_sim.fleet import Fleet
from twotower_sim.gpu import Gpu, load_gpu
from twotower_sim.latency import Latency
from twotower_sim.measured import Hull, autoregressive_measured, two_tower_measured
from twotower_sim.memory import MemoryPlan, plan_memory
from twotower_sim.model import Tower, load_tower
from twotower_sim.plan import BlockPlans
from twotower_sim.profile import CommitClass, Profile, Section, load_profile
from twotower_sim.records import Records
from twotower_sim.requests import Requests
from twotower_sim.roofline import Deployment, autoregressive_roofline, two_tower_roofline
from twotower_sim.routing import INDEPENDENT, observed_routing
from twotower_sim.schedule import BlockSchedule, Schedule, Sequence, TokenSchedule

OBSERVED = "observed-h100"
PUBLISHED = {"nemotron-twotower-30b-a3b": "nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16"}
"""Names under which models of the presets are measured."""
DEFAULT_GPU = "h100-sxm"
MEMORY_TOLERANCE = 0.05
MOST_FITTED = 64  # block size up to which the commit law is tabulated

Observer = Callable[[int, Round], None]


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
    schedule: Schedule
    plans: BlockPlans | None  # None: autoregressive
    rejected: np.ndarray  # ids of requests that can never fit
    provenance: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    records: Records = field(init=False)
    engines: list[Engine] = field(init=False)


def prepare(scenario: ask.Scenario, base: Path = Path()) -> Run:
    """Load and check all that a scenario names; paths are relative to ``base``. Raises InputError."""
    warnings: list[str] = []
    decoding, hardware, scheduler = scenario.decoding, scenario.deployment, scenario.scheduler
    two_tower = isinstance(decoding, ask.TwoTower)
    tower = load_tower(scenario.model, base, scenario.memory.state_dtype)
    tower.check_parallel(hardware.tensor_parallel)
    warnings += tower.notes
    warnings += _without_effect(scenario)
    if two_tower and tower.towers == 1:
        raise InputError(
            f"model {scenario.model} has one tower; decoding.kind two_tower needs two, as in nemotron-twotower-30b-a3b"
        )
    profile = None
    if isinstance(scenario.latency, ask.ProfileLatency):
        profile = _load("latency", scenario.latency.path, base, warnings)
    gpu, name = _gpu(hardware.gpu, base, profile, warnings)
    hardware = hardware.model_copy(update={"gpu": name})
    scenario = scenario.model_copy(update={"deployment": hardware})
    split = two_tower and hardware.placement.kind == "split"
    memory = plan_memory(
        tower,
        gpu,
        two_tower=two_tower,
        split=split,
        tensor_parallel=hardware.tensor_parallel,
        utilization=scenario.memory.gpu_memory_utilization,
        kv_block_tokens=scenario.memory.kv_block_tokens,
        pass_tokens=scenario.pass_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kv_blocks=scenario.memory.kv_blocks,
        state_slots=scenario.memory.state_slots,
    )
    if memory.overcommitted:
        warnings.append(f"memory is taken as given, though {memory.overcommitted}")
    requests, note = _workload(scenario, base)
    warnings += note
    latency, provenance = _latency(scenario, tower, gpu, profile, warnings)
    schedule: Schedule = TokenSchedule(scenario.memory.kv_block_tokens)
    plans = None
    if isinstance(decoding, ask.TwoTower):
        schedule = BlockSchedule(scenario.memory.kv_block_tokens, decoding.block_size, decoding.most_steps)
        law, provenance["commits"] = _commits(scenario, tower, base, requests.output_tokens, warnings)
        plans = BlockPlans(law, scenario.seed, requests.output_tokens)
    rejected = _oversized(scenario, tower, requests, schedule, memory)
    gpus = hardware.replicas * hardware.tensor_parallel * (2 if split else 1)
    efficiency = f"efficiency {gpu.sources.get('efficiency', 'of unstated source')}"
    provenance["gpu"] = f"{gpu.name}: {profile.of('device') if profile and gpu is profile.device else efficiency}"
    provenance["model"] = f"{tower.name}: bytes and FLOPs computed from its dimensions"
    return Run(
        scenario, tower, gpu, gpus, memory, latency, requests, schedule, plans, rejected, provenance, warnings
    )  # fmt: skip


def simulate(run: Run, observe: Observer | None = None, progress: Callable[[int], None] = lambda done: None) -> Run:
    """Replay the requests; fills ``records`` and ``engines``. ``progress`` hears how many requests have arrived (in a
    closed loop, completed)."""
    scenario, requests, scheduler = run.scenario, run.requests, run.scenario.scheduler
    closed = isinstance(scenario.workload, ask.ClosedLoopWorkload)
    run.records = Records(len(requests))
    run.latency.extrapolated.clear()
    ids = np.delete(np.arange(len(requests)), run.rejected)
    for request in run.rejected.tolist():
        run.records.arrival_ns[request] = int(requests.arrival_ns[request])
    limits = Limits(
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
        run.memory.kv_blocks,
        scenario.memory.kv_block_tokens,
        run.memory.state_slots,
        scheduler.chunked_prefill,
        scheduler.prefill == "first",
    )
    fleet = Fleet(
        scenario.router.kind, scenario.seed, _sequences(run), run.records.arrival_ns.__setitem__, live=closed
    )  # fmt: skip
    run.engines = []
    for index in range(scenario.deployment.replicas):
        engine = Engine(
            index,
            run.latency,
            run.schedule,
            limits,
            ADMISSION[scheduler.admission](),
            run.records,
            longest_decode_ticks=run.schedule.ticks(int(requests.output_tokens[ids].max())),
            on_finish=fleet.completed if closed else None,
            observe=observe,
        )
        run.engines.append(engine)
        fleet.add(engine)
    try:
        if isinstance(scenario.workload, ask.ClosedLoopWorkload):
            think_ns = round(scenario.workload.think_time_s * 1e9)
            fleet.run_closed(ids, scenario.workload.concurrency, think_ns, progress)
        else:
            fleet.run_open(requests, ids, progress)
    except OverflowError:
        raise InputError("the run goes on for more than 146 years; check the units of rates and latencies") from None
    seats = max(engine.seats_peak for engine in run.engines)
    if seats == run.memory.state_slots < scheduler.max_num_seqs:
        run.warnings.append(
            f"Mamba states in memory ({seats}) bounded the batch, not max_num_seqs {scheduler.max_num_seqs}"
        )
    if shares := extrapolated_share(run):
        beyond = ", ".join(f"{name} in {share:.2%} of rounds" for name, share in shares.items())
        run.warnings.append(f"latency is extrapolated beyond what was measured: {beyond}")
    return run


def extrapolated_share(run: Run) -> dict[str, float]:
    """By kind of pass, the share of rounds in which it was beyond what the latency's profile holds."""
    rounds = sum(engine.rounds for engine in run.engines)
    return {name: round(count / rounds, 9) for name, count in sorted(run.latency.extrapolated.items())}


def _without_effect(scenario: ask.Scenario) -> list[str]:
    """A warning that names what is set and not read under the kinds chosen."""
    decoding, latency, placement = scenario.decoding, scenario.latency, scenario.deployment.placement
    unread = {"decode"}
    found = []
    if isinstance(decoding, ask.Autoregressive):
        unread = {"denoise", "extend"}
        found += ["commits"] * ("commits" in scenario.model_fields_set)
        found += ["deployment.placement"] * ("placement" in scenario.deployment.model_fields_set)
    elif isinstance(placement, ask.Split) and placement.link and not isinstance(latency, ask.RooflineLatency):
        found.append("deployment.placement.link")
    if isinstance(latency, ask.AffineLatency):
        found += [f"latency.{name}" for name in sorted(unread) if getattr(latency, name)]
    kinds = f"decoding.kind {decoding.kind} and latency.kind {latency.kind}"
    return [f"set, but without effect with {kinds}: {', '.join(found)}"] if found else []


def _load(section: Section, name: str, base: Path, warnings: list[str]) -> Profile:
    profile = load_profile(name, base)
    if profile.of(section).weights == "random":
        warnings.append(f"{section} of {name}: with random weights, so its routing and commits are no checkpoint's")
    return profile


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
    inputs, outputs, plans = run.requests.input_tokens, run.requests.output_tokens, run.plans

    def sequence(request: int) -> Sequence:
        plan = plans.of(request) if plans else None
        return Sequence(request, int(inputs[request]), int(outputs[request]), plan)

    return sequence


def _workload(scenario: ask.Scenario, base: Path) -> tuple[Requests, list[str]]:
    load, seed = scenario.workload, scenario.seed
    if isinstance(load, ask.TraceWorkload):
        options = load.model_dump(exclude={"kind", "path"})
        trace = workload.trace(base / load.path, **options, seed=seed)
        if trace.spread_over_s is None:
            return trace.requests, []
        return trace.requests, [f"time stamps are bunched: spread over bins of {trace.spread_over_s:g} s"]
    lengths = [
        workload.lengths(count=load.requests, seed=seed, stream=stream, **length.model_dump())
        for stream, length in (("input", load.input_tokens), ("output", load.output_tokens))
    ]
    if isinstance(load, ask.SyntheticWorkload):
        arrivals = workload.arrivals(count=load.requests, seed=seed, **load.arrivals.model_dump())
    else:
        arrivals = np.zeros(load.requests, np.int64)
    return Requests(arrivals, *lengths), []


def _latency(
    scenario: ask.Scenario, tower: Tower, gpu: Gpu, profile: Profile | None, warnings: list[str]
) -> tuple[Latency, dict[str, str]]:
    """The latency model, and where its figures are from."""
    latency, scheduler, decoding = scenario.latency, scenario.scheduler, scenario.decoding
    limits = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    host_s = scheduler.host_overhead_ms / 1e3
    if isinstance(latency, ask.AffineLatency):
        return _affine(latency, decoding, host_s, limits[0]), {"latency": "given: affine costs in the scenario"}
    if isinstance(latency, ask.ProfileLatency):
        assert profile is not None
        return _measured(scenario, latency, profile, tower, warnings), {"latency": str(profile.of("latency"))}
    provenance = {"latency": f"modelled: roofline on {gpu.name}"}
    routing = INDEPENDENT
    if latency.moe_routing == "observed" and tower.experts:
        observed = load_profile(OBSERVED)
        figures = observed.routing
        assert figures is not None
        routing = observed_routing(figures.model_dump())
        provenance["moe_routing"] = f"{observed.provenance.kind}: {observed.provenance.source}"
        if (figures.experts, figures.experts_per_token) != (tower.experts, tower.experts_per_token):
            warnings.append(
                f"moe_routing observed was counted on {figures.experts_per_token} of {figures.experts} experts "
                f"and is carried over to {tower.experts_per_token} of {tower.experts}: modelled"
            )
    elif tower.experts:
        provenance["moe_routing"] = "modelled: independent uniform routing"
    on = Deployment(gpu, scenario.deployment.tensor_parallel, _link(scenario, gpu), latency.cuda_graphs, host_s)
    if isinstance(decoding, ask.TwoTower):
        return two_tower_roofline(tower, on, routing, decoding.block_size, *limits), provenance
    return autoregressive_roofline(tower, on, routing, *limits), provenance


def _affine(latency: ask.AffineLatency, decoding: ask.Decoding, host_s: float, max_num_seqs: int) -> Latency:
    prefill = Prefill(**latency.prefill.model_dump())
    end = latency.compose, host_s, max_num_seqs

    def pass_cost(name: str) -> Pass:
        cost = getattr(latency, name)
        if cost is None:
            raise InputError(f"latency.{name}: is missing; decoding.kind {decoding.kind} needs it")
        return Pass(**cost.model_dump())

    if isinstance(decoding, ask.TwoTower):
        return two_tower_affine(prefill, pass_cost("denoise"), pass_cost("extend"), *end)
    return autoregressive_affine(prefill, pass_cost("decode"), *end)


def _measured(
    scenario: ask.Scenario, latency: ask.ProfileLatency, profile: Profile, tower: Tower, warnings: list[str]
) -> Latency:
    measured, scheduler, hardware = profile.latency, scenario.scheduler, scenario.deployment
    if measured is None:
        raise InputError(f"latency.path {latency.path}: the profile holds no latency")
    if hardware.tensor_parallel != 1:
        raise InputError(
            f"deployment.tensor_parallel: found {hardware.tensor_parallel}; {latency.path} was measured with 1"
        )
    warnings += _other_bytes(profile, tower)
    hull = Hull(latency.path, latency.extrapolate)
    end = scheduler.host_overhead_ms / 1e3, scheduler.max_num_seqs, scheduler.prefill == "mixed"
    if not isinstance(scenario.decoding, ask.TwoTower):
        return autoregressive_measured(measured, hull, *end)
    split = hardware.placement.kind == "split"
    if split and measured.transfer is None:
        placement = profile.of("latency").placement or "without a transfer between towers"
        raise InputError(f"deployment.placement.kind: found split; {latency.path} was measured {placement}")
    return two_tower_measured(measured, hull, scenario.decoding.block_size, split, *end)


def _other_bytes(profile: Profile, tower: Tower) -> list[str]:
    """A warning where the measured model does not have the bytes of ``tower``: another one, or another dtype."""
    expected = {
        "bytes_per_sequence": tower.state_bytes,
        "bytes_per_token": tower.kv_bytes_per_token,
        "weights_bytes": tower.weight_bytes() + tower.weight_bytes(denoiser=True),
    }
    memory = profile.latency.memory if profile.latency else None
    found = {key: getattr(memory, key) for key in expected} if memory else {}
    differ = [
        f"{key} {size:,}, not {expected[key]:,}"
        for key, size in found.items()
        if abs(size - expected[key]) > MEMORY_TOLERANCE * expected[key]
    ]
    source = profile.of("latency")
    measured = f"latency was measured on {source.model} in {source.dtype}, not on {tower.name} in {tower.dtype}"
    return [f"{measured}: {'; '.join(differ)}"] if differ else []


def _link(scenario: ask.Scenario, gpu: Gpu):
    placement = scenario.deployment.placement
    if placement.kind == "colocated":
        return None
    if placement.link is None:
        return gpu.fastest_link
    if placement.link not in gpu.links:
        raise InputError(
            f"deployment.placement.link: found {placement.link!r}; {gpu.name} has {', '.join(gpu.links) or 'none'}"
        )
    return gpu.links[placement.link]


def _commits(
    scenario: ask.Scenario, tower: Tower, base: Path, output_tokens: np.ndarray, warnings: list[str]
) -> tuple[CommitLaw, str]:
    """The law of commits at the scenario's operating point, and where its figures are from."""
    commits, decoding = scenario.commits, scenario.decoding
    assert isinstance(decoding, ask.TwoTower)
    if isinstance(commits, ask.ConstantCommits):
        try:
            constant = ConstantCommits(commits.tokens_per_step, decoding.block_size, decoding.most_steps)
        except ValueError as error:
            raise InputError(f"commits.tokens_per_step: {error}") from None
        return constant, "given: constant tokens_per_step in the scenario"
    name = _commits_profile(scenario)
    profile = _load("commits", name, base, warnings)
    figures = profile.commits
    if figures is None:
        raise InputError(f"{name}: the profile holds no commits")
    if commits.class_ not in figures.classes:
        raise InputError(f"commits.class: found {commits.class_!r}; {name} has {', '.join(figures.classes)}")
    of = figures.classes[commits.class_]
    if outside := _outside(figures.block_size, of, commits.class_, decoding):
        if not commits.extrapolate:
            raise InputError(f"{outside}; set commits.extrapolate to go beyond")
        warnings.append(f"commits are extrapolated: {outside}")
    if beyond := _share_beyond(output_tokens, decoding.block_size, of.blocks):
        warnings.append(
            f"{beyond:.0%} of all blocks come after the {of.blocks} of an answer that were measured for class "
            f"{commits.class_}; they are taken to be as hard as the last of these"
        )
    source = profile.of("commits")
    if source.model not in (tower.name, PUBLISHED.get(scenario.model)):
        warnings.append(f"commits were {source.kind} on {source.model}, not on {tower.name}")
    if decoding.block_size > MOST_FITTED:
        raise InputError(
            f"decoding.block_size: found {decoding.block_size}; beyond {MOST_FITTED} use commits.kind constant"
        )
    law = FittedCommits(
        figures.figures(), commits.class_, decoding.gamma, decoding.block_size, decoding.most_steps
    )  # fmt: skip
    return law, str(source)


def _commits_profile(scenario: ask.Scenario) -> str:
    if not isinstance(scenario.commits, ask.ProfileCommits):
        return OBSERVED
    shared = scenario.latency.path if isinstance(scenario.latency, ask.ProfileLatency) else ""
    return scenario.commits.path or shared  # the scenario's validator sees to it that there is one


def _outside(block_size: int, of: CommitClass, name: str, decoding: ask.TwoTower) -> str:
    """What of the operating point was not measured for a class of commits; empty if all was."""
    if decoding.block_size != block_size:
        return f"decoding.block_size: found {decoding.block_size}; commits were measured at {block_size}"
    if of.covers(decoding.gamma, decoding.steps_per_block):
        return ""
    points = ", ".join(f"({gamma:g}, {steps})" for gamma, steps in of.points)
    found = f"decoding.gamma {decoding.gamma:g} with steps_per_block {decoding.steps_per_block}"
    return f"{found}: class {name} was measured at (gamma, steps) {points}, and this lies not between"


def _share_beyond(output_tokens: np.ndarray, block_size: int, measured: int) -> float:
    blocks = -(-output_tokens // block_size)
    return float(np.maximum(blocks - measured, 0).sum() / blocks.sum())


def _oversized(scenario: ask.Scenario, tower: Tower, requests: Requests, schedule: Schedule, memory: MemoryPlan):
    """Ids of requests that can never run here. Raises InputError unless the scenario rejects them."""
    peak = schedule.peak_tokens(requests.input_tokens, requests.output_tokens)
    room = memory.kv_blocks * scenario.memory.kv_block_tokens
    limits = [
        (room, f"the KV cache holds {room} tokens ({memory.kv_blocks} blocks)"),
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
