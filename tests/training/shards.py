"""Checkpoints of a few tensors, saved and loaded by worlds of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from selm_fast.training import checkpoint
from selm_fast.training.world import World, join

from .harness import ALONE, same_bits
from .ranks import Ranks, in_ranks, start_ranks

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
# Rows that four processes share evenly, unevenly, and of which some have none.
SHAPES = {"even": (8, 3), "uneven.weight": (7, 5), "few": (3, 2), "uneven.bias": (5,), "one row": (1, 6)}


def weights_of(step: int) -> Tensors:
    """Full fp32 weights, other ones at each step; NaN and -0 among them."""
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["even"][0] = torch.tensor([float("nan"), -0.0, float("inf")])
    return tensors


def state_of(step: int) -> Tensors:
    """Full optimiser state: one moment in fp32, one in bf16, a step count that is not sharded."""
    found: Tensors = {}
    for name, weight in weights_of(100 + step).items():
        found[f"{name}/exp_avg"], found[f"{name}/exp_avg_sq"] = weight, weight.bfloat16()
        found[f"{name}/step"] = torch.tensor(float(step))
    return found


def placed(tensors: Tensors, world: World) -> Tensors:
    """As a world of this size holds them: sharded on the first dimension where there is a mesh and a dimension."""
    if world.mesh is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    return {
        name: distribute_tensor(tensor, world.mesh, [Shard(0)], src_data_rank=None) if tensor.dim() else tensor.clone()
        for name, tensor in tensors.items()
    }


def save(folder: Path, world: World, step: int, keep: int = 9) -> Path:
    """Write the checkpoint of a step."""
    weights, optimizer = placed(weights_of(step), world), placed(state_of(step), world)
    state = {"note": f"after {step}"}
    return checkpoint.save(folder, step=step, weights=weights, optimizer=optimizer, state=state, keep=keep, world=world)


def load(folder: Path, world: World) -> int:
    """The step of the newest sound checkpoint; fails unless each of its tensors comes back to the bit."""
    weights = placed({name: torch.full_like(tensor, 7) for name, tensor in weights_of(0).items()}, world)
    optimizer = placed({name: torch.full_like(tensor, 7) for name, tensor in state_of(0).items()}, world)
    found = checkpoint.load_latest(folder, weights=weights, optimizer=optimizer, world=world)
    assert found is not None
    assert found.state == {"step": found.step, "note": f"after {found.step}"}
    expect(weights, weights_of(found.step), world)
    expect(optimizer, state_of(found.step), world)
    return found.step


def expect(found: Tensors, full: Tensors, world: World) -> None:
    """Fails unless this process's parts are those of the full tensors, to the bit."""
    assert found.keys() == full.keys()
    for name, tensor in placed(full, world).items():
        assert same_bits(local(found[name]), local(tensor)), f"{name} on rank {world.rank}"


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_world(size: int, action: Callable[[World], Any], folder: Path) -> list[Any]:
    """What `action` returns in each process of a world; of size 0: in this process, without any group."""
    return [action(ALONE)] if size == 0 else in_ranks(size, _joined(action), folder)


def start_world(size: int, action: Callable[[World], Any], folder: Path) -> Ranks:
    """As `in_world`, under way."""
    return start_ranks(size, _joined(action), folder)


def _joined(action: Callable[[World], Any]) -> Callable[[int], Any]:
    def joined(_rank: int) -> Any:
        with join(CPU, timeout_s=20) as world:
            return action(world)

    return joined
