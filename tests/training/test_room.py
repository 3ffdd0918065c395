"""Whether runs fit: models that people train, by arithmetic of its own; and advice that is followed helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from benchmarks.memory_table import EIGHT, MODELS, ONE, planned
from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.memory import peak
from selm_fast.model.shape import shape_of
from selm_fast.roofline import GroupLengths, Shape, Work
from selm_fast.training.room import (
    USABLE,
    Plan,
    advise,
    assumed_group,
    head_mode,
    longest_group,
    mean_group,
)

GIB = 2**30
# Family, published number of parameters, and those of norms of queries and keys, which a configuration does not tell.
FAMILIES = {
    "Llama-3-8B": (LlamaConfig, 8_030_261_248, 0),
    "Mistral-7B": (MistralConfig, 7_241_732_096, 0),
    "Qwen3-8B": (Qwen3Config, 8_190_735_360, 36 * 2 * 128),
    "Phi-3-mini": (Phi3Config, 3_821_079_552, 0),
}


def plan_of(name: str = "Llama-3-8B", ranks: int | None = 1, **settings: Any) -> Plan:
    config = Config.model_validate(settings)
    return Plan(config, Shape.from_config(MODELS[name]), assumed_group(config), ranks)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    family, published, norms = FAMILIES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family(**MODELS[name]))
    counted = shape_of(model)
    assert counted.weights == sum(weight.numel() for weight in model.parameters()) == published
    by_hand = Shape.from_config(MODELS[name])
    assert by_hand.weights + norms == published
    assert by_hand.body == counted.body


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setup", [EIGHT, ONE], ids=["8 x 80", "1 x 139"])
def test_a_step_of_16k_tokens_fits(name: str, setup: tuple[Config, int, int]) -> None:
    """The parts by arithmetic that shares nothing with the model's."""
    plan, changes = planned(name, setup)
    weights, ranks = FAMILIES[name][1], setup[1]
    assert plan.config.batch.max_tokens == 16384 == round(plan.micro_batch.tokens)
    assert plan.total <= USABLE * setup[2] * GIB
    assert {change.name for change in changes} <= {"model.activation_checkpointing"}
    _, held = peak(plan.phases)
    moments = 8 if ranks == 8 else 4  # bytes of both
    state = held.masters + held.gradients + held.moments
    assert state == pytest.approx(weights * (8 + moments) / ranks, rel=1e-5)
    sizes = MODELS[name]
    a_token = {
        "full": 2 * sizes["hidden_size"],
        "selective": selective(sizes),
        "none": everything(sizes),
    }[plan.config.model.activation_checkpointing]
    # Beside the layers: the embedding's and the last norm's rows, and those of responses.
    layers = a_token * sizes["num_hidden_layers"] * 16384
    assert layers < held.activations < layers + 16384 * 12 * sizes["hidden_size"]


def selective(sizes: dict[str, int]) -> int:
    """bf16 results of the seven matmuls and of attention, and its logsumexp in fp32."""
    hidden, width = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    queries, keys = head * sizes["num_attention_heads"], head * sizes["num_key_value_heads"]
    # Both norms' outputs are the residual's inputs: one hidden row each, and one of the layer.
    return 2 * (queries + 2 * keys + queries + 3 * hidden + 2 * width) + 4 * sizes["num_attention_heads"]


def everything(sizes: dict[str, int]) -> int:
    """Beside those, what elementwise kernels need."""
    hidden, width = sizes["hidden_size"], sizes["intermediate_size"]
    return selective(sizes) + 2 * (hidden + 2 * width) + 4 * (2 * hidden + 2)


def test_an_8b_model_on_one_card_in_gib() -> None:
    plan, changes = planned("Llama-3-8B", ONE)
    assert [str(change) for change in changes] == [f"model.activation_checkpointing full -> {plan.total / GIB:.1f} GiB"]
    _, held = peak(plan.phases)
    assert (held.masters + held.gradients + held.moments) / GIB == pytest.approx(8.0303 * 12e9 / GIB, abs=0.1)
    assert round((held.masters + held.gradients + held.moments) / GIB, 1) == 89.7
    assert held.gathered / GIB == pytest.approx(2 * (1.0507 + 0.2181) * 1e9 / GIB, abs=0.01)  # root, one layer, bf16
    assert held.activations / GIB == pytest.approx(16384 * 32 * 8192 / GIB + 0.6, abs=0.1)
    assert 95 < plan.total / GIB < 110


def test_a_plan_that_fits_needs_no_advice() -> None:
    plan = plan_of(ranks=8, model={"activation_checkpointing": "full"})
    assert plan.fits(79 * GIB)
    assert advise(plan, 79 * GIB) == ([], True)


@pytest.mark.parametrize("memory", [24, 48, 79, 139])
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Phi-3-mini"])
def test_advice_that_is_followed_makes_it_fit(name: str, ranks: int, memory: int) -> None:
    plan = plan_of(name, ranks)
    changes, fits = advise(plan, memory * GIB)
    made = plan
    for change in changes:
        made = made.changed(change.name, change.value)
        assert made.total == change.total
    assert made.fits(memory * GIB) == fits
    if fits:  # and every change is needed
        for left_out in changes:
            without = plan
            for change in changes:
                without = without if change is left_out else without.changed(change.name, change.value)
            assert not without.fits(memory * GIB)


def test_advice_is_given_in_the_order_of_what_it_costs() -> None:
    """Time first, then the moments' digits, then smaller micro-batches, then more GPUs."""

    def names(memory: int, ranks: int = 1, most: int = 8) -> list[str]:
        changes, fits = advise(plan_of(ranks=ranks), memory * GIB, most_ranks=most)
        assert fits
        return [f"{change.name} {change.value}" for change in changes]

    assert names(79, ranks=8) == ["model.activation_checkpointing selective"]
    assert names(64, ranks=8) == ["model.activation_checkpointing full"]
    assert names(139) == ["model.activation_checkpointing full", "optim.moments bfloat16"]
    assert names(79) == ["model.activation_checkpointing full", "nproc 2"]
    assert not advise(plan_of(), 79 * GIB, most_ranks=1)[1]
    assert not advise(plan_of(), 10 * GIB)[1]


def test_settings_reach_the_plan() -> None:
    plan = plan_of(ranks=None, dtype="float32", head_mode="keep", optim={"moments": "bfloat16"})
    assert plan.compute_bytes == 4
    assert plan.settings.head == "keep"
    assert plan.model.moment_bytes == 2
    assert plan_of(dtype="auto").compute_bytes == 2
    few = plan_of(ranks=8, batch={"groups": 16})
    assert few.micro_batch.groups == pytest.approx(2)
    assert longest_group(plan.config) == 3072
    assert longest_group(Config(method="dpo")) == 2048
    changed = plan.changed("head_mode", "recompute").changed("batch.max_tokens", 4096).changed("nproc", 4)
    assert (changed.config.head_mode, changed.config.batch.max_tokens, changed.ranks) == ("recompute", 4096, 4)


def test_auto_keeps_logits_within_the_head_s_budget() -> None:
    shape, rows = Shape.from_config(MODELS["Llama-3-8B"]), 2 * GIB / 2 / 128_256
    assert head_mode(Config(), shape, rows, 2) == "keep"
    assert head_mode(Config(), shape, rows + 1, 2) == "recompute"
    assert head_mode(Config(head_mode="keep"), shape, rows + 1, 2) == "keep"


def test_groups_are_counted_or_assumed() -> None:
    groups = [TokenGroup([1] * 9, [2] * 7, [3] * 5, [2] * 7), TokenGroup([1] * 3, [2] * 4, [3] * 5, None)]
    counted = mean_group(groups)
    both = Work.of([GroupLengths(9, (7, 5)), GroupLengths(3, (4, 5))])
    assert (counted.tokens, counted.keys, counted.groups) == (both.tokens / 2, both.keys / 2, 1)
    config = Config.model_validate({"data": {"max_length": 256, "max_prompt_length": 128}})
    assert assumed_group(config) == Work.of_means(1, 128, 128, 2 + 1 / 3)
    assert assumed_group(config, 100, 50, 2.5) == Work.of_means(1, 100, 50, 2.5)
    assert assumed_group(Config(method="dpo"), 100, 50, 2.5) == Work.of_means(1, 100, 50, 2)
