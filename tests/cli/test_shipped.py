"""The shipped recipes: each loads, and has the paper's values."""

from __future__ import annotations

from typing import Any

import pytest

from selm_fast.cli.settings import load_run_config
from selm_fast.cli.shipped import shipped
from selm_fast.config import RunConfig

SELM_PAPER = ("zephyr-7b", "llama3-8b", "phi3-mini")
FULL = (*SELM_PAPER, "dpo-iterative", "xpo")
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


def by_iteration(name: str) -> list[RunConfig]:
    config = load_run_config(shipped()[name], [])
    return [config.at(number) for number in range(1, config.iterations + 1)]


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_loads_and_says_first_what_it_is(name: str) -> None:
    assert by_iteration(name)
    lines = shipped()[name].read_text("utf-8").splitlines()
    comment = next(number for number, line in enumerate(lines) if not line.startswith("# "))
    assert 2 <= comment <= 4


@pytest.mark.parametrize("name", FULL)
def test_what_all_recipes_of_the_paper_share(name: str) -> None:
    for config in by_iteration(name):
        assert config.epochs == 1 and config.seed == 42
        assert (config.optim.schedule, config.optim.warmup, config.optim.weight_decay) == ("cosine", 0.1, 0.0)
        assert (config.data.max_length, config.data.max_prompt_length) == (1024, 512)
        assert config.rollout.max_new_tokens == 1024
        assert (config.data.train, config.data.eval) == (f"{ULTRAFEEDBACK}:train_prefs", f"{ULTRAFEEDBACK}:test_prefs")
        assert config.checkpoint.every == 20  # an iteration may have 60 steps
        assert config.label_smoothing == 0 and config.output_dir is None
        assert (config.rollout.engine, config.ranker, config.pairrm.path) == ("vllm", "pairrm", "llm-blender/PairRM")


@pytest.mark.parametrize("name", FULL)
def test_recipes_of_the_paper_name_what_vllm_needs_and_what_does_without(name: str) -> None:
    text = shipped()[name].read_text("utf-8")
    assert "--vllm-python ~/vllm/bin/python" in text and "--rollout.engine transformers" in text


@pytest.mark.parametrize(
    ("name", "model", "groups", "methods", "weights", "rates"),
    [
        (
            "zephyr-7b",
            "alignment-handbook/zephyr-7b-sft-full",
            256,
            ["dpo", "selm", "selm", "selm"],
            [0, 1e-5, 1e-5, 1e-5],
            [5e-7, 5e-7, 5e-7, 1e-7],
        ),
        (
            "llama3-8b",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            128,
            ["selm"] * 3,
            [1e-6] * 3,
            [5e-7, 3e-7, 1e-7],
        ),
        ("phi3-mini", "microsoft/Phi-3-mini-4k-instruct", 128, ["selm"] * 3, [1e-5] * 3, [5e-7, 3e-7, 1e-7]),
        ("dpo-iterative", "meta-llama/Meta-Llama-3-8B-Instruct", 128, ["dpo"] * 3, [0] * 3, [5e-7, 3e-7, 1e-7]),
    ],
)
def test_the_papers_values(name: str, model: str, groups: int, methods: list[str], weights: Any, rates: Any) -> None:
    configs = by_iteration(name)
    assert [config.method for config in configs] == methods
    assert [config.exploration_weight for config in configs] == pytest.approx(weights, rel=1e-12)
    assert [config.optim.lr for config in configs] == rates
    for config in configs:
        assert config.model.path == model and config.batch.groups == groups and config.beta == 0.01
        assert config.iterations == config.portions == len(rates) and config.reference == "previous"
        assert config.rollout.temperature == 0 and config.rollout.explored == "policy" and config.rank.offline_pair


def test_the_papers_alphas() -> None:
    assert [by_iteration(name)[-1].alpha for name in SELM_PAPER] == [1e-3, 1e-4, 1e-3]


def test_the_first_iteration_of_zephyr_rolls_nothing_out() -> None:
    assert [config.rollout.responses for config in by_iteration("zephyr-7b")] == [0, 1, 1, 1]
    for name in ("llama3-8b", "phi3-mini", "dpo-iterative"):
        assert [config.rollout.responses for config in by_iteration(name)] == [1, 1, 1]


def test_iterative_dpo_is_the_llama_recipe_without_the_exploration_term() -> None:
    for dpo, selm in zip(by_iteration("dpo-iterative"), by_iteration("llama3-8b"), strict=True):
        assert dpo.to_json() | {"alpha": None} == selm.to_json() | {"alpha": None, "method": "dpo"}


def test_xpo_compares_samples_of_policy_and_base() -> None:
    configs = by_iteration("xpo")
    assert len(configs) == 3
    for config in configs:
        assert (config.method, config.reference, config.beta, config.alpha) == ("xpo", "base", 0.1, 5e-6)
        assert config.exploration_weight == 5e-6 and config.optim.lr == 5e-7
        assert (config.rollout.responses, config.rollout.explored, config.rollout.temperature) == (1, "base", 1.0)
        assert config.rollout.top_p == 1.0 and config.rank.offline_pair is False
