"""The optimiser: AdamW over fp32 masters, whole or sharded, with moments in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selm_fast.config import Config
from selm_fast.model.sharding import first_row, local
from selm_fast.ops import adamw_
from selm_fast.training.dither import salt_of
from selm_fast.training.world import World


class AdamW:
    """AdamW (arXiv 1711.05101) as in torch; as in transformers, biases and norm weights are not decayed.

    Everything that decides whether and how far it steps stays on the device: `step`, () fp32, counts the steps that
    were taken. Moments have the shape of their master, and are sharded as it is.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], config: Config) -> None:
        optim = config.optim
        dtype = torch.float32 if optim.moments == "float32" else torch.bfloat16
        self.masters = dict(masters)
        self.seed = config.seed
        self.betas, self.eps, self.weight_decay = (optim.beta1, optim.beta2), optim.eps, optim.weight_decay
        device = next(iter(self.masters.values())).device
        self.step = torch.zeros((), device=device)
        self.exp_avg = {name: torch.zeros_like(master, dtype=dtype) for name, master in self.masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(master, dtype=dtype) for name, master in self.masters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name: what a checkpoint holds; in place."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        state = {f"{name}/{kind}": part[name] for kind, part in moments.items() for name in self.masters}
        return {"step": self.step} | state

    @torch.no_grad()
    def apply(self, lr: float, *, grad_scale: Tensor, skip: Tensor) -> None:
        """One step. grad_scale: () fp32, what gradients are multiplied by.  skip: () bool, whether to do nothing."""
        step = self.step + 1
        for name, master in self.masters.items():
            if master.grad is None:
                continue
            part = local(master.data)
            columns = part[0].numel() if part.shape[0] else 0
            adamw_(
                part, local(master.grad), local(self.exp_avg[name]), local(self.exp_avg_sq[name]),
                step=step, lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                weight_decay=self.weight_decay if master.dim() >= 2 else 0.0, grad_scale=grad_scale, skip=skip,
                salt=salt_of(f"{self.seed}:moments:{name}"), offset=first_row(master) * columns,
            )  # fmt: skip
        self.step.copy_(torch.where(skip, self.step, step))

    def clear(self) -> None:
        """Let go of all gradients."""
        for master in self.masters.values():
            master.grad = None


@torch.no_grad()
def gradient_norm(masters: Mapping[str, nn.Parameter], loss: Tensor, world: World) -> Tensor:
    """Norm of all gradients together, () fp32, the same in every process; NaN where some process's loss is not finite.

    Nothing waits for the device.
    """
    grads = [local(master.grad) for master in masters.values() if master.grad is not None]
    square = torch.nn.utils.get_total_norm(grads, foreach=True).double().square()
    return world.sum(torch.where(loss.isfinite(), square, torch.nan)).sqrt().float()
