"""What every contestant is held against: the same computation in float64, of all tokens and of sampled gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rows of either gradient that are compared: all of them in float64 would take two GEMMs and two copies of the weight.
SAMPLED = 256
BLOCK_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Shape:
    """N tokens, hidden size D, vocabulary V."""

    N: int
    D: int
    V: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every contestant computes on: logits spread by about 2.5, upstream gradients of both signs."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    upstream: Tensor  # (N,) fp32


def make_inputs(shape: Shape, dtype: str, device: str, seed: int = 0) -> Inputs:
    """Random inputs, the same for the same arguments; made in place, for peaks of memory are measured around them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=DTYPES[dtype], device=device, generator=generator)

    return Inputs(
        hidden=normal(shape.N, shape.D),
        weight=normal(shape.V, shape.D).mul_(2.5 / math.sqrt(shape.D)),
        targets=torch.randint(shape.V, (shape.N,), device=device, generator=generator),
        upstream=torch.randn(shape.N, device=device, generator=generator),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The float64 results: every log-prob, and what the gradients of sampled rows are made of."""

    logps: Tensor  # (N,)
    rows: Tensor  # (R,) sampled tokens
    d_logits_weight: Tensor  # (R, D): d logp / d hidden of the sampled tokens
    vocab: Tensor  # (K,) sampled vocabulary rows; the first `num_targets` of them are some token's target
    num_targets: int
    residual: Tensor  # (N, K): d logp / d logit
    hidden: Tensor  # (N, D)

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        """Gradients for one upstream gradient a token, (N,): of sampled hidden and weight rows.

        Targets' rows apart from the others, which are so much smaller that an error would not show beside them.
        """
        g = upstream.double()
        weight = (self.residual * g.unsqueeze(1)).T @ self.hidden
        found = {
            "hidden": self.d_logits_weight * g[self.rows].unsqueeze(1),
            "weight of targets": weight[: self.num_targets],
            "weight of others": weight[self.num_targets :],
        }
        return {name: value for name, value in found.items() if value.numel()}

    def sampled(self, d_hidden: Tensor, d_weight: Tensor) -> dict[str, Tensor]:
        """The same rows of a contestant's gradients."""
        weight = d_weight[self.vocab]
        found = {
            "hidden": d_hidden[self.rows],
            "weight of targets": weight[: self.num_targets],
            "weight of others": weight[self.num_targets :],
        }
        return {name: value for name, value in found.items() if value.numel()}


def exact(inputs: Inputs) -> Exact:
    """Compute in float64, a block of the vocabulary at a time."""
    (num_tokens, _), vocab_size = inputs.hidden.shape, inputs.weight.shape[0]
    hidden = inputs.hidden.double()
    lse = torch.full((num_tokens,), -math.inf, dtype=torch.float64, device=hidden.device)
    block = max(1, BLOCK_BYTES // (8 * max(num_tokens, hidden.shape[1])))
    for start in range(0, vocab_size, block):
        logits = hidden @ inputs.weight[start : start + block].double().T
        lse = torch.logaddexp(lse, logits.logsumexp(1))
    target_weight = inputs.weight[inputs.targets].double()
    logps = torch.linalg.vecdot(hidden, target_weight) - lse

    generator = torch.Generator().manual_seed(1)  # on the CPU: the same sample whatever the device
    rows = torch.randperm(num_tokens, generator=generator)[:SAMPLED].to(hidden.device)
    d_logits_weight = target_weight[rows]
    for start in range(0, vocab_size, block):
        weight = inputs.weight[start : start + block].double()
        d_logits_weight -= (hidden[rows] @ weight.T - lse[rows].unsqueeze(1)).exp() @ weight

    is_target = torch.zeros(vocab_size, dtype=torch.bool)
    is_target[inputs.targets.cpu()] = True
    shuffled = torch.randperm(vocab_size, generator=generator)
    targets, others = (shuffled[mask[shuffled]][: SAMPLED // 2] for mask in (is_target, ~is_target))
    vocab = torch.cat([targets, others]).to(hidden.device)
    residual = -(hidden @ inputs.weight[vocab].double().T - lse.unsqueeze(1)).exp_()
    residual += inputs.targets.unsqueeze(1) == vocab
    return Exact(
        logps=logps,
        rows=rows,
        d_logits_weight=d_logits_weight,
        vocab=vocab,
        num_targets=targets.shape[0],
        residual=residual,
        hidden=hidden,
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the error as a share of that of the expected values; NaN where anything is NaN."""
    size = expected.square().mean().sqrt()
    return ((got.double() - expected).square().mean().sqrt() / size).item()


def scalar_error(got: Tensor, expected: Tensor, upstream: Tensor, logps: Tensor) -> float:
    """Error of a scalar made of all log-probs, in units comparable with the relative error of a log-prob.

    To first order the scalar errs by sum(|g| * error of a log-prob) at most, g its derivative by the log-probs: this
    is the error as a share of sum(|g|) * rms(logps).
    """
    scale = upstream.double().abs().sum() * logps.square().mean().sqrt()
    return ((got.double() - expected).abs() / scale).item()
