"""RunConfig: what a whole run may be, and the settings of each of its iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selm_fast.config import PER_ITERATION, Config, OptimConfig, RunConfig

SAMPLED = {"temperature": 1.0}


def test_the_defaults_are_selm_as_in_the_paper() -> None:
    config = RunConfig()
    assert (config.iterations, config.portions, config.reference) == (3, None, "previous")
    assert (config.rollout.responses, config.rollout.explored, config.rollout.temperature) == (1, "policy", 0.0)
    assert config.rank.offline_pair and config.ranker is None and config.prepare is None and config.iteration == {}
    shared = {name: getattr(config, name) for name in Config.model_fields}
    assert shared == {name: getattr(Config(), name) for name in Config.model_fields}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"reference": "a"}}, "model.reference is for train; in a run, reference is previous or base"),
        ({"model": {"init": "c.json", "tokenizer": "t"}}, "model.init gives random weights"),
        ({"prepare": "python:a:b", "model": {"path": "m"}}, "prepare makes the model and the rows; drop model.path"),
        ({"prepare": "python:a:b", "model": {"tokenizer": "t"}}, "prepare makes the model and the rows"),
        ({"prepare": "python:a:b", "data": {"train": "r"}}, "prepare makes the model and the rows"),
        ({"prepare": "python:a:b", "data": {"eval": "r"}}, "prepare makes the model and the rows"),
        ({"prepare": "a:b"}, "prepare is 'a:b'; expected python:MODULE:FUNCTION"),
        ({"ranker": "pair"}, "ranker is 'pair'; expected pairrm or python:MODULE:FUNCTION"),
        ({"ranker": "python:a.b:"}, "expected pairrm or python:MODULE:FUNCTION"),
        ({"ranker": "python:a.b:c; d"}, "expected pairrm or python:MODULE:FUNCTION"),
        ({"ranker": "python:a.b:c\n"}, "expected pairrm or python:MODULE:FUNCTION"),
        ({"rollout": {"responses": 2}}, "rollout.responses is 2 and rollout.temperature is 0: greedy responses"),
        ({"rollout": {"responses": 0}}, "method selm explores the policy's own response and rollout.responses is 0"),
        ({"method": "xpo", "rollout": {"responses": 0}}, "method xpo explores the policy's own response"),
        (
            {"rank": {"offline_pair": False}},
            "1 of two candidates a prompt; raise rollout.responses or set rank.offline",
        ),
        ({"method": "dpo", "rank": {"offline_pair": False}}, "1 of two candidates a prompt"),
        ({"method": "dpo", "rollout": {"responses": 0}, "rank": {"offline_pair": False}}, "0 of two candidates"),
        (  # the base model answers for the exploration term alone
            {"method": "dpo", "rollout": SAMPLED | {"explored": "base"}, "rank": {"offline_pair": False}},
            "1 of two candidates a prompt",
        ),
        ({"rollout": {"responses": 0, "explored": "base"}, "rank": {"offline_pair": False}}, "1 of two candidates"),
        (
            {"method": "xpo", "rollout": {"explored": "base"}, "rank": {"offline_pair": False}},
            "in the first iteration the greedy responses of the policy and of the base are equal",
        ),
        ({"method": "dpo", "alpha": 0.1}, "method dpo has no exploration term, yet alpha is 0.1"),
        ({"iteration": {4: {"beta": 1}}}, "iteration.4 is set and iterations is 3"),
        ({"iterations": 1, "iteration": {2: {}}}, "iteration.2 is set and iterations is 1"),
        (
            {"iteration": {2: {"model": {"path": "a"}}}},
            "iteration.2.model: the same in every iteration; what may differ",
        ),
        ({"iteration": {2: {"seed": 1}}}, f"iteration.2.seed: .* what may differ: {', '.join(PER_ITERATION)}"),
        ({"iteration": {2: {"iteration": {1: {}}}}}, "iteration.2.iteration: the same in every iteration"),
    ],
)
def test_rules_over_several_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        RunConfig.model_validate(settings)
    assert [error["type"] for error in refused.value.errors()] == ["value_error"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo", "rollout": {"responses": 0}},
        {"alpha": 0, "rollout": {"responses": 0}},
        {"rollout": {"responses": 0, "explored": "base"}},
        {"rollout": {"explored": "base"}},
        {"rollout": SAMPLED | {"responses": 4}, "rank": {"offline_pair": False}},
        {
            "method": "xpo",
            "reference": "base",
            "rollout": SAMPLED | {"explored": "base"},
            "rank": {"offline_pair": False},
        },
        {"prepare": "python:selm_fast.tiny.prepare:make", "ranker": "python:a:b"},
        {"iterations": 5, "portions": 2},
    ],
)
def test_what_is_allowed(settings: dict[str, Any]) -> None:
    RunConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "location", "kind"),
    [
        ({"iterations": 0}, ("iterations",), "greater_than_equal"),
        ({"portions": 0}, ("portions",), "greater_than_equal"),
        ({"reference": "first"}, ("reference",), "literal_error"),
        ({"rollout": {"responses": -1}}, ("rollout", "responses"), "greater_than_equal"),
        ({"rollout": {"top_p": 0}}, ("rollout", "top_p"), "greater_than"),
        ({"rollout": {"top_p": 1.1}}, ("rollout", "top_p"), "less_than_equal"),
        ({"rollout": {"temperature": float("nan")}}, ("rollout", "temperature"), "finite_number"),
        ({"rank": {"max_skipped": 2}}, ("rank", "max_skipped"), "less_than_equal"),
        ({"rank": {"timeout_s": 0}}, ("rank", "timeout_s"), "greater_than"),
        ({"evaluation": {"prompts": 0}}, ("evaluation", "prompts"), "greater_than_equal"),
        ({"evaluate": {}}, ("evaluate",), "extra_forbidden"),
        ({"iteration": {2: {"optim": {"lr": -1}}}}, ("iteration", 2, "optim", "lr"), "greater_than"),
        ({"iteration": {3: {"beta": "x"}}}, ("iteration", 3, "beta"), "float_parsing"),
        ({"beta": 0.1, "iteration": {3: {"beta": {"x": 1}}}}, ("iteration", 3, "beta"), "float_type"),
        ({"optim": {"lr": 1}, "iteration": {3: {"optim": 1}}}, ("iteration", 3, "optim"), "model_type"),
        ({"iteration": {2: {"optm": {"lr": 1}}}}, ("iteration", 2, "optm"), "extra_forbidden"),
        ({"iteration": {2: {"optim": {"rl": 1}}}}, ("iteration", 2, "optim", "rl"), "extra_forbidden"),
        ({"iteration": {2: {"method": "dpo", "alpha": 1}}}, ("iteration", 2), "value_error"),
        ({"iteration": {2: {"rollout": {"responses": 0}}}}, ("iteration", 2), "value_error"),
    ],
)
def test_a_bad_value_is_refused_where_it_stands(settings: dict[str, Any], location: tuple[Any, ...], kind: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(settings)
    assert [(error["loc"], error["type"]) for error in refused.value.errors()] == [(location, kind)]


def test_an_iteration_below_1_is_refused() -> None:
    with pytest.raises(ValidationError, match="iteration.0"):
        RunConfig(iteration={0: {}})


def test_at_puts_an_iterations_own_settings_in_the_place_of_the_others() -> None:
    config = RunConfig(
        beta=0.1,
        optim={"lr": 5e-7, "warmup": 0.2},
        rollout=SAMPLED,
        iteration={2: {"optim": {"lr": 3e-7}, "beta": 0.2}, 3: {"rollout": {"responses": 4}, "epochs": 2}},
    )
    first, second, third = (config.at(number) for number in (1, 2, 3))
    assert (first.beta, first.optim.lr, first.optim.warmup) == (0.1, 5e-7, 0.2)
    assert (second.beta, second.optim.lr, second.optim.warmup) == (0.2, 3e-7, 0.2)
    assert (third.beta, third.optim, third.epochs) == (0.1, first.optim, 2)
    assert [c.rollout.responses for c in (first, second, third)] == [1, 1, 4] and third.rollout.temperature == 1.0
    assert all(c.iteration == {} and c.iterations == 3 for c in (first, second, third))
    plain = RunConfig(beta=0.1, optim={"lr": 5e-7, "warmup": 0.2}, rollout=SAMPLED)
    assert first == plain and first.model_fields_set == plain.model_fields_set


def test_at_takes_a_section_for_the_settings_that_were_given() -> None:
    config = RunConfig(optim={"lr": 5e-7, "warmup": 0.2}, iteration={2: {"optim": OptimConfig(lr=3e-7)}})
    assert (config.at(2).optim.lr, config.at(2).optim.warmup) == (3e-7, 0.2)


def test_dpo_in_one_iteration_drops_the_alpha_of_the_others() -> None:
    config = RunConfig(alpha=0.5, beta=0.1, iteration={1: {"method": "dpo", "rollout": {"responses": 0}}})
    assert [config.at(number).method for number in (1, 2)] == ["dpo", "selm"]
    assert [config.at(number).exploration_weight for number in (1, 2)] == [0.0, 0.05]
    assert "alpha" not in config.at(1).model_fields_set


def test_selm_in_one_iteration_of_a_dpo_run_has_its_own_alpha() -> None:
    config = RunConfig(method="dpo", beta=0.1, iteration={2: {"method": "selm", "alpha": 0.5}, 3: {"method": "xpo"}})
    assert [config.at(number).exploration_weight for number in (1, 2, 3)] == [0.0, 0.05, 1e-3]


@pytest.mark.parametrize(
    "config",
    [
        Config(output_dir=Path("runs/a"), alpha=0.2),
        RunConfig(),
        RunConfig(alpha=0.2, iteration={1: {"method": "dpo", "rollout": {"responses": 0}}, 3: {"optim": {"lr": 1e-7}}}),
    ],
)
def test_settings_come_back_from_json(config: Config) -> None:
    again = type(config).model_validate(json.loads(json.dumps(config.to_json())))
    assert again == config and again.exploration_weight == config.exploration_weight
    if isinstance(config, RunConfig) and isinstance(again, RunConfig):
        assert [again.at(number) for number in (1, 2, 3)] == [config.at(number) for number in (1, 2, 3)]


def test_a_home_folder_is_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell does it in a recipe."""
    monkeypatch.setenv("HOME", "/home/me")
    found = RunConfig.model_validate({"model": {"path": "~/m", "tokenizer": "~/t"}}).model
    assert (found.path, found.tokenizer, found.assets) == ("/home/me/m", "/home/me/t", "/home/me/m")
    other = Config.model_validate({"model": {"init": "~/c.json", "tokenizer": "a/b", "reference": "~/r"}}).model
    assert (other.init, other.tokenizer, other.reference) == (Path("/home/me/c.json"), "a/b", "/home/me/r")
