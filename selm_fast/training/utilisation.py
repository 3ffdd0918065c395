"""How much of the hardware's speed a run turns into what it must compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selm_fast.data.packing import Plan
from selm_fast.roofline import GroupLengths, Shape, Work, useful_flops


@dataclass(frozen=True, slots=True)
class Utilisation:
    """MFU = useful FLOPs / (seconds x devices x peak), as `selm_fast.roofline` counts what is useful.

    Useful are the FLOPs of forward and backward of each distinct token: a prompt that responses share once, a response
    that serves twice once, nothing that activation checkpointing or the head computes again.
    shape: None for an architecture whose sizes are not known; MFU is then NaN.
    peak: FLOP/s of one device, of a bare matmul measured on it in the compute dtype.
    """

    shape: Shape | None
    devices: int
    peak: float

    def flops_of(self, plan: Plan, step: int) -> float:
        """Useful FLOPs of an optimiser step, all devices together."""
        if self.shape is None:
            return math.nan
        groups = (plan.groups[i] for members in plan.steps[step] for i in members)
        lengths = [GroupLengths.of(group.prompt, (group.chosen, group.rejected, group.explored)) for group in groups]
        return useful_flops(self.shape, Work.of(lengths))

    def of(self, flops: float, seconds: float) -> float:
        """MFU of so many useful FLOPs in so many seconds."""
        return flops / (seconds * self.devices * self.peak)
