"""The identity of a model's weights, the same however many processes hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from selm_fast.model.sharding import first_row, local
from selm_fast.training.dither import mix, salt_of
from selm_fast.training.world import World

_CHUNK = 1 << 22  # elements at a time: the int64 work space stays at a few tens of MiB


@torch.no_grad()
def weights_digest(weights: Mapping[str, Tensor], compute: torch.dtype, world: World | None = None) -> str:
    """sha256 of the names, shapes and hashes of all weights, as they compute.

    weights: fp32, whole or sharded.  compute: dtype that they are rounded to first.
    The hash of a weight is a sum over its elements of a hash of place and bits, which can be taken shard by shard and
    in any order: 128 bits, to tell weights apart, not to withstand somebody who forges them.
    """
    sums = torch.stack([_hash(name, weight, compute) for name, weight in sorted(weights.items())])
    if world is not None:
        world.sum(sums)
    digest = hashlib.sha256()
    for (name, weight), (one, other) in zip(sorted(weights.items()), sums.tolist(), strict=True):
        digest.update(f"{name} {compute} {tuple(weight.shape)} {one} {other}\n".encode())
    return digest.hexdigest()


def _hash(name: str, weight: Tensor, compute: torch.dtype) -> Tensor:
    """(2,) int64, of this process's part."""
    part = local(weight).detach()
    first = first_row(weight) * (part[0].numel() if part.dim() and part.shape[0] else 0)
    flat, salt = part.reshape(-1), salt_of(name)
    sums = torch.zeros(2, dtype=torch.int64, device=part.device)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].to(compute)
        bits = piece.view(torch.int32 if piece.element_size() == 4 else torch.int16).long()
        place = torch.arange(first + start, first + start + bits.numel(), device=bits.device)
        one = mix(bits, salt) ^ mix(place, ~salt)
        sums += torch.stack([mix(one, 1).sum(), mix(one, 2).sum()])
    return sums
