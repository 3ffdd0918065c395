"""From hidden states to the SELM / DPO / XPO loss in one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.backend import Backend, resolve
from selm_fast.ops.head import Head, accumulator, fold_forward, keeps
from selm_fast.ops.linear_logprob import (
    Mode,
    cast_for_autocast,
    check_head,
    check_targets,
    check_tensors,
    fake_folded,
    head_gradients,
    wants_gradient,
)
from selm_fast.ops.preference_loss import METRICS, Pairs, by_name, check_groups, divisor_of, group_losses
from selm_fast.ops.sequence_sum import check_covers, check_offsets, spread, sum_by_sequence

NO_IGNORED = -1  # every target counts here; no target that passed the check is -1


@torch.library.custom_op("selm_fast::fused_preference_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_responses: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    explored: Tensor,
    reference: Tensor,
    beta: float,
    exploration_weight: float,
    label_smoothing: float,
    divisor: int,
    softcap: float,
    scale: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss () fp64, metrics (11, G) fp64, slopes (S,) fp64 = d loss / d log-prob, and the fields of `Folded`."""
    check_targets(targets, weight.shape[0], None)
    check_covers(cu_responses, hidden.shape[0])
    if hidden.device.type == "cpu":  # elsewhere, reading them would stop the device
        _check_roles(torch.stack([chosen, rejected, explored]), reference.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        state = fold_forward(hidden, Head(weight, bias, softcap or None, scale, backend), targets, keep)
        policy = sum_by_sequence(state.logps(), cu_responses, backend)
        loss, metrics, slopes = _group_losses(backend, policy.device)(
            policy,
            reference,
            chosen,
            rejected,
            explored,
            beta=beta,
            exploration_weight=exploration_weight,
            label_smoothing=label_smoothing,
            divisor=divisor,
        )
    return loss, metrics, slopes, state.z_target, state.peak, state.total, state.kept, state.tops


def _group_losses(backend: str, device: torch.device) -> Any:
    """The function that holds the formula for a back end: Triton, or else torch."""
    if resolve(backend, device) == "triton":
        from selm_fast.ops.preference_loss_triton import group_losses as in_triton

        return in_triton
    return group_losses


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_responses: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    explored: Tensor,
    reference: Tensor,
    beta: float,
    exploration_weight: float,
    label_smoothing: float,
    divisor: int,
    softcap: float,
    scale: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, metrics, slopes = (
        reference.new_empty(shape, dtype=torch.float64)
        for shape in ((), (len(METRICS), chosen.shape[0]), reference.shape)
    )
    return loss, metrics, slopes, *fake_folded(hidden, weight, keep)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, cu_responses, *_, softcap, scale, _, backend = inputs
    ctx.save_for_backward(cu_responses, output[2], hidden, weight, bias, targets, *output[3:])
    ctx.settings = (softcap, scale, NO_IGNORED)
    ctx.backend = backend
    ctx.set_materialize_grads(False)  # zeros in the shape of `kept` would cost as much as it does


@once_differentiable
def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    cu_responses, slopes, *saved = ctx.saved_tensors
    hidden = saved[0]
    token_grads = spread((grad * slopes).to(accumulator(hidden.dtype)), cu_responses, hidden.shape[0])
    return head_gradients(ctx, token_grads, saved)


_op.register_autograd(_autograd, setup_context=_setup_context)


def fused_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_responses: Tensor,
    pairs: Pairs,
    reference_logps: Tensor,
    *,
    beta: float,
    exploration_weight: float = 0.0,
    label_smoothing: float = 0.0,
    num_groups: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mode: Mode = "auto",
    backend: Backend = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`preference_loss` of `sequence_sum` of `linear_logprob` as one autograd node.

    The loss is at hand with the last tile of the forward pass, and with it every sequence's gradient: no log-prob of a
    token and no sum waits in the graph, and on CUDA three launches lead from the tokens' log-probs to all of it.

    hidden: (N, D) fp32|bf16|fp16, the state that predicts each target.  weight: (V, D).  targets: (N,) in [0, V).
    cu_responses: (S+1,) integer; sequence s holds rows cu_responses[s] to cu_responses[s+1], from 0 to N.
    pairs: indices into the S sequences; a sequence serves one group at most, in any of its roles.
    reference_logps: (S,), taken in fp64; no gradient.
    The other settings are those of `preference_loss` and `linear_logprob`.
    Returns the loss, () fp64, differentiable in hidden, weight and bias, and the metrics of `preference_loss`.
    Raises ValueError and IndexError as these do, and ValueError for pairs (on the CPU) that share a sequence.
    """
    check_groups(pairs, beta, exploration_weight, label_smoothing, num_groups)
    check_head(softcap, logit_scale, mode, backend)
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_tensors(hidden, weight, targets, bias)
    check_offsets(cu_responses)
    others = (cu_responses, pairs.chosen, pairs.rejected, pairs.explored, reference_logps)
    if any(t.device != hidden.device for t in others):
        raise ValueError(
            f"cu_responses, pairs and reference_logps must be on the device of hidden, {hidden.device}; got "
            f"{', '.join(str(t.device) for t in others)}"
        )
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, D); got {tuple(hidden.shape)}")
    if reference_logps.shape != (cu_responses.shape[0] - 1,):
        raise ValueError(
            f"reference_logps must be (S,) = ({cu_responses.shape[0] - 1},), a number a sequence; got "
            f"{tuple(reference_logps.shape)}"
        )
    loss, metrics, *_ = _op(
        hidden,
        weight,
        bias,
        targets.long(),
        cu_responses,
        pairs.chosen,
        pairs.rejected,
        pairs.explored,
        reference_logps.detach().double(),
        beta,
        exploration_weight,
        label_smoothing,
        divisor_of(pairs, num_groups),
        softcap or 0.0,
        float(logit_scale),
        wants_gradient(hidden, weight, bias) and keeps(mode, hidden.shape[0], weight),
        backend,
    )
    return loss, by_name(metrics.detach())


def _check_roles(roles: Tensor, num_sequences: int) -> None:
    """Raise ValueError where indices lie outside the sequences or two groups share one: roles (3, G)."""
    lowest = torch.tensor([[0], [0], [-1]])
    if ((roles < lowest) | (roles >= num_sequences)).any():
        raise ValueError(
            f"pairs.chosen and .rejected must lie in [0, S) = [0, {num_sequences}), .explored there or be -1; got "
            f"{roles.amin().item()} to {roles.amax().item()}"
        )
    # Within a group a repeated index is an alias: it is written to the spare place S.
    first, second, third = roles
    second = second.masked_fill(second == first, num_sequences)
    third = third.masked_fill((third < 0) | (third == first) | (third == second), num_sequences)
    uses = torch.bincount(torch.cat([first, second, third]), minlength=num_sequences + 1)[:num_sequences]
    if (uses > 1).any():
        raise ValueError(
            f"sequence {int(uses.argmax())} serves two groups; give each group sequences of its own (preference_loss "
            "takes any)"
        )
