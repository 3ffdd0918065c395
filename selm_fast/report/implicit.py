"""Implicit rewards of policies on held-out rows, and how those of two policies differ (SELM, arXiv 2405.19332, Fig. 4).

r(x, y) = beta * [log pi(y|x) - log pi_base(y|x)]        pi_base: the model that the run began with
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selm_fast.report.contents import Interval
from selm_fast.report.intervals import mean_interval, wilson

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImplicitRewards:
    """Implicit rewards under the policy of one run.

    model, base: what they are, in words.  base_digest: of the base's weights.
    rows: (R,) numbers of the rows of the data that were used, counted from 0.  chosen, rejected: (R,), of each row.
    rows_read, skipped: of the data, and how many of them were left out, by reason.
    """

    model: str
    base: str
    base_digest: str
    beta: float
    rows: Rows
    chosen: Floats
    rejected: Floats
    rows_read: int
    skipped: dict[str, int]

    @property
    def margins(self) -> Floats:
        """(R,) the reward of chosen above that of rejected."""
        return self.chosen - self.rejected

    @property
    def accuracy(self) -> Interval:
        """The share of rows whose chosen response has the higher reward; a tie is no win."""
        share, low, high = wilson(int((self.margins > 0).sum()), len(self.rows))
        return Interval(mean=share, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Rewards under one policy less those under another, row by row.

    rows: numbers of the rows that both used.  chosen, rejected: (R,).  only_this, only_other: rows that one used alone.
    """

    rows: Rows
    chosen: Floats
    rejected: Floats
    only_this: int
    only_other: int

    @property
    def margins(self) -> Floats:
        """(R,) how much more one policy prefers chosen to rejected than the other does."""
        return self.chosen - self.rejected


def rewards(policy: Floats, base: Floats, beta: float) -> Floats:
    """(R,) implicit rewards. policy, base: (R,) summed log-probs (nats) of the same responses."""
    return beta * (policy - base)


def difference(this: ImplicitRewards, other: ImplicitRewards) -> Difference:
    """This policy's rewards less the other's, over the rows of the data that both used.

    Rows are matched by their numbers: tokens may differ, since each run has its own tokenizer and lengths.
    """
    rows, here, there = np.intersect1d(this.rows, other.rows, assume_unique=True, return_indices=True)
    return Difference(
        rows=rows,
        chosen=this.chosen[here] - other.chosen[there],
        rejected=this.rejected[here] - other.rejected[there],
        only_this=len(this.rows) - len(rows),
        only_other=len(other.rows) - len(rows),
    )


def average(values: Floats) -> Interval:
    """Mean with its 95% interval."""
    return Interval.model_validate(mean_interval(values))


def is_shown(mean: Interval) -> bool:
    """Whether the interval of a mean difference leaves out zero: else these rows show no difference."""
    return mean.low is not None and mean.high is not None and (mean.low > 0 or mean.high < 0)
