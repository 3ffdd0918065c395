"""Checkpoints: everything needed to go on to the bit, written whole or not at all, never overwritten."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selm_fast.errors import RunFailed
from selm_fast.training import storage
from selm_fast.training.masters import Masters
from selm_fast.training.storage import Damaged

log = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read back.

    step: optimiser steps done.  state: the loop's own values, JSON.
    masters: fp32 weights by name.  optimizer: moments and step counts, as "<weight>/<moment>".
    """

    path: Path
    step: int
    state: dict[str, Any]
    masters: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(
    folder: Path, *, step: int, masters: Masters, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>`, then drop all but the newest `keep`; one that is there already is left as it is.

    Raises RunFailed on a full disk; earlier checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    if not path.exists():
        with storage.new_folder(path) as temporary:
            storage.write_tensors(temporary, "weights", masters.masters)
            storage.write_tensors(temporary, "optimizer", _optimizer_tensors(masters, optimizer))
            storage.write_new(temporary / STATE, storage.to_json({"step": step, **state}))
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return path


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None where there is none at all. A damaged one is passed over, loudly.

    Raises RunFailed where checkpoints are there and none is sound.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            return load(path)
        except Damaged as damage:
            log.warning("checkpoint %s is damaged (%s); falling back to the one before", path.name, damage)
    if paths:
        raise RunFailed(f"every checkpoint in {folder} is damaged; move the folder away to begin again")
    return None


def newest(folder: Path) -> Path:
    """The newest checkpoint's folder; there must be one."""
    return _newest_first(folder)[0]


def clear_after(folder: Path, found: Checkpoint | None) -> None:
    """Remove what stands in the way of going on from `found`: temporaries of a killed run, newer (damaged) checkpoints.

    Left there, a damaged one would be taken for the one to save at its step, and keep sound ones from being kept.
    """
    for path in folder.glob(storage.temporary_of(Path("step-*")).name):
        shutil.rmtree(path)
    for path in _newest_first(folder):
        if found is not None and path.name > found.path.name:
            log.warning("removing the damaged checkpoint %s", path.name)
            shutil.rmtree(path)


def load(path: Path) -> Checkpoint:
    """One checkpoint, every file checked. Raises Damaged."""
    storage.check_names(path, "weights-", "optimizer-", STATE)  # each is read below: one that is not was renamed
    state = storage.read_checked_json(path, STATE)
    return Checkpoint(
        path, state["step"], state, storage.read_tensors(path, "weights"), storage.read_tensors(path, "optimizer")
    )


def restore(checkpoint: Checkpoint, masters: Masters, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimiser state back. Raises RunFailed where the checkpoint is of another model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in masters.masters.items()}
    if {name: tuple(tensor.shape) for name, tensor in checkpoint.masters.items()} != shapes:
        raise RunFailed(f"{checkpoint.path} holds other weights than this model has; it belongs to another model")
    masters.load(checkpoint.masters)
    for key, value in checkpoint.optimizer.items():
        name, moment = key.rsplit("/", 1)
        master = masters.masters[name]
        optimizer.state[master][moment] = value.to(master.device)  # fused AdamW's step count lies there, too


def _optimizer_tensors(masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{moment}": value
        for name, master in masters.masters.items()
        for moment, value in optimizer.state.get(master, {}).items()
    }


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()), reverse=True)
