"""From a model's name to a policy with its masters: whole in one process on a CPU, sharded by FSDP everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selm_fast.config import Config
from selm_fast.model import Policy, support
from selm_fast.model.fused_layers import fuse
from selm_fast.model.selfcheck import check_packed
from selm_fast.model.sharding import materialise, named_shards, shard
from selm_fast.model.streaming import build, stream, take
from selm_fast.training.digest import weights_digest
from selm_fast.training.final import is_run, load_into, load_masters
from selm_fast.training.masters import Masters, ShardedMasters, spread
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.world import World


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to train. digest: of its weights as they compute, before any step."""

    policy: Policy
    masters: Masters | ShardedMasters
    digest: str


def load(config: Config, path: str | None, world: World, dtype: torch.dtype) -> Loaded:
    """The model at `path`, or the random one of model.init (None): cast or sharded, checkpointed, compiled.

    dtype: that it computes in; its masters are fp32.
    Raises Refused for what is not served.
    """
    # The masters of a run are spread already; the few that came to lie on the grid since then stay where they are.
    dither = config.grid_dither if config.grid_dither is not None else dtype == torch.bfloat16
    dither = dither and not (config.model.path is not None and is_run(config.model.path))
    if world.mesh is None:
        policy = _whole(config, path, world.device)
        _set_up(policy, config)
        masters: Masters | ShardedMasters = Masters(policy.model, dtype, dither_seed=config.seed if dither else None)
    else:
        policy = _sharded(config, path, world, dtype)
        masters = ShardedMasters(policy, dtype)
        if dither:
            spread(masters.masters, config.seed)
    return Loaded(policy, masters, weights_digest(masters.masters, dtype, world))


def _set_up(policy: Policy, config: Config) -> None:
    if config.model.activation_checkpointing != "none":
        policy.checkpoint_activations(config.model.activation_checkpointing)
    if config.model.compile:
        policy.compile_layers()


def _whole(config: Config, path: str | None, device: torch.device) -> Policy:
    """All of a model on one device, in fp32."""
    trust, mode = config.model.trust_remote_code, config.head_mode
    if path is None:
        assert config.model.init is not None
        return Policy.from_config(config.model.init, seed=config.seed, device=device, head_mode=mode)
    if is_run(path):
        folder = RunFolder(Path(path).expanduser())
        tensors, _ = load_masters(folder)
        return Policy.from_tensors(folder.assets, tensors, device=device, head_mode=mode, trust_remote_code=trust)
    return Policy.from_pretrained(path, device=device, head_mode=mode, trust_remote_code=trust)


def _sharded(config: Config, path: str | None, world: World, dtype: torch.dtype) -> Policy:
    """A model whose shards are all that this process ever holds of it."""
    trust = config.model.trust_remote_code
    folder = RunFolder(Path(path).expanduser()) if path is not None and is_run(path) else None
    source = str(folder.assets if folder else path or config.model.init)
    if folder is None and path is not None:
        support.check_source(path, trust_remote_code=trust)

    def fill(parameters: Mapping[str, nn.Parameter]) -> None:
        if folder is not None:
            load_into(folder, parameters, world)
        elif path is not None:
            stream(path, parameters)
        else:  # random weights are drawn as in one process, which takes the whole of them on the host
            drawn = dict(Policy.from_config(source, seed=config.seed).model.named_parameters())
            take(drawn.__getitem__, parameters)

    return sharded(config, source, world, dtype, fill)


def sharded(
    config: Config, source: str, world: World, dtype: torch.dtype, fill: Callable[[Mapping[str, nn.Parameter]], None]
) -> Policy:
    """The model that `source` describes, in shards. fill: gives them, by name, their weights, in place."""
    assert world.mesh is not None
    policy = Policy(
        build(source, trust_remote_code=config.model.trust_remote_code), head_mode=config.head_mode, source=source
    )
    shard(policy, world.mesh, dtype)
    materialise(policy, world.device)
    fill(named_shards(policy.model))
    fuse(policy.model)
    world.meet("model")  # files are read at different speeds, and the check is a pass of all processes together
    check_packed(policy, source, dtype)
    policy.reshard()  # type: ignore[operator]
    _set_up(policy, config)
    return policy.train()
