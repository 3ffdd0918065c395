"""fp32 master weights under a model that computes in fp32 or bf16."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from selm_fast.training.dither import dither_


class Masters:
    """The fp32 weights that the optimiser moves, and the compute weights that follow them.

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
            for name, master in self.masters.items():
                dither_(master.data, seed=dither_seed, name=name)

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

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set every master, and the compute weights with them. The names and shapes must be the model's."""
        assert tensors.keys() == self.masters.keys(), "a checkpoint is checked against its model before it is loaded"
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.publish()


def weights_digest(model: nn.Module) -> str:
    """sha256 of the names, dtypes, shapes and bytes of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
