"""The latency model that a scenario asks for, and where its figures are from."""

from pathlib import Path

from twotower_sim import scenario as ask
from twotower_sim.affine import (
    Pass,
    Prefill,
    autoregressive_affine,
    block_diffusion_affine,
    mock_ar_affine,
    speculative_affine,
    two_tower_affine,
)
from twotower_sim.drafter import Drafter, ModelDrafter, MtpDrafter, NgramDrafter
from twotower_sim.errors import InputError
from twotower_sim.gpu import Gpu, Link
from twotower_sim.latency import Host, Latency
from twotower_sim.luck import OBSERVED
from twotower_sim.measured import (
    Hull,
    autoregressive_measured,
    block_diffusion_measured,
    mock_ar_measured,
    speculative_measured,
    two_tower_measured,
)
from twotower_sim.model import Tower, load_tower
from twotower_sim.profile import Profile, load_profile
from twotower_sim.roofline import (
    Deployment,
    autoregressive_roofline,
    block_diffusion_roofline,
    mock_ar_roofline,
    speculative_roofline,
    two_tower_roofline,
)
from twotower_sim.routing import INDEPENDENT, Routing, observed_routing

MEMORY_TOLERANCE = 0.05


def latency_of(
    scenario: ask.Scenario, tower: Tower, gpu: Gpu, base: Path, profile: Profile | None, warnings: list[str]
) -> tuple[Latency, dict[str, str]]:
    """The latency model, and the provenance of its figures; adds to ``warnings``. Raises InputError."""
    latency, scheduler = scenario.latency, scenario.scheduler
    host = Host(scheduler.host_overhead_ms / 1e3, scheduler.overlap == "hidden")
    if isinstance(latency, ask.AffineLatency):
        return _affine(latency, scenario, host), {"latency": "given: affine costs in the scenario"}
    if isinstance(latency, ask.ProfileLatency):
        assert profile is not None
        return _measured(scenario, latency, host, profile, tower, warnings), {"latency": str(profile.of("latency"))}
    provenance = {"latency": f"modelled: roofline on {gpu.name}"}
    routing, source = _routing(latency, tower, warnings)
    if source:
        provenance["moe_routing"] = source
    hardware = scenario.deployment
    context, denoiser = hardware.degrees
    on = Deployment(
        gpu, context, denoiser, hardware.expert_parallel, link_of(scenario, gpu), latency.cuda_graphs, host
    )  # fmt: skip
    return _roofline(scenario, tower, on, routing, base), provenance


# ---------------------------------------------------------------------- roofline


def _roofline(scenario: ask.Scenario, tower: Tower, on: Deployment, routing: Routing, base: Path) -> Latency:
    decoding, scheduler = scenario.decoding, scenario.scheduler
    limits = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    if isinstance(decoding, ask.TwoTower):
        return two_tower_roofline(tower, on, routing, decoding.block_size, *limits)
    if isinstance(decoding, ask.BlockDiffusion):
        return block_diffusion_roofline(tower, on, routing, decoding.block_size, *limits)
    if isinstance(decoding, ask.Speculative):
        drafter = drafter_of(decoding, scenario, base)
        return speculative_roofline(tower, on, routing, decoding.draft_tokens, drafter, *limits)
    if isinstance(decoding, ask.MockAr):
        return mock_ar_roofline(tower, on, routing, *limits)
    return autoregressive_roofline(tower, on, routing, *limits)


def drafter_of(decoding: ask.Speculative, scenario: ask.Scenario, base: Path) -> Drafter:
    drafter = decoding.drafter
    if isinstance(drafter, ask.NgramDrafter):
        return NgramDrafter(drafter.ms_per_round / 1e3)
    if isinstance(drafter, ask.ModelDrafter):
        tower = load_tower(drafter.model, base, scenario.memory.state_dtype)
        tower.check_parallel(scenario.deployment.degrees[0])
        return ModelDrafter(tower)
    return MtpDrafter()


def _routing(latency: ask.RooflineLatency, tower: Tower, warnings: list[str]) -> tuple[Routing, str]:
    """How many experts a pass touches, and where that is from; "" where there are none."""
    if not tower.experts:
        return INDEPENDENT, ""
    if latency.moe_routing == "independent":
        return INDEPENDENT, "modelled: independent uniform routing"
    observed = load_profile(OBSERVED)
    figures = observed.routing
    assert figures is not None
    if (figures.experts, figures.experts_per_token) != (tower.experts, tower.experts_per_token):
        warnings.append(
            f"moe_routing observed was counted on {figures.experts_per_token} of {figures.experts} experts "
            f"and is carried over to {tower.experts_per_token} of {tower.experts}: modelled"
        )
    return observed_routing(figures.model_dump()), f"{observed.provenance.kind}: {observed.provenance.source}"


def link_of(scenario: ask.Scenario, gpu: Gpu) -> Link | None:
    """The link between the towers' GPUs; None where they are together."""
    placement = scenario.deployment.placement
    if isinstance(placement, ask.Colocated) or not scenario.split:
        return None
    if placement.link is None:
        return gpu.fastest_link
    if placement.link not in gpu.links:
        raise InputError(
            f"deployment.placement.link: found {placement.link!r}; {gpu.name} has {', '.join(gpu.links) or 'none'}"
        )
    return gpu.links[placement.link]


# ---------------------------------------------------------------------- given


def _affine(latency: ask.AffineLatency, scenario: ask.Scenario, host: Host) -> Latency:
    decoding = scenario.decoding
    prefill = Prefill(**latency.prefill.model_dump())
    end = latency.compose, host, scenario.scheduler.max_num_seqs

    def needed(name: str) -> Pass:
        cost = optional(name)
        if cost is None:
            raise InputError(f"latency.{name}: is missing; decoding.kind {decoding.kind} needs it")
        return cost

    def optional(name: str) -> Pass | None:
        cost = getattr(latency, name)
        return None if cost is None else Pass(**cost.model_dump())

    if isinstance(decoding, ask.TwoTower):
        size, sent = decoding.block_size, optional("transfer")
        return two_tower_affine(
            prefill, needed("denoise"), needed("extend"), *end, block_size=size, transfer=sent
        )  # fmt: skip
    if isinstance(decoding, ask.BlockDiffusion):
        return block_diffusion_affine(prefill, needed("denoise"), needed("extend"), *end)
    if isinstance(decoding, ask.MockAr):
        return mock_ar_affine(prefill, needed("denoise"), needed("decode"), *end, transfer=optional("transfer"))
    if isinstance(decoding, ask.Speculative):
        return speculative_affine(prefill, needed("decode"), optional("draft") or Pass(), *end)
    return autoregressive_affine(prefill, needed("decode"), *end)


# ---------------------------------------------------------------------- measured


def _measured(
    scenario: ask.Scenario,
    latency: ask.ProfileLatency,
    host: Host,
    profile: Profile,
    tower: Tower,
    warnings: list[str],
) -> Latency:
    measured, hardware, decoding = profile.latency, scenario.deployment, scenario.decoding
    if measured is None:
        raise InputError(f"latency.path {latency.path}: the profile holds no latency")
    if hardware.degrees != (1, 1):
        raise InputError(
            f"deployment.tensor_parallel: found {max(hardware.degrees)}; {latency.path} was measured with 1"
        )
    warnings += _other_bytes(profile, tower)
    hull = Hull(latency.path, latency.extrapolate)
    if measured.engine:
        host = Host(host.seconds + measured.engine.host_s, host.hidden, measured.engine.wake_s)
    end = host, scenario.scheduler.max_num_seqs, scenario.scheduler.prefill == "mixed"
    if isinstance(decoding, ask.Autoregressive):
        return autoregressive_measured(measured, hull, *end)
    if isinstance(decoding, ask.BlockDiffusion):
        return block_diffusion_measured(measured, hull, decoding.block_size, *end)
    if isinstance(decoding, ask.Speculative):
        return speculative_measured(measured, hull, decoding.draft_tokens, _ngram_s(decoding), *end)
    split = scenario.split
    if split and measured.transfer is None:
        placement = profile.of("latency").placement or "without a transfer between towers"
        raise InputError(
            f"deployment.placement.kind: found {hardware.placement.kind}; {latency.path} was measured {placement}"
        )
    if isinstance(decoding, ask.MockAr):
        return mock_ar_measured(measured, hull, split, *end)
    return two_tower_measured(measured, hull, decoding.block_size, split, *end)


def _ngram_s(decoding: ask.Speculative) -> float:
    """Seconds that drafting takes in a round."""
    drafter = decoding.drafter
    if not isinstance(drafter, ask.NgramDrafter):
        raise InputError(
            f"decoding.drafter.kind: found {drafter.kind}; a profile measures no drafter: with latency.kind profile "
            "only ngram is allowed"
        )
    return drafter.ms_per_round / 1e3


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
