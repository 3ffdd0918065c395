"""Tensors of all processes in one folder: safetensors files and a JSON index, each file hashed, nothing pickled.

torch.distributed.checkpoint (DCP) plans who writes which part and who reads what from where, in a world of any size;
only what puts bytes down and takes them up is our own. DCP's storage for safetensors loads in silence where a file is
missing, reads stale files that lie beside, and knows no hashes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from selm_fast.errors import RunFailed
from selm_fast.training import storage
from selm_fast.training.storage import Damaged, Manifest
from selm_fast.training.tensor_index import Index, part_of
from selm_fast.training.world import World

# The names of tensors are keys as they stand: "a.b" is no "b" in an "a".
_AS_THEY_ARE: dict[str, Any] = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """Write tensors as `<stem>-<rank>-<n>.safetensors` and `<stem>.json`; all processes call it together.

    tensors: DTensors sharded over all processes, of which each writes its own part, or plain ones, the same everywhere,
    of which one process writes each.
    -> on the first process, what a manifest says of every file, those of others among them.

    Raises RunFailed on a full disk, on all processes where it is full for one.
    """
    writer = _Writer(folder, stem, world.rank)
    with _collective(world):
        save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True, **_AS_THEY_ARE),
            process_group=world.control,
            no_dist=world.control is None,
        )
    return writer.files


def read(manifest: Manifest, index: Index, tensors: Mapping[str, Tensor], world: World) -> None:
    """Read tensors in place, plain or sharded, whatever the world was that wrote them; all processes call it together.

    Each reads the files that hold something of its own, one at a time; between them they check every file of the index.
    tensors: with the names, shapes and dtypes of the index (`Index.check`).

    Raises Damaged, on all processes where one finds a file damaged; the tensors then have any values.
    """
    with _collective(world):
        load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=_Reader(manifest, index),
            planner=DefaultLoadPlanner(**_AS_THEY_ARE),
            process_group=world.control,
            no_dist=world.control is None,
        )


class _Stored(NamedTuple):
    """Where a chunk was written. entry: what a manifest says of the file."""

    file: str
    entry: dict[str, Any]


class _Writer(StorageWriter):
    """Writes one kind of tensors, what this process has of them to files of its own."""

    def __init__(self, folder: Path, stem: str, rank: int) -> None:
        self.folder, self.stem, self.rank = folder, stem, rank
        self.files: dict[str, Any] = {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out the parts without a row, of tensors that have fewer rows than there are processes."""
        return replace(plan, items=[item for item in plan.items if _bytes_of(item) or not item.tensor_storage_size()])

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this process, one after another."""
        results = []
        for number, items in enumerate(_in_files(plan.items), 1):
            name = f"{self.stem}-{self.rank:05d}-{number:05d}.safetensors"
            tensors = {item.index.fqn: _resolved(item, planner) for item in items}
            stored = _Stored(name, storage.write_listed(self.folder / name, safetensors.torch.save(tensors)))
            del tensors  # copies, where they come from a GPU, before the next are made
            results += [WriteResult(item.index, _bytes_of(item), stored) for item in items]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the first process."""
        stored = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors = {n: t for n, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        index = Index(tensors, {chunk: one.file for chunk, one in stored.items()})
        self.files = {one.file: one.entry for one in stored.values()}
        name = f"{self.stem}.json"
        self.files[name] = storage.write_listed(self.folder / name, index.to_json())

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer serves once."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any) -> None:
        """Nothing: the folder is there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by what a path looks like."""
        return False


class _Reader(StorageReader):
    """Reads what `_Writer` wrote, each file checked against the manifest."""

    def __init__(self, manifest: Manifest, index: Index) -> None:
        self.manifest, self.index = manifest, index

    def read_metadata(self) -> Metadata:
        """The index, which all processes have read already."""
        return Metadata({**self.index.tensors})

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Let the first process check the files of which nobody needs anything: none is left unread."""
        needed = {self.index.files[item.storage_index] for plan in plans for item in plan.items}
        return [replace(plans[0], storage_data=sorted(set(self.index.files.values()) - needed)), *plans[1:]]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy into the planner's tensors what they need, file by file."""
        for file in plan.storage_data or ():
            self.manifest.read(file)
        items_of: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items_of.setdefault(self.index.files[item.storage_index], []).append(item)
        for file, items in sorted(items_of.items()):
            self._read_file(file, items, planner)
        return _done(None)

    def _read_file(self, file: str, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        parts = safetensors.torch.load(self.manifest.read(file))
        for item in items:
            source = part_of(parts[item.storage_index.fqn], item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).copy_(source)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader serves once."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any) -> None:
        """Nothing: the index is all there is to know."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by what a path looks like."""
        return False


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None, "there are only tensors"
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _resolved(item: WriteItem, planner: SavePlanner) -> Tensor:
    """The part of a tensor that an item is, on the CPU."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "there are only tensors"
    return tensor.cpu().contiguous()


def _in_files(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items that go into one file: one, or several of at most `MAX_SHARD` bytes."""
    together: list[WriteItem] = []
    size = 0
    for item in items:
        if together and size + _bytes_of(item) > storage.MAX_SHARD:
            yield together
            together, size = [], 0
        together.append(item)
        size += _bytes_of(item)
    if together:
        yield together


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@contextmanager
def _collective(world: World) -> Iterator[None]:
    """Let DCP speak as this package does: no warning that a lone process has no group, no trace, errors of our own.

    Where one fails, all do, and with the same error, so that all decide alike what to do next.
    """
    failure = None
    with warnings.catch_warnings(), _silent(), world.watched("checkpoint"):
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        try:
            yield
        except CheckpointException as found:
            failure = found
    if failure is not None:
        rank = min(failure.failures)
        error, _ = failure.failures[rank]
        if rank == world.rank or isinstance(error, (RunFailed, Damaged)):
            raise error
        raise RunFailed(f"rank {rank} failed while a checkpoint was written or read: {error!r}") from failure


@contextmanager
def _silent() -> Iterator[None]:
    """DCP's logger of its own calls, two records for each tensor, is switched off meanwhile."""
    before, _dcp_logger.disabled = _dcp_logger.disabled, True
    try:
        yield
    finally:
        _dcp_logger.disabled = before
