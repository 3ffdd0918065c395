"""95% intervals of means and shares: the same in evaluations and in reports."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Z: Final = 1.959963984540054  # 97.5% quantile of the standard normal distribution

Estimate = list[float | None]  # estimate, low, high; null where there is nothing to estimate from


def wilson(wins: float, n: int) -> Estimate:
    """Share of wins with Wilson's 95% score interval; a half win may be among them."""
    if n == 0:
        return [None, None, None]
    rate = wins / n
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return [rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))]  # but for rounding, as is


def mean_interval(values: npt.ArrayLike) -> dict[str, float | None]:
    """Mean of the values that are not NaN with its normal 95% interval; null where there are too few to tell."""
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    if len(array) == 0:
        return {"mean": None, "low": None, "high": None}
    mean = float(array.mean())
    if len(array) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = Z * float(array.std(ddof=1)) / math.sqrt(len(array))
    return {"mean": mean, "low": mean - half, "high": mean + half}
