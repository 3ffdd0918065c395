"""A policy under FSDP2: every process holds a part of each weight, in fp32, and gathers a layer when it is its turn."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from selm_fast.model.policy import Policy

# Beside `forward`: what is called from outside and needs the root's weights, head and embedding, gathered.
METHODS = ("token_logps", "sequence_logps", "own_logps")


def shard(policy: Policy, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shard every decoder layer, and what is left (embedding, last norm, head) with the policy itself, in place.

    compute: dtype of gathered weights and of what is computed; shards, their gradients and the reduction are fp32.
    Gradients are summed, not averaged: a loss is divided by the global number of its groups beforehand.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute,
        reduce_dtype=torch.float32,
        # Nothing that comes in is to be rounded: a reference log-prob of -600.123 would be -600.
        cast_forward_inputs=False,
    )
    for layer in policy.layers():
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    root = fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if mesh.size() > 1:
        for module in (*policy.layers(), root):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for name in METHODS:
        register_fsdp_forward_method(policy, name)


def materialise(policy: Policy, device: torch.device) -> None:
    """Give a policy that was sharded on the meta device memory: parameters uninitialised, buffers as they are."""
    empty = partial(torch.empty_like, device=device)
    policy._apply(lambda tensor: empty(tensor) if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which is all of it where it is not sharded; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where, on dim 0, this process's part of a tensor begins."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    chunk = -(-rows // mesh.size())  # as torch.chunk cuts
    start = min(mesh.get_local_rank() * chunk, rows)
    assert tensor.to_local().shape[0] == min(chunk, rows - start)
    return start


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, tied ones once; under FSDP they must not be gathered."""
    return dict(model.named_parameters())
