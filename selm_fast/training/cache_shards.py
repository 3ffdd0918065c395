"""The files of a reference cache: a shard holds a run of packs, their sequence keys and log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from selm_fast.training import storage
from selm_fast.training.storage import Damaged

Pack = tuple[list[bytes], Tensor]  # 16-byte keys of S sequences, and (S,) fp64 log-probs (nats)


def shard_name(digest: str, number: int) -> str:
    """The file of the `number`-th shard of the pass over the plan of this digest."""
    return f"shard-{digest[:16]}-{number:05d}.safetensors"


def write_shard(folder: Path, name: str, packs: Sequence[Pack]) -> str:
    """Write packs as one file, durable once this returns; -> its sha256. Raises RunFailed on a full disk."""
    joined = b"".join(key for keys, _ in packs for key in keys)
    data = safetensors.torch.save(
        {
            "keys": torch.tensor(list(joined), dtype=torch.uint8).view(-1, 16),
            "logps": torch.cat([values for _, values in packs]),
            "pack_sizes": torch.tensor([len(keys) for keys, _ in packs]),
        }
    )
    return storage.write_atomic(folder / name, data)


def read_shard(folder: Path, shard: dict[str, str]) -> Iterator[Pack]:
    """The packs of a file, by the name and sha256 that a manifest gives. Raises Damaged."""
    path = folder / Path(shard["file"]).name
    try:
        tensors = safetensors.torch.load(storage.read_checked(path, shard["sha256"]))
        keys, values, sizes = tensors["keys"], tensors["logps"], tensors["pack_sizes"].tolist()
    except (KeyError, safetensors.SafetensorError) as error:
        raise Damaged(f"{path}: not a shard of a reference cache ({error})") from error
    if sum(sizes) != len(keys) or len(keys) != len(values):
        raise Damaged(f"{path}: {len(keys)} keys, {len(values)} log-probs, packs of {sum(sizes)} in all")
    if bad := bad_value(values):
        raise Damaged(f"{path} holds {bad}")
    raw = keys.numpy()
    start = 0
    for size in sizes:
        yield [row.tobytes() for row in raw[start : start + size]], values[start : start + size]
        start += size


def bad_value(values: Tensor) -> str | None:
    """What is wrong with log-probs, in words; None where nothing is."""
    bad = ~torch.isfinite(values) | (values > 0)
    return f"a log-prob of {values[bad][0].item()}; each must be finite and at most 0" if bad.any() else None
