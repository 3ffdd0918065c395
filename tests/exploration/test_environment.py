"""The world: rewards, prior, annotator, and the sums over it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.exploration import environment as env
from benchmarks.exploration.environment import Environment, Settings, make_environment

from .conftest import SEED, SETTINGS


def test_responses_are_all_sequences_and_prompts_are_distinct(environment: Environment) -> None:
    assert environment.responses.shape == (16, 2)
    assert len({tuple(row) for row in environment.responses.tolist()}) == 16
    assert len({tuple(row) for row in environment.prompts.tolist()}) == 40
    assert (environment.train, environment.held_out) == (slice(0, 24), slice(24, 40))


def test_rewards_have_mean_0_and_deviation_1_for_each_prompt(environment: Environment) -> None:
    np.testing.assert_allclose(environment.rewards.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(environment.rewards.std(1), 1, atol=1e-12)


def test_rewards_have_parts_that_prompts_share() -> None:
    """A reward is a sum of one function of the response for each token of the prompt: 64 prompts, few dimensions."""
    for joint, dimensions in ((0.0, 2 * (4 - 1)), (1.0, 3 * (4 - 1) + 1)):
        world = make_environment(Settings(vocabulary=4, train_prompts=64, held_out_prompts=0, joint=joint), SEED)
        assert np.linalg.matrix_rank(world.rewards, tol=1e-8) == dimensions
        assert np.linalg.matrix_rank(world.prior - world.prior.mean(1, keepdims=True), tol=1e-8) == dimensions


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_prior_is_as_peaked_and_as_right_as_it_is_told_to_be(correlation: float) -> None:
    world = make_environment(Settings(peak=1.5, correlation=correlation), SEED)
    np.testing.assert_allclose(np.exp(world.prior).sum(1), 1, atol=1e-12)
    found = np.corrcoef(world.prior.ravel() - np.repeat(world.prior.mean(1), 64), world.rewards.ravel())[0, 1]
    assert abs(found - correlation) < 0.1
    if correlation == 0:
        np.testing.assert_allclose(world.prior.std(1), 1.5, atol=1e-12)


def test_what_only_the_annotator_knows_changes_neither_prior_nor_reward(environment: Environment) -> None:
    other = make_environment(replace(SETTINGS, noise=3.0, zero_reward=True), SEED)
    np.testing.assert_array_equal(other.rewards, environment.rewards)
    np.testing.assert_array_equal(other.prior, environment.prior)
    assert not np.array_equal(make_environment(SETTINGS, SEED + 1).rewards, environment.rewards)


@pytest.mark.parametrize("zero_reward", [False, True])
def test_the_annotator_prefers_by_bradley_and_terrys_law(environment: Environment, zero_reward: bool) -> None:
    world = replace(environment, settings=replace(SETTINGS, zero_reward=zero_reward))
    times = 4000
    first, second = world.rewards[:, 3], world.rewards[:, 11]
    wins = np.mean([(a := env.annotate(world, SEED, n))[:, 3] > a[:, 11] for n in range(times)], 0)
    expected = np.full(40, 0.5) if zero_reward else 1 / (1 + np.exp(-(first - second) / SETTINGS.noise))
    standard_error = np.sqrt(expected * (1 - expected) / times)
    assert (np.abs(wins - expected) / np.maximum(standard_error, 1e-3)).max() < 4.5


def test_no_policy_at_its_distance_has_a_higher_reward_than_the_tilted_one(environment: Environment) -> None:
    """The optimum of E[r] - KL / strength: every other policy has less of it, and it has the closed form's value."""
    strength, rng = 1.7, np.random.default_rng(0)
    best = env.tilted(environment.prior, environment.rewards, strength)

    def objective(logps: env.Floats) -> env.Floats:
        return env.expected(logps, environment.rewards) - env.divergence(logps, environment.prior) / strength

    partition = np.log(np.exp(environment.prior + strength * environment.rewards).sum(1)) / strength
    np.testing.assert_allclose(objective(best), partition, atol=1e-12)
    for scale in (1e-3, 0.1, 2.0):
        other = env.log_softmax(best + scale * rng.standard_normal(best.shape))
        assert (objective(other) < objective(best)).all()


def test_sums_of_a_policy_known_by_hand(environment: Environment) -> None:
    uniform = np.full((40, 16), -np.log(16))
    np.testing.assert_allclose(env.entropy(uniform), np.log(16))
    np.testing.assert_allclose(env.expected(uniform, environment.rewards), 0, atol=1e-12)
    sure = env.log_softmax(1e3 * np.eye(16)[np.full(40, 5)])
    np.testing.assert_allclose(env.divergence(sure, uniform), np.log(16), atol=1e-9)
    found = env.summary(environment, sure, uniform, np.full(40, 5), environment.held_out)
    rewards = environment.rewards[24:]
    assert found["reward"] == pytest.approx(rewards[:, 5].mean() / rewards.max(1).mean())
    assert found["greedy"] == pytest.approx(found["reward"])


def test_more_prompts_than_there_are_and_no_noise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"16 \+ 16 prompts.*make 27 prompts of 3"):
        Settings(vocabulary=3, train_prompts=16, held_out_prompts=16)
    with pytest.raises(ValueError, match="noise is 0"):
        Settings(noise=0)
