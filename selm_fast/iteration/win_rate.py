"""How often one model's responses beat another's, as such and at equal length, with 95% intervals."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from selm_fast.report.intervals import Estimate, Z, wilson

PRIOR_SD: Final = 2.5
_STEPS: Final = 100

Floats = npt.NDArray[np.float64]


def win_rate(
    scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, tokens_a: npt.ArrayLike, tokens_b: npt.ArrayLike
) -> dict[str, Any]:
    """Win rate of a over b on the same prompts, a tie counting one half.

    scores, tokens: (n,), of each response; pairs with a NaN score are left out and counted as `unscored`.
    -> wins, ties, losses, unscored; plain and length_controlled: [rate, low, high].
    """
    a, b, long_a, long_b = (np.asarray(values, np.float64) for values in (scores_a, scores_b, tokens_a, tokens_b))
    if a.ndim != 1 or not a.shape == b.shape == long_a.shape == long_b.shape:
        raise ValueError(
            f"scores of shapes {a.shape} and {b.shape} and tokens of shapes {long_a.shape} and {long_b.shape}; "
            "expected one of each for every pair"
        )
    scored = ~(np.isnan(a) | np.isnan(b))
    a, b = a[scored], b[scored]
    outcomes = np.where(a == b, 0.5, a > b)
    return {
        "wins": int(np.sum(a > b)),
        "ties": int(np.sum(a == b)),
        "losses": int(np.sum(a < b)),
        "unscored": int(np.sum(~scored)),
        "plain": wilson(float(outcomes.sum()), len(outcomes)),
        "length_controlled": length_controlled(outcomes, (long_a - long_b)[scored]),
    }


def length_controlled(outcomes: Floats, differences: Floats) -> Estimate:
    """Win rate that responses of equal length would have, as in AlpacaEval 2 (arXiv 2404.04475, section 3).

    outcomes: (n,) 1 win, 0.5 tie, 0 loss; differences: (n,) of length, in tokens.

    Logistic regression of the outcome, logit = a + b tanh(d / sd(d)) with d not centred, so that the rate at equal
    length is sigmoid(a). AlpacaEval's term of an instruction's difficulty is left out: it comes from many models'
    results. The interval is that of a's standard error, from the inverse Hessian, taken through the sigmoid.

    Prior: a and b are independent normals of mean 0 and standard deviation 2.5. It keeps both finite where one side
    always wins, or always wins when longer, and says as much as 0.64 of an even pair (0.25 of information each, against
    1 / 2.5^2); so it matters where pairs, or losses, are a handful. Where all differences are equal, d / sd(d)
    is taken for its limit, -1, 0 or 1 after tanh: the data then do not tell a from b, and the interval is wide.
    """
    if len(outcomes) == 0:
        return [None, None, None]
    design = np.stack([np.ones_like(outcomes), np.tanh(_standardised(differences))], axis=1)
    logit, variance = _fit_intercept(design, outcomes)
    half = Z * math.sqrt(variance)
    return list(_sigmoid(np.array([logit, logit - half, logit + half])).tolist())


def _standardised(differences: Floats) -> Floats:
    if np.ptp(differences) == 0:
        return np.copysign(np.where(differences == 0, 0.0, np.inf), differences)
    return differences / float(differences.std(ddof=1))


def _fit_intercept(design: Floats, outcomes: Floats) -> tuple[float, float]:
    """First coefficient of the penalised logistic regression and its variance (inverse Hessian), by Newton's method.

    The objective is strictly convex, so that steps halved until it falls lead to its one minimum.
    """
    prior = np.eye(design.shape[1]) / PRIOR_SD**2
    coefficients = np.zeros(design.shape[1])

    def objective(point: Floats) -> float:
        logits = design @ point
        return float(np.sum(np.logaddexp(0, logits) - outcomes * logits) + point @ prior @ point / 2)

    for _ in range(_STEPS):
        rates = _sigmoid(design @ coefficients)
        gradient = design.T @ (rates - outcomes) + prior @ coefficients
        hessian = design.T @ (design * (rates * (1 - rates))[:, None]) + prior
        step = np.linalg.solve(hessian, gradient)
        if np.abs(step).max() < 1e-9:
            break
        while objective(coefficients - step) > objective(coefficients) and np.abs(step).max() > 1e-9:
            step /= 2
        coefficients = coefficients - step
    return float(coefficients[0]), float(np.linalg.inv(hessian)[0, 0])


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))
