"""The SELM / DPO / XPO loss: the one place that holds the formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Which of the S sequences of a batch play which part in its G groups; aliases are allowed and free.

    chosen, rejected: (G,) int64.  explored: (G,) int64, -1 where the group has no explored response.
    """

    chosen: Tensor
    rejected: Tensor
    explored: Tensor

    def to(self, device: torch.device | str) -> Pairs:
        """The same indices on another device."""
        return Pairs(
            chosen=self.chosen.to(device), rejected=self.rejected.to(device), explored=self.explored.to(device)
        )


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    pairs: Pairs,
    *,
    beta: float,
    exploration_weight: float = 0.0,
    label_smoothing: float = 0.0,
    num_groups: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of G preference groups: DPO (arXiv 2305.18290, Eq. 7) plus the optimism term of SELM (arXiv 2405.19332,
    Eq. 4.2).

        ratio(y) = policy_logps[y] - reference_logps[y]                                  (nats)
        Delta    = ratio(chosen) - ratio(rejected)
        loss     = -(1 - s) logsigmoid(beta Delta) - s logsigmoid(-beta Delta) + c ratio(explored)

    policy_logps, reference_logps: (S,) log-prob of each sequence; the reference takes no gradient.
    exploration_weight: c; alpha * beta in SELM, alpha in XPO (arXiv 2405.21046), 0 in DPO.
    label_smoothing: s, the share of labels taken as flipped.
    num_groups: what the sum over groups is divided by: the number of groups of the whole optimiser step (default: G).
    Returns the loss, () fp64, computed in fp64, and its metrics, each (G,) fp64 and detached: `loss`,
    `loss/preference`, `loss/exploration`, `rewards/{chosen,rejected,explored,accuracies,margins}`,
    `logps/{chosen,rejected,explored}`; NaN in `*/explored` where a group has no explored response. An implicit reward
    is beta * ratio. Equal pairs have accuracy 0, as in TRL.
    Raises ValueError for shapes or settings that do not fit.
    """
    check_groups(pairs, beta, exploration_weight, label_smoothing, num_groups)
    if policy_logps.dim() != 1 or policy_logps.shape != reference_logps.shape:
        raise ValueError(
            "policy_logps and reference_logps must both be (S,), a number a sequence; "
            f"got {tuple(policy_logps.shape)} and {tuple(reference_logps.shape)}"
        )
    loss, metrics = _losses(
        policy_logps.double(),
        reference_logps.detach().double(),
        pairs,
        beta,
        exploration_weight,
        label_smoothing,
        divisor_of(pairs, num_groups),
    )
    return loss, by_name(torch.stack([value.detach() for value in metrics]))


METRICS = (
    "loss",
    "loss/preference",
    "loss/exploration",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/explored",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logps/explored",
)


def by_name(metrics: Tensor) -> dict[str, Tensor]:
    """(11, G) -> each metric by its name."""
    return dict(zip(METRICS, metrics.unbind(), strict=True))


def divisor_of(pairs: Pairs, num_groups: int | None) -> int:
    """What a sum over groups is divided by; 1 for no groups at all."""
    return num_groups or pairs.chosen.shape[0] or 1


def _losses(
    policy: Tensor, reference: Tensor, pairs: Pairs, beta: float, c: float, s: float, divisor: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The formula: (S,) fp64 twice -> the loss, differentiable, and the metrics in the order of METRICS."""
    ratio = policy - reference
    logits = beta * (ratio[pairs.chosen] - ratio[pairs.rejected])
    # -logsigmoid(x) = softplus(-x). ln 2 is taken out of each group and put back once: G times ln 2, summed and divided
    # by G, is not ln 2 for every G, and step 0 must be.
    excess = (1 - s) * _softplus_excess(-logits)
    if s:
        excess = excess + s * _softplus_excess(logits)
    has_explored = pairs.explored >= 0
    explored = pairs.explored.clamp(min=0)
    exploration = c * torch.where(has_explored, ratio[explored], 0.0)
    loss = (excess + exploration).sum() / divisor + math.log(2) * (excess.shape[0] / divisor)
    rewards = beta * ratio
    preference = excess + math.log(2)
    nan = torch.full_like(logits, torch.nan)
    metrics = (
        preference + exploration,
        preference,
        exploration,
        rewards[pairs.chosen],
        rewards[pairs.rejected],
        torch.where(has_explored, rewards[explored], nan),
        (logits > 0).double(),
        logits,
        policy[pairs.chosen],
        policy[pairs.rejected],
        torch.where(has_explored, policy[explored], nan),
    )
    return loss, metrics


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
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`preference_loss` with its derivative, in one go and without autograd: the reference of the fused kernel.

    policy, reference: (S,) fp64.  chosen, rejected, explored: (G,), the fields of `Pairs`.
    Returns the loss, () fp64; the metrics, (11, G) fp64 in the order of METRICS; d loss / d policy, (S,) fp64.
    """
    pairs = Pairs(chosen=chosen, rejected=rejected, explored=explored)
    loss, metrics = _losses(policy, reference, pairs, beta, exploration_weight, label_smoothing, divisor)
    logits = metrics[METRICS.index("rewards/margins")]
    pull = (1 - label_smoothing) * torch.sigmoid(-logits) - label_smoothing * torch.sigmoid(logits)
    pull *= beta / divisor
    push = torch.where(explored >= 0, exploration_weight / divisor, 0.0).double()
    slopes = torch.zeros_like(policy)
    slopes.index_add_(0, chosen, -pull).index_add_(0, rejected, pull)
    slopes.index_add_(0, explored.clamp(min=0), push)
    return loss, torch.stack(metrics), slopes


def _softplus_excess(x: Tensor) -> Tensor:
    """softplus(x) - ln 2, exactly 0 at 0."""
    return softplus(x, threshold=700.0) - math.log(2)


def check_groups(
    pairs: Pairs, beta: float, exploration_weight: float, label_smoothing: float, num_groups: int | None
) -> None:
    """Raise ValueError for indices or settings that do not fit."""
    if not pairs.chosen.shape == pairs.rejected.shape == pairs.explored.shape or pairs.chosen.dim() != 1:
        raise ValueError(
            "pairs.chosen, .rejected and .explored must all be (G,); got "
            f"{tuple(pairs.chosen.shape)}, {tuple(pairs.rejected.shape)} and {tuple(pairs.explored.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be finite and > 0; got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing}")
    if not -math.inf < exploration_weight < math.inf:  # torch.compile does not follow math.isfinite
        raise ValueError(f"exploration_weight must be finite; got {exploration_weight}")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be at least 1; got {num_groups}")
