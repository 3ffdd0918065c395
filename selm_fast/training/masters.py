"""fp32 master weights under a model that computes in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selm_fast.model import Policy
from selm_fast.model.sharding import first_row, local, named_shards
from selm_fast.training.dither import dither_


class Masters:
    """The fp32 weights that the optimiser moves, and the compute weights that follow them: in one process, unsharded.

    In fp32 the model's parameters are the masters. In bf16 the model holds rounded copies; its gradients are added up
    in fp32, over the micro-batches of a step too.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype, *, dither_seed: int | None = None) -> None:
        """model: parameters in fp32; they are cast to `compute` in place. dither_seed: spread the masters (None: do
        not)."""
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.compute = compute
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            assert parameter.dtype == torch.float32
            if compute == torch.float32:
                self.masters[name] = parameter
                continue
            self.masters[name] = nn.Parameter(parameter.data.contiguous())
            parameter.data = parameter.data.to(compute)
            parameter.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
        if dither_seed is not None:
            spread(self.masters, dither_seed)

    @staticmethod
    def _collector(master: nn.Parameter) -> object:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

        return collect

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the compute weights."""
        if self.compute != torch.float32:
            for name, master in self.masters.items():
                self.parameters[name].copy_(master)


class ShardedMasters:
    """The same under FSDP: the masters are its shards, which it rounds whenever it gathers them."""

    def __init__(self, policy: Policy, compute: torch.dtype) -> None:
        """policy: sharded, with memory, its weights not gathered."""
        self.compute = compute
        self.masters = named_shards(policy.model)
        self._policy = policy

    def publish(self) -> None:
        """Let go of what is gathered: the root's weights stay so after a pass without gradients."""
        self._policy.reshard()  # type: ignore[operator]


def spread(masters: Mapping[str, Tensor], seed: int) -> None:
    """The grid dither of every master, whole or sharded, in place."""
    for name, master in masters.items():
        part = local(master.data)
        columns = part[0].numel() if part.shape[0] else 0
        dither_(part, seed=seed, name=name, first=first_row(master) * columns)
