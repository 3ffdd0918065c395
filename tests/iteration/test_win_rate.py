"""Win rates: counts, Wilson's interval, and the rate at equal length against brute force and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from selm_fast.iteration.win_rate import length_controlled, win_rate
from selm_fast.report.intervals import mean_interval, wilson

EMPTY = [None, None, None]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def penalised(a: Any, b: Any, outcomes: np.ndarray, x: np.ndarray) -> Any:
    """Negative log likelihood plus the prior's, N(0, 2.5^2) on both coefficients, written without the module's code."""
    total = (a**2 + b**2) / (2 * 2.5**2)
    for y, z in zip(outcomes, x, strict=True):
        rate = sigmoid(a + b * z)
        total = total - y * np.log(rate) - (1 - y) * np.log(1 - rate)
    return total


def brute_force(outcomes: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Where `penalised` is least, on ever finer grids around the least point of the last one."""
    a = b = 0.0
    width = 8.0
    for _ in range(24):
        grid_a, grid_b = np.meshgrid(np.linspace(a - width, a + width, 17), np.linspace(b - width, b + width, 17))
        at = np.unravel_index(penalised(grid_a, grid_b, outcomes, x).argmin(), grid_a.shape)
        a, b, width = float(grid_a[at]), float(grid_b[at]), width / 2.5
    return a, b


def standard_error(a: float, b: float, outcomes: np.ndarray, x: np.ndarray) -> float:
    """Of `a`, from second differences of `penalised`."""
    h = 1e-4

    def f(i: int, j: int) -> float:
        return float(penalised(a + i * h, b + j * h, outcomes, x))

    aa = (f(1, 0) - 2 * f(0, 0) + f(-1, 0)) / h**2
    bb = (f(0, 1) - 2 * f(0, 0) + f(0, -1)) / h**2
    ab = (f(1, 1) - f(1, -1) - f(-1, 1) + f(-1, -1)) / (4 * h**2)
    return math.sqrt(bb / (aa * bb - ab**2))


def test_wins_ties_losses_and_what_has_no_score_are_counted_apart() -> None:
    nan = math.nan
    got = win_rate([2, 1, 0, nan, 5, nan, 3], [1, 1, 4, 1, nan, nan, 2], [5] * 7, [5] * 7)
    assert {name: got[name] for name in ("wins", "ties", "losses", "unscored")} == {
        "wins": 2, "ties": 1, "losses": 1, "unscored": 3,
    }  # fmt: skip
    assert got["plain"] == wilson(2.5, 4)
    assert got["plain"][0] == 0.625


def test_pairs_without_a_score_do_not_touch_the_length_controlled_rate() -> None:
    scores, other, long, short = [3.0, 1.0, 2.0], [1.0, 2.0, 0.0], [9, 2, 5], [4, 8, 4]
    got = win_rate([*scores, math.nan], [*other, 0.0], [*long, 1000], [*short, 1])
    assert got["length_controlled"] == win_rate(scores, other, long, short)["length_controlled"]


def test_the_two_sides_are_each_others_complement() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, (2, 40)).astype(float)
    long_a, long_b = rng.integers(1, 90, (2, 40))
    one, other = win_rate(a, b, long_a, long_b), win_rate(b, a, long_b, long_a)
    assert (one["wins"], one["losses"]) == (other["losses"], other["wins"])
    for name in ("plain", "length_controlled"):
        rate, low, high = one[name]
        np.testing.assert_allclose(other[name], [1 - rate, 1 - high, 1 - low], atol=1e-9)


@pytest.mark.parametrize(
    ("wins", "n", "expected"),
    [
        (8, 10, [0.8, 0.4901625, 0.9433178]),
        (0, 10, [0.0, 0.0, 0.2775328]),
        (10, 10, [1.0, 0.7224672, 1.0]),
        (1, 1, [1.0, 0.2065493, 1.0]),
        (50, 100, [0.5, 0.4038315, 0.5961685]),
        (0.5, 1, [0.5, 0.0546208, 0.9453792]),
    ],
)
def test_wilson(wins: float, n: int, expected: list[float]) -> None:
    got = wilson(wins, n)
    np.testing.assert_allclose(got, expected, atol=2e-7)
    for end in got[1:]:  # what defines them: the rates that a score test just does not reject
        assert (end - wins / n) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_stays_between_0_and_1() -> None:
    for n in range(1, 400):
        for wins in (0, n):
            rate, low, high = wilson(wins, n)
            assert 0 <= low <= rate <= high <= 1


@pytest.mark.parametrize("case", ["quality", "length", "always wins", "ties", "one pair", "same difference", "far"])
def test_the_length_controlled_rate_is_the_penalised_maximum(case: str) -> None:
    rng = np.random.default_rng(5)
    n = 1 if case == "one pair" else 60
    differences = rng.normal(40, 30, n).round()
    if case == "same difference":
        differences[:] = -7
    if case == "far":
        differences += 2000
    outcomes = {
        "quality": (rng.random(n) < 0.7) * 1.0,
        "length": (differences > 0) * 1.0,
        "always wins": np.ones(n),
        "ties": rng.choice([0, 0.5, 1], n),
        "one pair": np.ones(n),
        "same difference": (rng.random(n) < 0.9) * 1.0,
        "far": (rng.random(n) < 0.2) * 1.0,
    }[case]
    x = np.sign(differences) if np.ptp(differences) == 0 else np.tanh(differences / np.std(differences, ddof=1))
    a, b = brute_force(outcomes, x)
    rate, low, high = length_controlled(outcomes, differences)
    assert rate == pytest.approx(sigmoid(a), abs=1e-6)
    half = 1.959964 * standard_error(a, b, outcomes, x)
    assert [low, high] == pytest.approx([sigmoid(a - half), sigmoid(a + half)], abs=1e-5)
    assert 0 < low < rate < high < 1


def test_equal_lengths_leave_the_intercept_alone() -> None:
    outcomes = np.repeat([1.0, 0.0], [30, 10])
    rate, low, high = length_controlled(outcomes, np.zeros(40))
    a, _ = brute_force(outcomes, np.zeros(40))
    assert rate == pytest.approx(sigmoid(a), abs=1e-6)
    plain, wilson_low, wilson_high = wilson(30, 40)
    assert [rate, low, high] == pytest.approx([plain, wilson_low, wilson_high], abs=0.02)


def test_ties_alone_are_an_even_rate_at_any_length() -> None:
    rate, low, high = length_controlled(np.full(50, 0.5), np.arange(50.0))
    assert rate == 0.5
    assert low == pytest.approx(1 - high)


def test_a_difference_of_length_is_not_centred() -> None:
    """A model that wins because it is always longer is even at equal length only if zero means equal length."""
    rng = np.random.default_rng(2)
    differences = rng.normal(60, 60, 3000)
    outcomes = (rng.random(3000) < sigmoid(2.5 * np.tanh(differences / differences.std()))) * 1.0
    assert outcomes.mean() > 0.7
    rate, low, high = length_controlled(outcomes, differences)
    assert rate == pytest.approx(0.5, abs=0.05)
    assert low < 0.5 < high


def test_a_winner_by_length_alone_is_even_at_equal_length() -> None:
    rng = np.random.default_rng(8)
    tokens_b = rng.integers(50, 250, 600)
    tokens_a = tokens_b + rng.normal(40, 50, 600).round()
    got = win_rate(tokens_a, tokens_b, tokens_a, tokens_b)
    assert got["plain"][0] > 0.75
    assert got["length_controlled"][0] == pytest.approx(0.5, abs=0.1)
    assert got["length_controlled"][1] < 0.5 < got["length_controlled"][2]


def test_a_winner_by_quality_alone_wins_as_often_at_equal_length() -> None:
    rng = np.random.default_rng(9)
    tokens_a, tokens_b = rng.integers(50, 250, (2, 4000))
    got = win_rate(rng.normal(0.6, 1, 4000), rng.normal(0, 1, 4000), tokens_a, tokens_b)
    assert got["plain"][0] == pytest.approx(0.66, abs=0.03)
    assert got["length_controlled"] == pytest.approx(got["plain"], abs=0.005)


def test_newtons_steps_do_not_run_away() -> None:
    """Full steps from zero diverge on these pairs, the first of which a search found: the middle one overshoots."""
    for outcome in (0.0, 1.0):
        outcomes = np.repeat([outcome, outcome, 0.5], [6921, 3084, 84])
        differences = np.repeat([-24.0, 125.0, -111.0], [6921, 3084, 84])
        rate, low, high = length_controlled(outcomes, differences)
        assert abs(rate - outcome) < 0.01
        assert low <= rate <= high


def test_no_pair_gives_no_rate() -> None:
    got = win_rate([], [], [], [])
    assert got == {
        "wins": 0, "ties": 0, "losses": 0, "unscored": 0, "plain": EMPTY, "length_controlled": EMPTY,
    }  # fmt: skip
    assert win_rate([math.nan], [1], [1], [1])["length_controlled"] == EMPTY


def test_one_pair_gives_a_rate_and_little_certainty() -> None:
    rate, low, high = win_rate([1], [0], [30], [20])["length_controlled"]
    assert 0.5 < rate < 1
    assert low < 0.2
    assert high > 0.95


@pytest.mark.parametrize("n", [20, 300])
def test_one_side_that_always_wins_has_a_finite_high_rate(n: int) -> None:
    differences = np.random.default_rng(1).normal(0, 20, n)
    rate, low, high = length_controlled(np.ones(n), differences)
    assert 0.9 < rate < 1
    assert 0.6 < low < rate < high < 1


def test_the_same_numbers_give_the_same_bits() -> None:
    rng = np.random.default_rng(4)
    values = [rng.normal(size=200), rng.normal(size=200), rng.integers(1, 99, 200), rng.integers(1, 99, 200)]
    assert win_rate(*values) == win_rate(*values)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores of shapes \(2,\) and \(1,\)"):
        win_rate([1, 2], [1], [1, 2], [1, 2])


@pytest.mark.parametrize(("n", "truth"), [(60, 0.5), (200, 0.7)])
def test_the_plain_interval_covers_the_truth(n: int, truth: float) -> None:
    wins = np.random.default_rng(10).binomial(n, truth, 4000)
    intervals = [wilson(float(count), n) for count in wins]
    covered = np.mean([low <= truth <= high for _, low, high in intervals])
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("n", "a", "b"), [(60, 0.3, 1.0), (300, 0.8, 2.0)])
def test_the_length_controlled_interval_covers_the_truth(n: int, a: float, b: float) -> None:
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(800):
        differences = rng.normal(30, 40, n)
        x = np.tanh(differences / differences.std(ddof=1))
        _, low, high = length_controlled((rng.random(n) < sigmoid(a + b * x)) * 1.0, differences)
        covered.append(low <= sigmoid(a) <= high)
    assert 0.92 < np.mean(covered) < 0.98


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    rng = np.random.default_rng(12)
    intervals = [mean_interval(rng.gamma(4, 1, 100)) for _ in range(2000)]
    assert 0.92 < np.mean([interval["low"] <= 4 <= interval["high"] for interval in intervals]) < 0.98


def test_a_mean_with_its_interval() -> None:
    got = mean_interval([1.0, 2.0, math.nan, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert got == pytest.approx({"mean": 2.5, "low": 2.5 - half, "high": 2.5 + half}, abs=1e-5)


def test_a_mean_of_nothing_is_null() -> None:
    assert mean_interval([]) == mean_interval([math.nan]) == {"mean": None, "low": None, "high": None}
    assert mean_interval([2.0, math.nan]) == {"mean": 2.0, "low": None, "high": None}
