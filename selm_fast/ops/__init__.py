"""The low-level operations: tensors in, tensors out. Needs torch, triton on CUDA, and nothing else of this package."""

from __future__ import annotations

import torch

from selm_fast.ops import extension
from selm_fast.ops.adamw import adamw_
from selm_fast.ops.attention import attention_backend, shared_prefix_attention
from selm_fast.ops.backend import resolve
from selm_fast.ops.fused_preference_loss import fused_preference_loss
from selm_fast.ops.linear_logprob import linear_logprob
from selm_fast.ops.preference_loss import Pairs, preference_loss
from selm_fast.ops.sequence_sum import sequence_sum

__all__ = [
    "Pairs",
    "adamw_",
    "attention_backend",
    "backends",
    "fused_preference_loss",
    "linear_logprob",
    "preference_loss",
    "sequence_sum",
    "shared_prefix_attention",
]


def backends(device: str = "cpu", *, attention: str | None = None) -> dict[str, str]:
    """Which back end serves each op on a device ("cpu" or "cuda").

    attention: what serves a model's own attention, where that is known; otherwise it is asked for at the usual dtype
        and head sizes.
    """
    rows = resolve("auto", torch.device(device))
    loss = "triton" if rows == "triton" else "torch"
    layers = resolve("auto", torch.device(device), triton=False)
    exact = device != "cpu" or (rows == "cpp" and extension.mm_serves(torch.bfloat16))
    return {
        "linear_logprob": f"{rows}, bf16 logits in {'fp32' if exact else 'bf16'}",
        "sequence_sum": loss,
        "fused_preference_loss": f"{rows}, {loss}" if rows != loss else rows,
        "shared_prefix_attention": attention or attention_backend(device),
        "rms_norm": layers,
        "gated_mlp": layers,
    }
