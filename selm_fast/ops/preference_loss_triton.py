"""The SELM / DPO / XPO loss in one Triton program: `preference_loss` says what it computes.

All of it is fp64. Settings are declared fp64 too, for Triton would take a Python float as fp32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_G = 128
NUM_WARPS = 4
NUM_METRICS = 11


@triton.jit
def _softplus_excess(x):
    """softplus(x) - ln 2, exactly 0 at 0."""
    return tl.where(x < 0.0, 0.0, x) + tl.log(0.5 + 0.5 * tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _slope_at(index, chosen, rejected, explored, by_delta, by_explored):
    """d loss / d policy[index], all roles together: aliases then write one and the same number."""
    slope = tl.where(index == chosen, by_delta, 0.0) - tl.where(index == rejected, by_delta, 0.0)
    return slope + tl.where(index == explored, by_explored, 0.0)


@triton.jit(do_not_specialize=["G"])
def _group_losses_kernel(
    policy_ptr, reference_ptr, chosen_ptr, rejected_ptr, explored_ptr, loss_ptr, metrics_ptr, slopes_ptr, G,
    beta: tl.float64, exploration_weight: tl.float64, label_smoothing: tl.float64,
    slope_of_logits: tl.float64, slope_of_explored: tl.float64, divisor: tl.float64, baseline: tl.float64,
    LOG_2: tl.constexpr, HAS_SMOOTHING: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((BLOCK_G,), tl.float64)
    for start in range(0, G, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        here = group < G
        chosen = tl.load(chosen_ptr + group, mask=here, other=0)
        rejected = tl.load(rejected_ptr + group, mask=here, other=0)
        explored = tl.load(explored_ptr + group, mask=here, other=-1)
        has_explored = explored >= 0

        chosen_logp = tl.load(policy_ptr + chosen, mask=here, other=0.0)
        rejected_logp = tl.load(policy_ptr + rejected, mask=here, other=0.0)
        explored_logp = tl.load(policy_ptr + explored, mask=has_explored, other=0.0)
        chosen_ratio = chosen_logp - tl.load(reference_ptr + chosen, mask=here, other=0.0)
        rejected_ratio = rejected_logp - tl.load(reference_ptr + rejected, mask=here, other=0.0)
        explored_ratio = explored_logp - tl.load(reference_ptr + explored, mask=has_explored, other=0.0)

        logits = beta * (chosen_ratio - rejected_ratio)
        excess = (1.0 - label_smoothing) * _softplus_excess(-logits)
        by_logits = (label_smoothing - 1.0) * _sigmoid(-logits)
        if HAS_SMOOTHING:
            excess += label_smoothing * _softplus_excess(logits)
            by_logits += label_smoothing * _sigmoid(logits)
        exploration = exploration_weight * explored_ratio
        preference = excess + LOG_2
        sums += excess + exploration  # beyond the last group all ratios are 0, and so are exactly these

        by_delta = slope_of_logits * by_logits
        by_explored = tl.full((BLOCK_G,), slope_of_explored, tl.float64)
        slope = _slope_at(chosen, chosen, rejected, explored, by_delta, by_explored)
        tl.store(slopes_ptr + chosen, slope, mask=here)
        slope = _slope_at(rejected, chosen, rejected, explored, by_delta, by_explored)
        tl.store(slopes_ptr + rejected, slope, mask=here)
        slope = _slope_at(explored, chosen, rejected, explored, by_delta, by_explored)
        tl.store(slopes_ptr + explored, slope, mask=has_explored)

        nan = float("nan")
        tl.store(metrics_ptr + 0 * G + group, preference + exploration, mask=here)
        tl.store(metrics_ptr + 1 * G + group, preference, mask=here)
        tl.store(metrics_ptr + 2 * G + group, exploration, mask=here)
        tl.store(metrics_ptr + 3 * G + group, beta * chosen_ratio, mask=here)
        tl.store(metrics_ptr + 4 * G + group, beta * rejected_ratio, mask=here)
        tl.store(metrics_ptr + 5 * G + group, tl.where(has_explored, beta * explored_ratio, nan), mask=here)
        tl.store(metrics_ptr + 6 * G + group, (logits > 0.0).to(tl.float64), mask=here)
        tl.store(metrics_ptr + 7 * G + group, logits, mask=here)
        tl.store(metrics_ptr + 8 * G + group, chosen_logp, mask=here)
        tl.store(metrics_ptr + 9 * G + group, rejected_logp, mask=here)
        tl.store(metrics_ptr + 10 * G + group, tl.where(has_explored, explored_logp, nan), mask=here)
    tl.store(loss_ptr, tl.sum(sums, 0) / divisor + baseline)


def group_losses(
    policy: Tensor,
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    explored: Tensor,
    *,
    beta: float,
    exploration_weight: float,
    label_smoothing: float,
    divisor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and gradient of G groups in two launches, one of which fills the gradient with zeros.

    policy, reference: (S,) fp64 log-probs (nats).  chosen, rejected: (G,) int64.  explored: (G,) int64, -1 for none.
    No sequence serves two groups; within a group roles may share one.
    divisor: what the sum over groups is divided by.
    Returns the loss, () fp64; the metrics of `preference_loss` in its order, (11, G) fp64; d loss / d policy, (S,)
    fp64.
    """
    assert policy.dtype == reference.dtype == torch.float64
    num_groups = chosen.shape[0]
    loss = policy.new_empty(())
    metrics = policy.new_empty((NUM_METRICS, num_groups))
    slopes = torch.zeros_like(policy, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(policy):
        _group_losses_kernel[(1,)](
            policy.contiguous(), reference.contiguous(),
            chosen.contiguous(), rejected.contiguous(), explored.contiguous(), loss, metrics, slopes, num_groups,
            float(beta), float(exploration_weight), float(label_smoothing),
            beta / divisor, exploration_weight / divisor, float(divisor), math.log(2) * (num_groups / divisor),
            LOG_2=math.log(2), HAS_SMOOTHING=label_smoothing != 0, BLOCK_G=BLOCK_G, num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss, metrics, slopes
