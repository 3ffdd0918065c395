"""Intervals that hold what they promise, and verdicts that say no more than they show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.exploration.claims import Claim
from benchmarks.exploration.statistics import NOT_SHOWN, Interval, at, interval, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (4, 2.7764), (5, 2.5706), (9, 2.2622), (19, 2.0930), (60, 2.0003)]
)
def test_students_t_is_that_of_published_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-4)


def test_95_of_100_intervals_hold_the_true_mean() -> None:
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(0.3, 2.0, 20).tolist()) for _ in range(4000)]
    held = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_a_mean_and_its_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 4.0])
    half = 4.3027 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-4)
    assert paired([1.0, 2.0], [0.5, 2.5]).mean == pytest.approx(0.0)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    with pytest.raises(ValueError, match="1 values and 2"):
        paired([1.0], [1.0, 2.0])


def test_what_includes_0_is_not_shown() -> None:
    """One seed, equal seeds at 0, an interval about 0, and one that ends at 0."""
    for found in (
        interval([0.4]),
        interval([0.0, 0.0]),
        interval([-1.0, 2.0]),
        interval([-2.0, 1.0]),
        Interval(1.0, 0.0, 2.0, 5),
    ):
        assert found.verdict == NOT_SHOWN
        for expected in ("higher", "lower"):
            assert Claim("", "", found, expected).verdict == NOT_SHOWN
    above, below = interval([1.0, 1.1, 0.9]), interval([-1.0, -1.1, -0.9])
    assert (above.verdict, below.verdict) == ("higher", "lower")
    assert Claim("", "", above).verdict == Claim("", "", below, "lower").verdict == "shown"
    assert Claim("", "", below).verdict == Claim("", "", above, "lower").verdict == "the opposite is shown"


def test_a_line_is_read_between_its_points_and_nowhere_else() -> None:
    xs, ys = [2.0, 0.0, 1.0], [0.0, 10.0, 30.0]
    assert at(0.25, xs, ys) == pytest.approx(15.0)
    assert at(1.5, xs, ys) == pytest.approx(15.0)
    assert at(2.0, xs, ys) == 0.0
    assert at(2.1, xs, ys) is at(-0.1, xs, ys) is None
    assert at(1.0, [1.0, 1.0], [3.0, 4.0]) == 3.0
