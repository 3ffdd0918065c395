"""Checkpoints: everything needed to go on to the bit, written whole or not at all, never overwritten.

All processes write and read them together, in one folder that all see; a world of another size reads them as well.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from selm_fast.errors import RunFailed
from selm_fast.training import dcp_storage, storage
from selm_fast.training.storage import Damaged, Manifest
from selm_fast.training.tensor_index import Index, Mismatch
from selm_fast.training.world import World

log = logging.getLogger(__name__)

STATE = "state.json"
WEIGHTS, OPTIMIZER = "weights", "optimizer"  # what the names of their files begin with
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read back beside the tensors. step: optimiser steps done.  state: the loop's own values, JSON."""

    path: Path
    step: int
    state: dict[str, Any]


def save(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write `folder/step-<step>`, then drop all but the newest `keep`; one that is there already is left as it is.

    weights: fp32 masters by name.  optimizer: moments and step counts, as "<weight>/<moment>".
    All processes call it together; none returns before the checkpoint has its name.
    Raises RunFailed, on all, where the disk is full for one; earlier checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    if not world.any(world.first and path.exists(), "checkpoint"):
        temporary = storage.temporary_of(path)
        try:
            _by_first(world, lambda: _begin(temporary))
            files = dcp_storage.write(temporary, WEIGHTS, weights, world)
            files |= dcp_storage.write(temporary, OPTIMIZER, optimizer, world)
            _by_first(world, lambda: _finish(temporary, path, files, {"step": step, **state}))
        except BaseException:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    if world.first:
        for old in _newest_first(folder)[keep:]:
            shutil.rmtree(old)
    return path


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    with storage.disk_errors(temporary):
        temporary.mkdir(parents=True)


def _finish(temporary: Path, path: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
    with storage.disk_errors(path):
        files = files | {STATE: storage.write_listed(temporary / STATE, storage.to_json(state))}
        storage.write_new(temporary / storage.MANIFEST, storage.to_json({"files": files}))
        storage.give_name(temporary, path)


def _by_first(world: World, action: Callable[[], None]) -> None:
    """Let the first process do what the others wait for; where it cannot, all fail."""
    failure = None
    if world.first:
        try:
            action()
        except Exception as error:
            failure = error
    failed = world.any(failure is not None, "checkpoint")
    if failure is not None:
        raise failure
    if failed:
        raise RunFailed("rank 0 could not write the checkpoint, and says why; what was saved before is intact")


def load_latest(
    folder: Path, *, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], world: World
) -> Loaded | None:
    """Read the newest sound checkpoint into these tensors, in place; None where there is none at all.

    One that is damaged for any process is passed over by all, loudly.
    Raises RunFailed where checkpoints are there and none is sound, or where it is of another model: names, shapes and
    dtypes must be the same.
    """
    targets = {WEIGHTS: weights, OPTIMIZER: optimizer}
    try:
        return latest(folder, world, lambda path: load(path, targets, world))
    except Mismatch as found:
        raise RunFailed(f"{found}: it belongs to another model") from found


def load(path: Path, targets: Mapping[str, Mapping[str, Tensor]], world: World) -> Loaded:
    """Read one checkpoint, or what is kept of it, into tensors by kind; all processes call it together.

    Raises Damaged, on all, where one finds any file of these kinds damaged, and Mismatch before anything is read.
    """
    damage = None
    try:
        manifest = Manifest.of(path)
        state = json.loads(manifest.read(STATE))
        indexes = {kind: Index.of(manifest, kind) for kind in targets}
    except Damaged as error:
        damage = error
    if world.any(damage is not None, "checkpoint"):
        raise damage or Damaged(f"{path}: another process could not read it")
    for kind, tensors in targets.items():
        try:
            indexes[kind].check(tensors)
        except Mismatch as error:
            raise Mismatch(f"{path} holds other {kind} than this model has ({error})") from error
    for kind, tensors in targets.items():
        dcp_storage.read(manifest, indexes[kind], tensors, world)
    return Loaded(path, state["step"], state)


def read_whole(path: Path, kind: str, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], int]:
    """All tensors of one kind, in full, on the CPU, and after how many steps they are; for one process. Raises Damaged.

    dtype: what each is converted to as it is read (None: nothing is).
    """
    manifest = Manifest.of(path)
    state = json.loads(manifest.read(STATE))
    return Index.of(manifest, kind).read_whole(manifest, dtype), state["step"]


def latest(folder: Path, world: World, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the newest checkpoint that is not damaged, or None where there is none at all.

    read: raises Damaged on all processes or on none. Raises RunFailed where checkpoints are there and none is sound.
    """
    found = torch.tensor([int(path.name.removeprefix("step-")) for path in _newest_first(folder)], dtype=torch.int64)
    steps = world.gather(found, "checkpoint")[0].tolist()
    for path in (folder / f"step-{step:08d}" for step in steps):
        try:
            return read(path)
        except Damaged as damage:
            if world.first:
                log.warning("checkpoint %s is damaged (%s); falling back to the one before", path.name, damage)
    if steps:
        raise RunFailed(f"every checkpoint in {folder} is damaged; move the folder away to begin again")
    return None


def newest(folder: Path) -> Path:
    """The newest checkpoint's folder; there must be one."""
    return _newest_first(folder)[0]


def clear_after(folder: Path, found: Loaded | None) -> None:
    """Remove what stands in the way of going on from `found`: temporaries of a killed run, newer (damaged) checkpoints.

    Left there, a damaged one would be taken for the one to save at its step, and keep sound ones from being kept.
    For the first process, once all have loaded.
    """
    for path in folder.glob(storage.temporary_of(Path("step-*")).name):
        shutil.rmtree(path)
    for path in _newest_first(folder):
        if found is not None and path.name > found.path.name:
            log.warning("removing the damaged checkpoint %s", path.name)
            shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()), reverse=True)
