"""The learning rate as a function of the step, equal to transformers' schedules of the same names."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: float, schedule: str) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`.

    warmup: share of the steps that rise linearly from 0; the number is rounded up.
    schedule: "cosine" and "linear" fall to 0 at the end; "constant" stays at the peak.
    """
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * step / rising
    progress = (step - rising) / max(1, total - rising)
    return (
        peak * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    )
