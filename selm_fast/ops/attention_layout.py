"""What every attention back end is given besides q, k and v: which rows a branch sees, and what its scores become."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """B branches over T packed rows; branch b owns cu_seqlens[b] to cu_seqlens[b+1].

    Its queries are rows of q themselves; its keys are the rows that `kv_index` names. The causal mask is aligned
    bottom-right: the last query sees the last key.
    """

    kv_index: Tensor  # (Tk,) int64
    cu_seqlens_q: Tensor  # (B+1,) int32
    cu_seqlens_k: Tensor  # (B+1,) int32
    max_seqlen_q: int
    max_seqlen_k: int

    def branches(self) -> list[tuple[int, int, int, int]]:
        """First query, number of queries, first key and number of keys of every branch. Waits for the device."""
        q, k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        return [(q0, q1 - q0, k0, k1 - k0) for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False)]


class Scores(NamedTuple):
    """scores = softcap * tanh(scale * q k^T / softcap); a query sees `window` keys, its own among them."""

    scale: float
    window: int | None
    softcap: float | None


class Case(NamedTuple):
    """What decides which back end serves: a self-test passed for one case says nothing of another."""

    device: torch.device
    dtype: torch.dtype
    heads: int  # H
    key_heads: int  # Hk
    head_size: int  # Dh
    window: bool
    softcap: bool
