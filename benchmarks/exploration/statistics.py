"""What may be said of paired seeds: means, 95% intervals, and whether a difference is shown at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

NOT_SHOWN: Final = "not shown"
Verdict = Literal["higher", "lower", "not shown"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n seeds and its 95% interval, by Student's t; of one seed the interval is unbounded."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> Verdict:
        """Whether it is above or below 0; not shown where the interval includes 0, or is 0."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else NOT_SHOWN


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval of a value that each seed has one of. Raises ValueError for none."""
    if not values:
        raise ValueError("interval() needs at least one value; got none")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired(these: Sequence[float], those: Sequence[float]) -> Interval:
    """These minus those, seed by seed. Raises ValueError where they are not equally many."""
    if len(these) != len(those):
        raise ValueError(f"paired() got {len(these)} values and {len(those)}; expected one of each seed in both")
    return interval([a - b for a, b in zip(these, those, strict=True)])


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t: four terms of Fisher and Cornish's expansion (Abramowitz and Stegun 26.7.5).

    Within 2e-4 of itself from 5 degrees of freedom on; below, from a table.
    """
    if freedom < 5:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def at(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The line through the points (xs, ys), taken in order of x, at x; None outside of them."""
    points = sorted(zip(xs, ys, strict=True))
    for (left, y_left), (right, y_right) in pairwise(points):
        if left <= x <= right:
            return y_left if left == right else y_left + (y_right - y_left) * (x - left) / (right - left)
    return None
