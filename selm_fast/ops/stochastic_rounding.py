"""Stochastic rounding of fp32 to bf16: up or down by chance, so that the expected result is the number itself.

The random bits are a hash of salt, step and position alone: they are the same on any device, for any number of ranks,
and when a step is repeated. `adamw_triton.py` holds the same integer arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

BF16_MAX = torch.finfo(torch.bfloat16).max


def step_key(step: Tensor, salt: int) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) of step and salt, 64 random bits: () -> () int64, which wraps."""
    x = step.to(torch.int64) * -7046029254386353131 + salt  # 0x9E3779B97F4A7C15, the golden ratio of 2^64
    x = (x ^ _shift64(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift64(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift64(x, 31)


def random_bits(key: Tensor, start: int, indices: Tensor) -> Tensor:
    """32 random bits for each position, start + index.

    The 32-bit hash "lowbias32" (Wellons 2018, github.com/skeeto/hash-prospector) of the position's low half; half of
    the key is mixed in before its first multiplication, the other half before the second, and the position's high half
    before both: before the second alone, it would shift all results by one number.

    key: () int64.  indices: (n,) int32, none of which carries the position into another multiple of 2^32.
    Returns (n,) int32.
    """
    high = (start >> 32) * 0x9E3779B9
    x = indices + _int32(start)
    x ^= _int32(key ^ high)
    x ^= _shift32(x, 16)
    x *= 0x7FEB352D
    x ^= _shift32(x, 15)
    x += _int32((key >> 32) + high)
    x *= -2073254261  # 0x846CA68B
    x ^= _shift32(x, 16)
    return x


def round_(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to what bf16 holds, in place: up with a probability of the share of the gap below x.

    Adding 16 random bits to the encoding and cutting the low 16 off does it, for either sign and for subnormals. What
    bf16 holds stays. Numbers beyond bf16's largest become that, for a carry would make them infinite.

    x: (n,) fp32.  bits: (n,) int32, 0 to 65535.
    Returns x, whose conversion to bf16 is then exact, whichever way a device rounds.
    """
    encoding = x.clamp_(-BF16_MAX, BF16_MAX).view(torch.int32)
    encoding += bits
    encoding &= -0x10000
    return x


def _int32(x: int | Tensor) -> int | Tensor:
    """The low 32 bits, with a sign."""
    return x.to(torch.int32) if isinstance(x, Tensor) else ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def _shift32(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> places).bitwise_and_((1 << (32 - places)) - 1)


def _shift64(x: Tensor, places: int) -> Tensor:
    return (x >> places) & ((1 << (64 - places)) - 1)
