"""Runs through the trainer: DPO is alpha 0 to the bit, the same run twice has the same bits, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.exploration import experiment
from benchmarks.exploration.control import ControlPolicy
from benchmarks.exploration.environment import Environment, Floats
from benchmarks.exploration.experiment import BINS, Outcome, Training, model_of, run, settings_of, train_iteration
from benchmarks.exploration.methods import METHODS, ask, greedy, offline_pairs
from benchmarks.exploration.tiny_llama import distribution

from .conftest import SEED, TRAINING


def check_equal_bits(found: Outcome, expected: Outcome) -> None:
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    assert (found.train, found.held_out, found.implicit) == (expected.train, expected.held_out, expected.implicit)


@pytest.mark.parametrize("name", ["selm", "selm sampled", "selm exact", "selm wrong sign"])
def test_alpha_0_is_dpo_to_the_bit(
    name: str, environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> None:
    found = run(name, environment, base_weights, alpha=0.0, lr=4e-3, seed=SEED, training=TRAINING)
    check_equal_bits(found, trained["dpo"])


def test_a_run_is_repeated_to_the_bit_and_its_term_and_base_count(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> None:
    again = run("selm", environment, base_weights, alpha=0.3, lr=4e-3, seed=SEED, training=TRAINING)
    check_equal_bits(again, trained["selm"])
    assert trained["selm"].train["reward"] != trained["dpo"].train["reward"]
    assert trained["selm"].train["kl"][0] == 0 < trained["selm"].train["kl"][-1]


def test_what_is_measured_is_of_the_last_policy(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> None:
    outcome = trained["selm"]
    base, last = (distribution(model_of(environment, w), environment) for w in (base_weights, outcome.weights))
    rewards = environment.rewards[24:]
    assert outcome.held_out["reward"][-1] == pytest.approx(
        (np.exp(last[24:]) * rewards).sum(1).mean() / rewards.max(1).mean()
    )
    assert len(outcome.queries) == len(outcome.histograms) == TRAINING.iterations + 1
    assert [sum(counts) for counts in outcome.histograms] == [16] * 3
    middle = (BINS[:-1] + BINS[1:]) / 2
    mean = np.dot(middle, outcome.histograms[-1]) / 16
    assert mean == pytest.approx(outcome.held_out["greedy"][-1], abs=(BINS[1] - BINS[0]) / 2)
    pairs = offline_pairs(base, SEED)[24:]
    both = np.array([outcome.implicit["chosen"], outcome.implicit["rejected"]]).sum(0)
    ratio = np.take_along_axis(last[24:] - base[24:], pairs, 1).sum(1)
    np.testing.assert_allclose(both, TRAINING.beta * ratio, atol=1e-9)


def test_rollouts_and_the_best_responses_seen_are_counted(
    environment: Environment, base_weights: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[list[int]]] = []

    def spy(*arguments: object, **settings: object) -> object:
        found = ask(*arguments, **settings)  # type: ignore[arg-type]
        asked.append(found.candidates)
        return found

    monkeypatch.setattr(experiment, "ask", spy)
    outcome = run("selm", environment, base_weights, alpha=0.3, lr=8e-3, seed=SEED, training=TRAINING)
    own = np.mean([len({first[row][0], second[row][0]}) for row in range(24) for first, second in [asked]])
    best = environment.rewards[:24].argmax(1)
    seen = np.mean([best[row] in asked[0][row] + asked[1][row] for row in range(24)])
    assert outcome.rollouts == [0, 1, pytest.approx(own)]
    pairs = [sum(len(set(row)) * (len(set(row)) - 1) // 2 for row in candidates) / 24 for candidates in asked]
    assert outcome.queries == [0, pytest.approx(pairs[0]), pytest.approx(sum(pairs))]
    assert outcome.best_seen[0] == 0
    assert outcome.best_seen[-1] == pytest.approx(seen)
    base = distribution(model_of(environment, base_weights), environment)
    assert [row[0] for row in asked[0]] == greedy(base, environment)[:24].tolist()


def test_the_reference_is_xpos_base_model_and_selms_previous_iterate(
    environment: Environment, base_weights: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Floats]] = {"xpo": [], "selm": []}
    for name, found in seen.items():

        def spy(policy: ControlPolicy, reference: ControlPolicy, *rest: Any, into: list[Floats] = found) -> None:
            into.append(distribution(reference.model, environment))
            assert np.array_equal(policy.previous.numpy(), distribution(policy.model, environment))
            train_iteration(policy, reference, *rest)

        monkeypatch.setattr(experiment, "train_iteration", spy)
        run(name, environment, base_weights, alpha=0.01, lr=4e-3, seed=SEED, training=TRAINING)
    assert np.array_equal(*seen["xpo"])
    assert not np.array_equal(*seen["selm"])


def test_a_reference_that_is_not_the_policy_is_found_out_at_the_first_step(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, other = model_of(environment, base_weights), model_of(environment, trained["dpo"].weights)
    base = distribution(model, environment)
    policy = ControlPolicy(model, METHODS["dpo"], environment, base)
    asked = ask(policy.method, environment, base, base, seed=SEED, iteration=0, with_explored=False)
    wrong = ControlPolicy(other, policy.method, environment, base)
    fill = experiment.ReferenceCache.fill
    monkeypatch.setattr(
        experiment.ReferenceCache, "fill", lambda cache, plan, _, **rest: fill(cache, plan, wrong, **rest)
    )
    config = settings_of(policy.method, 0.0, 1e-3, SEED, TRAINING)
    with pytest.raises(RuntimeError, match="expected ln 2 to the bit"):
        train_iteration(policy, policy, config, asked.groups, 0)


def test_labels_without_meaning_do_not_depend_on_the_reward(
    environment: Environment, base_weights: Mapping[str, Tensor]
) -> None:
    """The same coins are tossed whatever the reward is: the policies are equal to the bit."""
    tosses = replace(environment, settings=replace(environment.settings, zero_reward=True))
    other = replace(tosses, rewards=-environment.rewards[:, ::-1])
    training = Training(iterations=1, groups=8)
    found = [run("selm", w, base_weights, alpha=0.3, lr=4e-3, seed=SEED, training=training) for w in (tosses, other)]
    for name, tensor in found[0].weights.items():
        assert torch.equal(found[1].weights[name], tensor), name


def test_the_trainers_settings_are_the_methods_own() -> None:
    weights = {
        name: settings_of(method, 0.3, 1e-3, 0, Training(beta=0.2)).exploration_weight
        for name, method in METHODS.items()
    }
    assert weights.pop("dpo") == 0
    assert weights.pop("xpo") == 0.3
    assert all(weight == pytest.approx(0.06) for weight in weights.values())
    assert len(weights) == 4
