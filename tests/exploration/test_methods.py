"""Who is asked about what: candidates, pairs, explored responses, queries."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.exploration import environment as env
from benchmarks.exploration.environment import Environment
from benchmarks.exploration.methods import METHODS, ask, greedy, ids_of, offline_pairs, sample

from .conftest import SEED


@pytest.fixture(scope="module")
def base(environment: Environment) -> env.Floats:
    return environment.prior


def test_samples_follow_the_distribution(base: env.Floats) -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(16)
    for _ in range(4000):
        counts[sample(base[:1], rng)[0]] += 1
    odds = np.exp(base[0])
    assert (np.abs(counts / 4000 - odds) < 4.5 * np.sqrt(odds * (1 - odds) / 4000) + 1e-3).all()


def test_an_offline_pair_is_two_different_draws_from_the_base_model(base: env.Floats) -> None:
    pairs = np.array([offline_pairs(base, seed) for seed in range(800)])
    assert (pairs[..., 0] != pairs[..., 1]).all()
    odds = np.exp(base[0])
    first = np.bincount(pairs[:, 0, 0], minlength=16) / 800
    assert (np.abs(first - odds) < 4.5 * np.sqrt(odds * (1 - odds) / 800) + 2e-3).all()
    np.testing.assert_array_equal(offline_pairs(base, SEED), offline_pairs(base, SEED))


@pytest.mark.parametrize("name", list(METHODS))
def test_the_best_candidate_is_chosen_and_the_worst_rejected(
    name: str, environment: Environment, base: env.Floats
) -> None:
    previous = env.tilted(base, environment.rewards, 0.5)
    asked = ask(METHODS[name], environment, previous, base, seed=SEED, iteration=3, with_explored=True)
    likes = env.annotate(environment, SEED, 3)
    expected = {}
    queries = 0
    for prompt, numbers in enumerate(asked.candidates):
        queries += {1: 0, 2: 1, 3: 3}[len(set(numbers))]
        best, worst = max(numbers, key=lambda n: likes[prompt, n]), min(numbers, key=lambda n: likes[prompt, n])
        if best != worst:
            expected[prompt] = (ids_of(environment, best), ids_of(environment, worst))
    assert {group.row_id: (group.chosen, group.rejected) for group in asked.groups} == expected
    assert asked.queries == queries
    for group in asked.groups:
        assert group.prompt == environment.prompts[group.row_id or 0].tolist()


def test_methods_ask_about_what_they_should(environment: Environment, base: env.Floats) -> None:
    previous = env.tilted(base, environment.rewards, 0.5)
    asked = {
        name: ask(method, environment, previous, base, seed=SEED, iteration=0, with_explored=True)
        for name, method in METHODS.items()
    }
    likeliest, pairs = greedy(previous, environment), offline_pairs(base, SEED)
    three = [[int(likeliest[row]), *map(int, pairs[row])] for row in range(24)]
    for name in ("dpo", "selm", "selm sampled", "selm exact", "selm wrong sign"):
        assert asked[name].candidates == three, name
        assert [group.chosen for group in asked[name].groups] == [group.chosen for group in asked["dpo"].groups]
    explored = {name: [group.explored for group in found.groups] for name, found in asked.items()}
    rows = [group.row_id or 0 for group in asked["dpo"].groups]
    assert explored["selm"] == [ids_of(environment, int(likeliest[row])) for row in rows]
    assert explored["selm wrong sign"] == explored["selm"]
    assert set(map(str, explored["dpo"])) == set(map(str, explored["selm exact"])) == {"None"}
    assert explored["selm sampled"] != explored["selm"]
    # XPO: the policy's sample and the base model's, which is the explored one.
    xpo = asked["xpo"]
    assert all(len(numbers) == 2 for numbers in xpo.candidates)
    assert [numbers[0] for numbers in xpo.candidates] != likeliest[:24].tolist()
    assert explored["selm sampled"] == [ids_of(environment, xpo.candidates[row][0]) for row in rows]
    for group in xpo.groups:
        assert group.explored == ids_of(environment, xpo.candidates[group.row_id or 0][1])
    again = ask(METHODS["xpo"], environment, base, base, seed=SEED, iteration=0, with_explored=True)
    assert [numbers[1] for numbers in again.candidates] == [numbers[1] for numbers in xpo.candidates]


def test_without_a_term_there_is_no_explored_response(environment: Environment, base: env.Floats) -> None:
    for method in METHODS.values():
        asked = ask(method, environment, base, base, seed=SEED, iteration=0, with_explored=False)
        assert all(group.explored is None for group in asked.groups)


def test_without_the_offline_pair_two_samples_of_the_policy_are_ranked(
    environment: Environment, base: env.Floats
) -> None:
    sure = env.log_softmax(1e3 * np.eye(16)[np.full(40, 5)])
    asked = ask(METHODS["selm"], environment, sure, base, seed=SEED, iteration=0, with_explored=True, offline=False)
    assert asked.candidates == [[5, 5, 5]] * 24
    assert (asked.groups, asked.queries, asked.own) == ([], 0, 3)
