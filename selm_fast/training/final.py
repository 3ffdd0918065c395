"""What is left of a finished run for others to start from: its fp32 masters, without the optimiser's state."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from selm_fast.errors import Refused
from selm_fast.training import checkpoint, storage
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.storage import Damaged
from selm_fast.training.tensor_index import Mismatch
from selm_fast.training.world import World

T = TypeVar("T")


def is_run(path: str | Path) -> bool:
    """Whether a folder is that of a training run, and no plain model folder."""
    return RunFolder(Path(path).expanduser()).record_path.is_file()


def keep_masters(folder: RunFolder) -> None:
    """Put the masters of the last checkpoint into `masters/` and drop the checkpoints: a third of their size is left.

    For a finished run; calling it again, or after a kill, ends in the same state.
    """
    if not folder.masters.exists():
        last = checkpoint.newest(folder.checkpoints)
        entries = storage.read_json(last / storage.MANIFEST)["files"]
        kept = {name: entry for name, entry in entries.items() if not name.startswith(checkpoint.OPTIMIZER)}
        with storage.new_folder(folder.masters) as temporary:
            for name in kept:
                storage.link(last / name, temporary / name)
            # The hashes of the checkpoint, not new ones: what has changed on the disk since is found when it is read.
            storage.write_new(temporary / storage.MANIFEST, storage.to_json({"files": kept}))
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def load_masters(folder: RunFolder, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], int]:
    """The newest weights of a run by name, whole and on the CPU, and after how many steps they are; by one process.

    dtype: what each is converted to as it is read, so that fp32 is never there as a whole (None: the masters' own).
    Their files are checked. Raises Refused where there are none yet or the kept ones are damaged.
    """
    if folder.masters.exists():
        with _refused_where_damaged(folder):
            return checkpoint.read_whole(folder.masters, checkpoint.WEIGHTS, dtype)
    alone = World(0, 1, torch.device("cpu"))
    return _trained(
        folder,
        checkpoint.latest(
            folder.checkpoints, alone, lambda path: checkpoint.read_whole(path, checkpoint.WEIGHTS, dtype)
        ),
    )


def load_into(folder: RunFolder, weights: Mapping[str, Tensor], world: World) -> int:
    """Read the newest fp32 weights of a run into sharded or plain tensors, in place; -> after how many steps they are.

    All processes call it together; none holds more of the model than its own part and one file.
    Raises Refused as `load_masters` does, and where the weights are those of another model.
    """
    targets = {checkpoint.WEIGHTS: weights}
    try:
        if world.any(world.first and folder.masters.exists(), "checkpoint"):
            with _refused_where_damaged(folder):
                return checkpoint.load(folder.masters, targets, world).step
        found = checkpoint.latest(folder.checkpoints, world, lambda path: checkpoint.load(path, targets, world))
    except Mismatch as mismatch:
        raise Refused(f"{mismatch}; was its config.json edited?") from mismatch
    return _trained(folder, found).step


@contextmanager
def _refused_where_damaged(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except Damaged as damage:
        raise Refused(f"the weights of {folder.path} are damaged: {damage}; train it again") from damage


def _trained(folder: RunFolder, found: T | None) -> T:
    if found is None:
        raise Refused(f"{folder.path} has no checkpoint yet: there are no trained weights to start from or to export")
    return found
