"""Is a contestant right? Its errors against float64, beside torch's own in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

# Allowed error as a multiple of torch's own in the same dtype. Peers may sum weight gradients in bf16 (Liger #1391
# measured up to 7 times torch's error), and are shown with their error; a wrong kernel errs far more.
OUR_FACTOR, PEER_FACTOR = 2.0, 10.0
# Error allowed where torch's own happens to be nothing, as a share of the exact values' size.
FLOOR = {"fp32": 2e-7, "bf16": 1e-5}
# Torch's own errors are far below these; above, it is not the same thing that is compared, and nothing would be seen.
CEILING = {"fp32": 1e-4, "bf16": 0.1}

Run = Callable[[], tuple[Tensor, ...]]


class NoYardstick(RuntimeError):
    """Torch's own computation cannot run here, or is not right, so that nothing can be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Something that is timed: one implementation of an op at one kind of run."""

    op: str
    name: str
    kind: str  # "no-grad" or "forward + backward"
    ours: bool
    per_token: bool  # does each token have an upstream gradient of its own?
    matmuls: int | None  # how many GEMMs of N x D x V it does; None where it is not about such
    flops: float  # what it has to do, and the bytes it has to move
    moved: float
    call: Run
    shown: Callable[[tuple[Tensor, ...]], dict[str, Tensor]]  # what of its results is checked

    @property
    def label(self) -> str:
        """Its name in a round."""
        return f"{self.op}: {self.name}, {self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A contestant that was held against float64."""

    contestant: Contestant
    errors: dict[str, float]  # relative, by output and gradient
    of_torchs: dict[str, float]  # as multiples of torch's own
    problems: list[str]  # what is wrong with it, in words; empty where it may be timed
    results: dict[str, Tensor]  # what was checked, of one of ours: later runs must give the same bits


def hold(
    contestant: Contestant,
    errors: Callable[[tuple[Tensor, ...]], dict[str, float]],
    torchs: dict[str, float],
    dtype: str,
    *,
    is_yardstick: bool,
) -> Checked:
    """Run once and compare; torchs: torch's own errors, which the yardstick adds to.

    Raises NoYardstick where the yardstick cannot run or errs above CEILING.
    """
    found: dict[str, float] = {}
    try:
        outputs = contestant.call()
        found = errors(outputs)
        results = contestant.shown(outputs) if contestant.ours else {}
    except Exception as error:  # a peer may raise anything, and so may a driver
        reason = _cannot_run(error)
        if is_yardstick:
            raise NoYardstick(f"{contestant.label}, the yardstick of every error: {reason}") from error
        return Checked(contestant=contestant, errors={}, of_torchs={}, problems=[reason], results={})
    if is_yardstick:
        torchs |= found
        if not all(error <= CEILING[dtype] for error in found.values()):
            raise NoYardstick(f"{contestant.label}, the yardstick of every error, errs itself: {found}")
    factor = OUR_FACTOR if contestant.ours else PEER_FACTOR
    return Checked(
        contestant=contestant,
        errors=found,
        of_torchs={what: error / torchs[what] if torchs[what] else inf for what, error in found.items()},
        problems=excess(found, torchs, factor, dtype),
        results=results,
    )


def unrepeated(checked: Checked) -> list[str]:
    """Run one of ours again: what has other bits than what was checked, in words."""
    contestant = checked.contestant
    try:
        again = contestant.shown(contestant.call())
    except Exception as error:
        return [_cannot_run(error)]
    return [
        f"{name} has other bits after the timed rounds than when it was checked"
        for name, value in again.items()
        if not _same_bits(value, checked.results[name])
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compared as bytes: a NaN equals itself, and the two zeros differ."""
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def _cannot_run(error: Exception) -> str:
    return f"it cannot run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def excess(errors: Mapping[str, float], torchs: Mapping[str, float], factor: float, dtype: str) -> list[str]:
    """The errors above factor * torch's own + FLOOR, in words; empty where the contestant is right. NaN is too much."""
    bounds = {what: factor * torchs[what] + FLOOR[dtype] for what in errors}
    return [
        f"error of {what} is {error:.2g}, allowed {bounds[what]:.2g}"
        for what, error in errors.items()
        if not error <= bounds[what]
    ]
