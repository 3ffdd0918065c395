"""Evaluation: loss and implicit rewards on held-out groups."""

from __future__ import annotations

from collections.abc import Callable

import torch

from selm_fast.data.packing import Plan
from selm_fast.model import Policy
from selm_fast.ops.preference_loss import METRICS
from selm_fast.training.metrics import mean
from selm_fast.training.reference_cache import ReferenceLogps
from selm_fast.training.signals import StopFlag
from selm_fast.training.world import World


@torch.no_grad()
def evaluate(
    policy: Policy,
    plan: Plan,
    reference: ReferenceLogps,
    *,
    beta: float,
    exploration_weight: float,
    label_smoothing: float,
    world: World,
    stop: StopFlag,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, float] | None:
    """Mean of every metric of `preference_loss` over the plan's groups, as `eval_<name>`; None after a signal.

    At the first step policy and reference are one: loss ln 2, margins 0, and accuracy 0, since a tie is not a win.
    """
    parts = []
    for step in range(len(plan.steps)):
        first = plan.first_of(step) + world.rank
        for nth, batch in enumerate(plan.batches(step, world.rank)):
            if world.any(stop.requested):
                return None
            _, metrics = policy(
                batch.to(world.device),
                reference.of(batch, first + nth * world.size).to(world.device),
                beta=beta,
                exploration_weight=exploration_weight,
                label_smoothing=label_smoothing,
            )
            parts.append(torch.stack(tuple(metrics.values())))
            on_batch(plan.round_groups(step, nth))
    own = torch.cat(parts, dim=1).cpu()
    every = [values.view(len(METRICS), len(values) // len(METRICS)) for values in world.gather(own.flatten())]
    groups = torch.cat(every, dim=1)
    return {f"eval_{name}": mean([row]).item() for name, row in zip(METRICS, groups, strict=True)}
