"""The package flash_attn, where it is installed: version 2 (from 2.7 on) and version 3. Both know softcap.

Their private functions are called, for a backward of our own needs the logsumexp. Where a release names its arguments
otherwise, the call fails in the self-test, and another back end serves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops.attention_layout import Case, Layout, Scores
from selm_fast.ops.attention_varlen import flash_refusal, window_size
from selm_fast.ops.kv_gather import gather, gather_backward


class Flash(ABC):
    """What the versions share: the gather, and gradients that are summed in a fixed order."""

    module: str
    installed_with: str  # a top-level module that no other package brings: version 4 is called flash_attn, too

    def refusal(self, case: Case) -> str | None:
        """Why this back end cannot serve a case, or None."""
        if not _is_installed(self.installed_with):
            return f"needs the module {self.module}, which is not installed"
        return flash_refusal(case)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
        """q (T, H, Dh), k and v (T, Hk, Dh) -> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32."""
        keys, values = gather(k, layout.kv_index), gather(v, layout.kv_index)
        out, lse = self._forward(q=q, k=keys, v=values, **_arguments(layout, scores))
        return out.contiguous(), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `forward` by q, k and v, contiguous."""
        keys, values = gather(k, layout.kv_index), gather(v, layout.kv_index)
        dq, dkeys, dvalues = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, keys, values))
        self._backward(
            dout=grad, q=q, k=keys, v=values, out=out, softmax_lse=lse, dq=dq, dk=dkeys, dv=dvalues,
            deterministic=True, **_arguments(layout, scores),
        )  # fmt: skip
        dk, dv = gather_backward((dkeys, dvalues), layout.kv_index, k.shape[0], k.dtype)
        return dq, dk, dv

    @abstractmethod
    def _forward(self, **arguments: Any) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(self, **arguments: Any) -> None: ...


class Flash2(Flash):
    """flash_attn 2.7 and newer."""

    module, installed_with = "flash_attn.flash_attn_interface", "flash_attn_2_cuda"

    def _forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse, *_ = import_module(self.module)._flash_attn_varlen_forward(dropout_p=0.0, causal=True, **arguments)
        return out, lse

    def _backward(self, **arguments: Any) -> None:
        import_module(self.module)._flash_attn_varlen_backward(
            dropout_p=0.0, causal=True, alibi_slopes=None, **arguments
        )


class Flash3(Flash):
    """flash_attn 3 (the folder hopper of its repository), since it takes a window as two numbers.

    Its backward hangs on a branch without queries or keys (flash-attention #1254): the packer makes none, and what
    lies on the CPU is checked.
    """

    module = installed_with = "flash_attn_interface"

    def refusal(self, case: Case) -> str | None:
        """Why this back end cannot serve a case, or None."""
        reason = super().refusal(case)
        if reason is None and torch.cuda.get_device_capability(case.device) != (9, 0):
            return "needs a GPU of capability 9.0 (Hopper)"
        return reason

    def _forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse, *_ = import_module(self.module)._flash_attn_forward(causal=True, **arguments)
        return out, lse

    def _backward(self, **arguments: Any) -> None:
        import_module(self.module)._flash_attn_backward(is_causal=True, **arguments)


def _arguments(layout: Layout, scores: Scores) -> dict[str, Any]:
    """What both versions call by the same names."""
    left, right = window_size(scores.window)
    return {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "max_seqlen_q": layout.max_seqlen_q,
        "max_seqlen_k": layout.max_seqlen_k,
        "softmax_scale": scores.scale,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": scores.softcap or 0.0,
    }


@cache
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None
