"""Evaluation: loss and implicit rewards on held-out groups."""

from __future__ import annotations

from collections.abc import Callable

import torch

from selm_fast.data.packing import Plan
from selm_fast.model import Policy
from selm_fast.training.metrics import step_means
from selm_fast.training.reference_cache import ReferenceLogps
from selm_fast.training.signals import StopFlag


@torch.no_grad()
def evaluate(
    policy: Policy,
    plan: Plan,
    reference: ReferenceLogps,
    *,
    beta: float,
    exploration_weight: float,
    label_smoothing: float,
    stop: StopFlag,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, float] | None:
    """Mean of every metric of `preference_loss` over the plan's groups, as `eval_<name>`; None after a signal.

    At the first step policy and reference are one: loss ln 2, margins 0, and accuracy 0, since a tie is not a win.
    """
    device = policy.head.weight.device
    parts, index = [], 0
    for step in range(len(plan.steps)):
        for batch in plan.batches(step):
            if stop.requested:
                return None
            _, metrics = policy(
                batch.to(device),
                reference.of(batch, index).to(device),
                beta=beta,
                exploration_weight=exploration_weight,
                label_smoothing=label_smoothing,
            )
            parts.append(metrics)
            index += 1
            on_batch(batch.num_groups)
    return {f"eval_{name}": value.item() for name, value in step_means(parts).items()}
