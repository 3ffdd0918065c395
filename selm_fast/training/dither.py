"""The grid dither: masters loaded from bf16 are spread inside their bf16 cells, so that small updates are seen.

A master loaded from a bf16 checkpoint sits exactly on the bf16 grid. At lr 5e-7 an update is far smaller than half the
gap to the next grid point, so the bf16 copy that computes and is exported would round nearly every one of them away.
A fixed offset inside the cell leaves the copy as it was, to the bit, and makes its rounding unbiased over the elements.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# |w| below 2^-124 is left on the grid: gaps there are smaller than any update, and processors may flush such numbers.
_SMALLEST = 3 << 23
_INFINITY = 0xFF << 23
_CHUNK = 1 << 22  # elements at a time: the int64 work space stays at a few tens of MiB


@torch.no_grad()
def dither_(master: Tensor, *, seed: int, name: str, first: int = 0) -> None:
    """Move each element that sits on the bf16 grid to a fixed pseudo-random place in its cell, in place.

    master: fp32, contiguous; the whole weight, or a shard of it that begins with its `first`-th element. Elements off
    the grid, zeros, tiny and non-finite ones stay.
    The offset is drawn in units of the fp32 encoding, so at a power of two, where the lower gap is half the upper
    one, the
    lower half of the cell is twice as dense: the expected movement of the copy then equals that of the master.
    It depends on seed, name and position alone, however the weight is sharded.
    """
    if master.dtype != torch.float32 or not master.is_contiguous():
        raise ValueError(f"master must be contiguous fp32; got {master.dtype}, strides {master.stride()}")
    salt = salt_of(f"{seed}:{name}")
    bits = master.view(-1).view(torch.int32)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]
        magnitude = part & 0x7FFFFFFF
        movable = ((part & 0xFFFF) == 0) & (magnitude >= _SMALLEST) & (magnitude < _INFINITY)
        position = torch.arange(first + start, first + start + part.numel(), device=part.device)
        # 16 bits as -32767..32767: one step further is the tie between two grid points.
        offset = ((mix(position, salt) & 0xFFFF) - 0x8000).clamp_(min=-0x7FFF).to(torch.int32)
        part += torch.where(movable, offset, 0)


def salt_of(text: str) -> int:
    """64 bits, as a signed integer, that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mix(number: Tensor, salt: int) -> Tensor:
    """splitmix64's finaliser over int64, which wraps: a well-spread hash of each number."""
    x = number * -7046029254386353131 + salt  # 0x9E3779B97F4A7C15, the golden ratio of 2^64
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> places) & ((1 << (64 - places)) - 1)
