"""Which tensors a folder holds, and in which of its files their parts lie: a JSON file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from selm_fast.training import storage
from selm_fast.training.storage import Damaged, Manifest


class Mismatch(Exception):
    """Tensors are there, and sound, but not those that were asked for; the message says how they differ."""


@dataclass(frozen=True, slots=True)
class Index:
    """tensors: dtype, shape and chunks of each, by name.  files: where each chunk is, under the tensor's name."""

    tensors: dict[str, TensorStorageMetadata]
    files: dict[MetadataIndex, str]

    @classmethod
    def of(cls, manifest: Manifest, stem: str) -> Index:
        """The index `<stem>.json` of files `<stem>-*`. Raises Damaged."""
        tensors: dict[str, TensorStorageMetadata] = {}
        files: dict[MetadataIndex, str] = {}
        try:
            for name, found in json.loads(manifest.read(f"{stem}.json")).items():
                chunks = [
                    ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in found["chunks"]
                ]
                properties = TensorProperties(dtype=getattr(torch, found["dtype"]))
                tensors[name] = TensorStorageMetadata(properties, torch.Size(found["shape"]), chunks)
                files |= {MetadataIndex(name, chunk["offsets"]): chunk["file"] for chunk in found["chunks"]}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Damaged(f"{manifest.folder / stem}.json: not a list of tensors") from error
        return cls(tensors, files)

    def to_json(self) -> bytes:
        """The file that `of` reads."""
        tensors = {
            name: {
                "dtype": str(found.properties.dtype).removeprefix("torch."),
                "shape": list(found.size),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": self.files[MetadataIndex(name, chunk.offsets)],
                    }
                    for chunk in found.chunks
                ],
            }
            for name, found in self.tensors.items()
        }
        return storage.to_json(tensors)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises Mismatch unless names, shapes and dtypes are those of the index, to the last of them."""
        there = {name: _facts(found.properties.dtype, found.size) for name, found in self.tensors.items()}
        asked = {name: _facts(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(there.keys() | asked.keys()):
            if there.get(name) != asked.get(name):
                raise Mismatch(f"{name}: {there.get(name, 'missing')} there, {asked.get(name, 'missing')} here")

    def read_whole(self, manifest: Manifest, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All tensors, in full, on the CPU; by one process, without any group; a file at a time. Raises Damaged.

        dtype: what each is converted to as it is read (None: nothing is).
        """
        whole = {
            name: torch.empty(found.size, dtype=dtype or found.properties.dtype) for name, found in self.tensors.items()
        }
        chunks_of: dict[str, list[MetadataIndex]] = {}
        for chunk, file in self.files.items():
            chunks_of.setdefault(file, []).append(chunk)
        for file, chunks in sorted(chunks_of.items()):
            parts = safetensors.torch.load(manifest.read(file))
            for chunk in chunks:
                assert chunk.offset is not None
                part = parts[chunk.fqn]
                part_of(whole[chunk.fqn], chunk.offset, part.shape).copy_(part)
            del parts, part  # before the next file is read
        return whole


def part_of(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A view of so many rows, columns, ... of a tensor from an offset on; of a single number, of itself."""
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]


def _facts(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
