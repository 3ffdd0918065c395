"""The attention function that lets transformers models read packed batches, and the metadata that reaches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from selm_fast.batch import PackedBatch
from selm_fast.ops import shared_prefix_attention

# transformers treats names with "flash", "sdpa", "flex_attention" or "/" in a special way.
NAME = "selm_shared_prefix"


def packed_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments of a model's forward that carry a batch's layout to every layer."""
    return {
        "selm_kv_index": batch.kv_index,
        "selm_cu_seqlens_q": batch.cu_seqlens_q,
        "selm_cu_seqlens_k": batch.cu_seqlens_k,
        "selm_max_seqlen_q": batch.max_seqlen_q,
        "selm_max_seqlen_k": batch.max_seqlen_k,
    }


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    selm_kv_index: Tensor | None = None,
    selm_cu_seqlens_q: Tensor | None = None,
    selm_cu_seqlens_k: Tensor | None = None,
    selm_max_seqlen_q: int = 0,
    selm_max_seqlen_k: int = 0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `shared_prefix_attention`: query (1, H, T, Dh) -> (1, T, H, Dh).

    Raises ValueError without packed metadata (a padding mask would be dropped in silence), for a mask, dropout or
    attention sinks.
    """
    if selm_kv_index is None or selm_cu_seqlens_q is None or selm_cu_seqlens_k is None:
        raise ValueError(
            f"attention {NAME!r} reads packed batches only and got no packed metadata: call "
            "Policy.token_logps(batch), or "
            'model.set_attn_implementation("sdpa") before using the model by itself'
        )
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes its mask from the packed batch; got an attention_mask as well")
    if dropout > 0 or s_aux is not None:
        what = f"dropout {dropout}" if dropout > 0 else "attention sinks"
        raise ValueError(f"attention {NAME!r} has no {what}: branches that share a prompt could not share it")
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row of T tokens; got a batch of {query.shape[0]}")
    out = shared_prefix_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        selm_kv_index,
        selm_cu_seqlens_q,
        selm_cu_seqlens_k,
        selm_max_seqlen_q,
        selm_max_seqlen_k,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
