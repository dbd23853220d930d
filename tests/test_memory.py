"""What fits into a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from twotower_sim.drafter import DrafterBytes, ModelDrafter, MtpDrafter, NgramDrafter
from twotower_sim.errors import InputError
from twotower_sim.gpu import load_gpu
from twotower_sim.memory import plan_memory
from twotower_sim.model import load_tower
from twotower_sim.preset import preset_path

TOWER = load_tower("nemotron-twotower-30b-a3b", Path())
ONE_TOWER = {"two_tower": False, "split": False, "pass_tokens": 1}


def plan(gpu="h100-sxm", tower=TOWER, **changes):
    options = {
        "two_tower": True,
        "split": True,
        "tensor_parallel": 1,
        "utilization": 0.9,
        "kv_block_tokens": 16,
        "pass_tokens": 16,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "kv_blocks": None,
        "state_slots": None,
    } | changes
    return plan_memory(tower, load_gpu(gpu, Path()), **options)


def used(side):
    pools = side.kv_blocks * side.kv_block_bytes + side.state_slots * side.state_bytes
    return side.weights + side.workspace + pools


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        ("h100-sxm", {}),
        ("h200", {"split": False}),
        ("b200", {"split": False, "max_num_seqs": 1024}),
        ("a100-80gb", {"tensor_parallel": 4, "split": False}),
        ("gb10", {}),
        ("h100-sxm", {"two_tower": False, "pass_tokens": 1}),
    ],
)
def test_pools_fill_the_smaller_side_and_no_more(gpu, changes):
    found = plan(gpu, **changes)
    fullest = max(used(side) for side in found.sides)
    capacity = found.sides[0].capacity
    assert capacity - found.kv_block_bytes < fullest <= capacity
    assert 1 <= found.state_slots <= changes.get("max_num_seqs", 128)


def test_split_towers_each_have_a_gpu_and_states_on_both():
    found = plan()
    assert [side.role for side in found.sides] == ["context", "denoiser"]
    assert found.sides[1].weights > found.sides[0].weights  # time conditioning
    assert found.sides[1].workspace > found.sides[0].workspace  # logits
    assert found.state_bytes == TOWER.state_bytes


def test_states_bound_concurrency_long_before_kv_does():
    found = plan(max_num_seqs=1000)
    assert found.state_slots < 150
    assert found.kv_blocks * 16 > found.state_slots * 4000


def test_tensor_parallelism_divides_the_load_and_copies_kv_beyond_the_kv_heads():
    one, two, four = (plan("h200", split=False, tensor_parallel=n) for n in (1, 2, 4))
    assert two.sides[0].weights == pytest.approx(one.sides[0].weights / 2, rel=1e-6)
    assert two.kv_block_bytes * 2 == one.kv_block_bytes
    assert four.kv_block_bytes == two.kv_block_bytes  # two KV heads


def test_given_pools_are_kept_and_the_rest_follows():
    found = plan(kv_blocks=1000)
    assert found.kv_blocks == 1000
    assert found.state_slots == 128
    assert plan(state_slots=7).state_slots == 7
    assert plan(state_slots=7).kv_blocks > plan().kv_blocks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": False}, "both towers of nemotron-twotower-30b-a3b need 126.4 GB for weights"),
        ({"utilization": 0.5}, "the denoiser tower of .* needs 63.2 GB for weights"),
        ({"kv_blocks": 1_000_000}, "98.3 GB for the KV cache"),
        ({"state_slots": 1000}, "49.1 GB for Mamba states"),
        ({"max_num_seqs": 4096}, "34.9 GB for workspace|workspace"),
    ],
)
def test_what_does_not_fit_is_said(changes, said):
    with pytest.raises(InputError, match=said):
        plan(**changes)


def test_both_pools_given_are_taken_at_their_word():
    found = plan(kv_blocks=1_000_000, state_slots=1000)
    assert (found.kv_blocks, found.state_slots) == (1_000_000, 1000)
    assert "98.3 GB for the KV cache" in found.overcommitted
    assert plan().overcommitted is None


def test_without_attention_every_sequence_has_room():
    """Blocks of no bytes: as many as all sequences need at their longest."""
    found = plan(tower=replace(TOWER, pattern="MEM"))
    assert found.kv_block_bytes == 0
    assert found.kv_blocks * 16 == found.state_slots * TOWER.max_positions
    assert plan(tower=replace(TOWER, pattern="*E")).state_slots == 128


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({"split": False}, "Split the towers, raise"), ({"utilization": 0.5}, "Raise deployment"), ({"two_tower": False, "utilization": 0.1}, "Raise deployment")],
)  # fmt: skip
def test_advice_is_what_can_still_be_done(changes, advice):
    with pytest.raises(InputError, match=rf"\. {advice}"):
        plan(**changes)


# ---------------------------------------------------------------------- every way to place and decode


def test_towers_in_tandem_fill_their_own_gpus():
    found, step = plan("h200", servers=(1, 3), max_num_seqs=64), plan("h200", max_num_seqs=64)
    context, denoiser = found.sides
    assert (context.state_slots, denoiser.state_slots) == (3 * 64, 64)
    assert context.kv_blocks != denoiser.kv_blocks
    for side in found.sides:
        assert side.capacity - side.kv_block_bytes < used(side) <= side.capacity
    assert (found.kv_blocks, found.state_slots) == (context.kv_blocks, context.state_slots)
    assert step.sides[0].kv_blocks == step.sides[1].kv_blocks == min(side.kv_blocks for side in step.sides)
    assert [side.state_slots for side in plan("h200", servers=(3, 2), max_num_seqs=64).sides] == [43, 64]


def test_towers_of_two_degrees_share_the_pools_that_both_can_hold():
    found = plan("h200", denoiser_tensor_parallel=2)
    context, denoiser = found.sides
    assert denoiser.weights == pytest.approx(context.weights / 2, rel=0.01)
    assert (denoiser.kv_block_bytes, denoiser.state_bytes) == (context.kv_block_bytes // 2, context.state_bytes // 2)
    assert (context.kv_blocks, context.state_slots) == (denoiser.kv_blocks, denoiser.state_slots)
    assert context.capacity - context.kv_block_bytes < used(context) <= context.capacity
    with pytest.raises(InputError, match="tensor_parallel: found context 1, denoiser 2; colocated"):
        plan("h200", split=False, denoiser_tensor_parallel=2)


def test_a_state_for_every_position_that_drafts_are_rolled_back_to():
    one, four = (plan(**ONE_TOWER, states_per_sequence=n, state_slots=32) for n in (1, 4))
    assert four.state_bytes == 4 * one.state_bytes
    states = 3 * 32 * one.state_bytes
    assert (one.kv_blocks - four.kv_blocks) * one.kv_block_bytes == pytest.approx(states, abs=one.kv_block_bytes)
    assert plan(**ONE_TOWER, states_per_sequence=4, max_num_seqs=1000).state_slots < 40


def test_drafters_take_memory_beside_the_tower():
    small = replace(TOWER, pattern="M*-" * 8, hidden=1024, experts=0, experts_per_token=0)
    for degree in (1, 2, 4):
        none, mtp, model = (d.bytes_on_gpu(TOWER, degree) for d in (NgramDrafter(), MtpDrafter(), ModelDrafter(small)))
        assert none == DrafterBytes(0, 0, 0)
        layer = TOWER.attention_params + TOWER.moe_dense_params + 128 * TOWER.expert_params
        assert mtp.weights == pytest.approx(2 * (layer + 2 * TOWER.hidden**2) / degree, rel=1e-3)
        assert mtp.kv_per_token == 2 * 2 * 128 * 2 // min(degree, 2)
        assert mtp.state == 0
        assert model == (small.weight_bytes() // degree, 8 * 1024 // min(degree, 2), small.state_bytes // degree)
    tied = replace(TOWER, tied=True)
    assert MtpDrafter().bytes_on_gpu(tied, 1) == MtpDrafter().bytes_on_gpu(TOWER, 1)  # the head is the tower's anyhow
    alone, beside = (
        plan(**ONE_TOWER),
        plan(**ONE_TOWER, drafter=DrafterBytes(10**9, 1024, 10**6), states_per_sequence=2),
    )
    assert beside.sides[0].weights == alone.sides[0].weights + 10**9
    assert beside.kv_block_bytes == alone.kv_block_bytes + 16 * 1024
    assert beside.state_bytes == 2 * (alone.state_bytes + 10**6)


def test_checkpoints_of_states_are_more_than_there_are_sequences():
    some, kept = (plan("h200", **ONE_TOWER, max_num_seqs=16, checkpoints=on) for on in (False, True))
    assert some.state_slots == 16
    assert kept.state_slots > 500
    assert kept.state_slots * kept.state_bytes == pytest.approx(0.9 / 1.9 * kept.sides[0].free, rel=0.01)
    stateless = plan("h200", **ONE_TOWER, max_num_seqs=16, checkpoints=True, tower=replace(TOWER, pattern="*E"))
    assert stateless.state_slots == 16
    context, denoiser = plan("h200", servers=(1, 1), max_num_seqs=16, checkpoints=True).sides
    assert context.state_slots > 500
    assert denoiser.state_slots == 16


def test_on_which_server_memory_is_short():
    with pytest.raises(InputError, match=r"the denoiser tower of .* GB for the KV cache"):
        plan(servers=(1, 1), kv_blocks=100_000, max_num_seqs=512)
    with pytest.raises(InputError, match=r"the context tower of .* GB for Mamba states"):
        plan("h200", servers=(1, 4), state_slots=200, denoiser_tensor_parallel=2, utilization=0.45)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": 10**10}, {"bf16_tflops": ".inf"}, {"bf16_tflops": 1e300}, {"price_usd_per_hour": 1e300}, {"power_w": ".inf"},
        {"memory_bandwidth_gb_per_s": 1e-300}, {"links": {"nvlink": {"gb_per_s": ".inf", "latency_us": 1}}},
        {"links": {"nvlink": {"gb_per_s": 1, "latency_us": ".nan"}}},
        {"efficiency": {"memory": 1e-300, "compute": 1, "kernel_gap_us": 1, "kernel_launch_us": 1, "graph_launch_us": 1}},
        {"efficiency": {"memory": 1, "compute": 1, "kernel_gap_us": 1e300, "kernel_launch_us": 1, "graph_launch_us": 1}},
    ],
)  # fmt: skip
def test_gpu_figures_that_no_device_has_are_refused(tmp_path, change):
    gpu = yaml.safe_load(preset_path("gpus", "h100-sxm", ".yaml").read_text()) | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(gpu).replace("'.inf'", ".inf").replace("'.nan'", ".nan"))
    with pytest.raises(InputError, match=f"mine.yaml:[0-9]+: {next(iter(change))}.*found"):
        load_gpu("mine.yaml", tmp_path)
