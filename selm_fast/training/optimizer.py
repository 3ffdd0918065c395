"""The optimiser."""

from __future__ import annotations

import torch

from selm_fast.config import Config
from selm_fast.training.masters import Masters


def make_optimizer(masters: Masters, config: Config) -> torch.optim.Optimizer:
    """AdamW over the masters; as in transformers, biases and norm weights are not decayed."""
    optim = config.optim
    decayed = [master for master in masters.masters.values() if master.dim() >= 2]
    others = [master for master in masters.masters.values() if master.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        # torch's default keeps a copy of every second moment during a step, 4 bytes a weight, and on a CPU takes six
        # times as long.
        fused=True,
    )  # fmt: skip
