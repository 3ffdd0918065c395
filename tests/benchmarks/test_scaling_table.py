"""The tables of docs/scaling.md: what the page shows, and the arithmetic against numbers counted in another way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import scaling_table
from benchmarks.scaling_table import GROUP, NODE, PROMPTS, RECIPE, SHAPE, Rollout, Training, exchange
from selm_fast.memory import Model
from selm_fast.roofline import Settings, flops
from selm_fast.training.room import longest_group

PAGE = " ".join((Path(__file__).resolve().parents[2] / "docs/scaling.md").read_text("utf-8").split())


def test_the_page_shows_what_the_script_computes() -> None:
    for table in scaling_table.tables():
        assert " ".join(table.split()) in PAGE


def test_the_page_says_what_was_assumed() -> None:
    for said in (
        f"{scaling_table.PEAK / 1e12:.0f} TFLOP/s",
        f"{scaling_table.BANDWIDTH / 1e12:.1f} TB/s",
        f"{scaling_table.UTILISATION:.0%} of the first",
        f"{scaling_table.BANDWIDTH_SHARE:.0%} of the second",
        f"not fused, {scaling_table.PAIRRM_UTILISATION:.0%} of the first",
        f"NVLink {scaling_table.NVLINK / 1e9:.0f} GB/s",
        f"{8 * scaling_table.NETWORK / 1e9:.0f} Gb/s",
        f"{scaling_table.LINK_SHARE:.0%} of either",
        f"{scaling_table.HOP * 1e6:.1f} us",
        f"{scaling_table.NETWORK_HOP * 1e6:.0f} us",
        f"{PROMPTS:,} prompts",
        f"prompts of {scaling_table.PROMPT:.0f} tokens and answers of {scaling_table.RESPONSE:.0f}",
        f"{GROUP.tokens:,.0f} packed tokens",
        f"{longest_group(RECIPE):,} tokens",
        f"{Model(SHAPE).checkpoint_bytes() / 2**30:.0f} GiB",
        f"{3 * SHAPE.layers + 2} collectives",
    ):
        assert said in PAGE, said


def test_the_recipe_is_the_papers() -> None:
    assert (RECIPE.iterations, RECIPE.batch.groups, RECIPE.epochs) == (3, 128, 1)
    assert PROMPTS == 61_135 // 3
    assert SHAPE.weights == 8_030_261_248  # of its model card


def test_training_computes_what_its_groups_need() -> None:
    """All GPUs together, at the assumed utilisation; what bytes add to FLOPs is little."""
    rate = scaling_table.UTILISATION * scaling_table.PEAK
    for gpus in (8, 64, 128):
        found = Training(gpus, 128)
        needed = 128 * flops(SHAPE, GROUP, found.plan.settings).total / (gpus * rate)
        assert needed <= found.computing < 1.05 * needed
        passed = 128 * flops(SHAPE, GROUP, Settings(reference=True)).reference / (gpus * rate)
        assert found.reference_seconds >= found.steps * passed
        assert gpus == 128 or found.reference_seconds == pytest.approx(found.steps * passed)
    # More GPUs than groups: those that have one decide.
    assert Training(1024, 128).computing == pytest.approx(Training(128, 128).computing, rel=0.01)


def test_what_is_exchanged_is_every_weight_and_every_gradient() -> None:
    one = Training(16, 128)
    assert one.rounds == 1 and Training(8, 128).rounds == 2
    layers, root = SHAPE.body + 2 * SHAPE.layers * SHAPE.hidden, 2 * SHAPE.head + SHAPE.hidden
    assert layers + root == SHAPE.weights
    assert one.exchanged == pytest.approx(2 * (2 * layers + root) + 4 * SHAPE.weights)
    assert Training(8, 128).exchanged == 2 * one.exchanged


def test_the_slower_of_both_kinds_of_links_decides() -> None:
    gib, share = 2.0**30, scaling_table.LINK_SHARE
    assert exchange(gib, 0, 1) == 0
    assert exchange(gib, 0, NODE) == pytest.approx(gib * 7 / 8 / scaling_table.NVLINK / share)
    # Half of it comes from the other node, through eight adapters; 15/16 through the links of each GPU.
    slower = max(gib / 2 / (8 * scaling_table.NETWORK), gib * 15 / 16 / scaling_table.NVLINK)
    assert exchange(gib, 0, 16) == pytest.approx(slower / share)
    assert exchange(0, 3, 16) == pytest.approx(3 * (14 * scaling_table.HOP + scaling_table.NETWORK_HOP))


def test_state_is_sharded_over_all_gpus() -> None:
    held = [Training(gpus, 128).plan.phases["optimiser"] for gpus in (8, 64)]
    for memory, gpus in zip(held, (8, 64), strict=True):
        assert memory.total - memory.runtime == pytest.approx(16 * SHAPE.weights / gpus)
    assert Training(8, 128).plan.fits(scaling_table.GIB * 2**30)


def test_rollout_is_linear_until_the_longest_answer_decides() -> None:
    one, eight = Rollout(1), Rollout(8)
    assert one.seconds == pytest.approx(8 * eight.seconds)
    assert Rollout(4096).tokens == RECIPE.rollout.max_new_tokens
    assert eight.tokens * eight.together == pytest.approx(PROMPTS / 8 * scaling_table.RESPONSE)
    # A token reads 16 GB of weights, and 128 KiB of keys and values for each token before it.
    read = 2 * SHAPE.weights + 128 * 2**17 * (223 + 345 / 2)
    assert eight.token_seconds == pytest.approx(read / (0.5 * 4.3e12))


def test_ranking_is_what_an_encoder_of_deberta_s_size_computes() -> None:
    """302M weights in 24 layers, six rows a prompt; attention adds a share that grows with the rows' length."""
    tokens = 223 + 2 * 345
    matmuls = 6 * 2 * 302e6 * tokens
    assert 1.1 * matmuls < scaling_table.ranking_flops() < 1.4 * matmuls
    assert math.isclose(scaling_table.ranking_seconds(16), scaling_table.ranking_seconds(8) / 2)


def test_the_fastest_training_leaves_gpus_idle() -> None:
    assert [scaling_table.fastest(gpus).gpus for gpus in scaling_table.GPUS] == [8, 64, 128]
