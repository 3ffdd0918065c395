"""Inputs of `linear_logprob`, the same by torch's own operations, and how errors are compared."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops import linear_logprob

TILE_ROWS, TILE_VOCAB = 16, 64
N, D, V = 75, 24, 300  # 5 row tiles and 5 vocabulary tiles, both with a ragged end

# Absolute part of the bound, as a share of the exact result's norm: both computations may be right to the last bit.
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 1e-5, torch.float16: 1e-5}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.4},
    "everything": {"with_bias": True, "softcap": 2.5, "logit_scale": 1.7},
}


def make(
    dtype: torch.dtype = torch.float32,
    *,
    with_bias: bool = False,
    rows: int = N,
    vocab: int = V,
    size: int = D,
    seed: int = 0,
    device: str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Random inputs with logits of about 2.5, three ignored rows, and upstream gradients of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::29] = -100
    return {
        "hidden": normal(rows, size).to(device, dtype),
        "weight": (normal(vocab, size) * (0.5 * (D / size) ** 0.5)).to(device, dtype),
        "bias": normal(vocab).to(device, dtype) if with_bias else None,
        "targets": targets.to(device),
        "upstream": normal(rows).to(device),
        **settings,
    }


def by_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The same as trainers compute it: logits in the inputs' dtype, log_softmax in fp32 (fp64 for fp64 inputs)."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32).log_softmax(-1)
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets < 0, 0.0)


def run(function: Any, inputs: dict[str, Any], *, high: bool = False, **extra: Any) -> dict[str, Tensor]:
    """Output and gradients of `function` for the inputs, in fp64 where `high`."""
    arguments = {name: value for name, value in inputs.items() if name != "upstream"} | extra
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        if arguments.get(name) is not None:
            value = arguments[name]
            arguments[name] = leaves[name] = (value.double() if high else value).detach().requires_grad_()
    out = function(**arguments)
    out.backward(inputs["upstream"].to(out.dtype))
    return {"logps": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def relative(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest error, both as a share of the exact values' root mean square."""
    error, size = got.double() - exact, exact.square().mean().sqrt()
    return (error.square().mean().sqrt() / size).item(), (error.abs().max() / size).item()


def assert_as_good_as_torch(
    samples: list[dict[str, Any]], dtype: torch.dtype, factor: float = 2.0, **extra: Any
) -> None:
    """Rms error of the output and of every gradient at most `factor` times that of torch in the same dtype.

    Both against fp64, over all samples together. The largest error of a sample may be twice as much again: it is that
    of one element, and where torch happens to hit it well, a mere rounding of ours is far more.
    """
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    for inputs in samples:
        exact, own, got = run(by_torch, inputs, high=True), run(by_torch, inputs), run(linear_logprob, inputs, **extra)
        assert got["logps"].dtype == torch.float32
        for name, value in exact.items():
            assert name == "logps" or got[name].dtype == dtype
            for kind, mine, torchs in zip(
                ("rms", "max"), relative(got[name], value), relative(own[name], value), strict=True
            ):
                ours[f"{name} {kind}"].append(mine)
                theirs[f"{name} {kind}"].append(torchs)
    for what in ours:
        mine, torchs = (math.sqrt(statistics.fmean(x * x for x in values[what])) for values in (ours, theirs))
        bound = factor * torchs * (1 if what.endswith("rms") else 2) + FLOOR[dtype]
        assert mine <= bound, f"{what}: {mine:.3g}, torch {torchs:.3g}"
