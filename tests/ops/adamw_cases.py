"""What the tests of AdamW share: a state, a step, torch's own optimiser, and the random bits in Python's integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selm_fast.ops.adamw import Settings, Tensors, adamw_

DEFAULTS: dict[str, float] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
MOMENTS = (torch.float32, torch.bfloat16)


def make(numel: int, moments: torch.dtype = torch.float32, device: str = "cpu") -> Tensors:
    """Weights, a gradient and moments after some steps."""
    generator = torch.Generator().manual_seed(numel)
    param, grad, exp_avg = (torch.randn(numel, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(numel, generator=generator) * 10
    return Tensors(*(t.to(device) for t in (param, grad, exp_avg.to(moments), exp_avg_sq.to(moments))))


def copied(tensors: Tensors) -> Tensors:
    return Tensors(*(t.clone() for t in tensors))


def number(value: float, device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor(float(value), device=device)


def take(tensors: Tensors, nth: int = 3, **changes: Any) -> Tensors:
    """The tensors after one step; those that are given stay."""
    new = copied(tensors)
    adamw_(*new, step=number(nth, new.param.device), **DEFAULTS | changes)
    return new


def settings(salt: int = 0, offset: int = 0, **changes: float) -> Settings:
    return Settings(**DEFAULTS | changes, salt=salt, offset=offset)


def same_bits(a: Tensors, b: Tensors) -> bool:
    """NaN included."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def torchs_adamw(param: Tensor, numbers: dict[str, float], **kind: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [param], lr=numbers["lr"], betas=(numbers["beta1"], numbers["beta2"]), eps=numbers["eps"],
        weight_decay=numbers["weight_decay"], **kind,
    )  # fmt: skip


def bits_of(salt: int, step: int, position: int) -> int:
    """The 32 random bits of an element, by splitmix64 and lowbias32 in integers of any size."""
    wide, narrow = (1 << 64) - 1, (1 << 32) - 1
    key = (step * 0x9E3779B97F4A7C15 + salt) & wide
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & wide
    key = (key ^ key >> 27) * 0x94D049BB133111EB & wide
    key ^= key >> 31
    high = (position >> 32) * 0x9E3779B9
    x = (position ^ key ^ high) & narrow
    x = (x ^ x >> 16) * 0x7FEB352D & narrow
    x = ((x ^ x >> 15) + (key >> 32) + high) * 0x846CA68B & narrow
    return x ^ x >> 16
