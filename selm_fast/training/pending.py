"""Metrics of steps that are done, left where they were computed until they are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops.preference_loss import METRICS
from selm_fast.training.metrics import mean
from selm_fast.training.world import World


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What the host knows of a step without asking the device; counts are of all processes.

    useful_flops: as in `selm_fast.roofline`.
    """

    step: int
    epoch: float
    learning_rate: float
    num_tokens: int
    step_tokens: int
    step_groups: int
    useful_flops: float
    row_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step with its metrics, on the host."""

    record: StepRecord
    metrics: dict[str, float]

    @property
    def is_bad(self) -> bool:
        """Whether its gradients, or its loss, were not finite; the device found so too, and did not apply it."""
        return not math.isfinite(self.metrics["grad_norm"])

    def logged(self, bad_steps: int) -> dict[str, Any]:
        """What is written of it. bad_steps: not applied so far."""
        record = self.record
        return {
            "step": record.step,
            "epoch": record.epoch,
            **self.metrics,
            "learning_rate": record.learning_rate,
            "num_tokens": record.num_tokens,
            "bad_steps": bad_steps,
        }


@dataclass(slots=True)
class Pending:
    """Steps whose metrics nobody has looked at."""

    steps: list[tuple[StepRecord, Tensor, Tensor]] = field(default_factory=list)

    def add(self, record: StepRecord, metrics: Tensor, grad_norm: Tensor) -> None:
        """metrics: (11, G) fp64, of this process's groups.  grad_norm: () fp32, the same in every process."""
        self.steps.append((record, metrics, grad_norm))

    def take(self, world: World, memory_gib: float) -> tuple[list[StepLine], float]:
        """Bring all of it to the host and together, in one copy and one exchange.

        memory_gib: peak of this process. -> the steps, and the peak of the process that has the highest.
        """
        records = [record for record, _, _ in self.steps]
        norms = torch.stack([norm.double() for _, _, norm in self.steps])
        own = torch.cat([norms, *(metrics.flatten() for _, metrics, _ in self.steps)]).cpu()
        head = [memory_gib, *(metrics.shape[1] for _, metrics, _ in self.steps)]
        self.steps = []
        sent = world.gather(torch.cat([torch.tensor(head, dtype=torch.float64), own]))
        parts = [_by_step(values[1:], len(records)) for values in sent]
        lines = []
        for nth, record in enumerate(records):
            groups = torch.cat([part[nth] for part in parts], dim=1)
            found = {name: mean([row]).item() for name, row in zip(METRICS, groups, strict=True)}
            lines.append(StepLine(record, found | {"grad_norm": own[nth].item()}))
        return lines, max(values[0].item() for values in sent)


def _by_step(values: Tensor, steps: int) -> list[Tensor]:
    """What one process sent: its groups in each step, norms, and (11, G) of each step, flat -> the last, by step."""
    counts, rest = values[:steps].long().tolist(), values[2 * steps :]
    flat = rest.split([len(METRICS) * count for count in counts])
    return [part.view(len(METRICS), count) for part, count in zip(flat, counts, strict=True)]
