"""What the tests of `shared_prefix_attention` share: layouts, and a dense computation that knows branches only as lists
of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops import shared_prefix_attention


@dataclass(frozen=True)
class Rows:
    """Branches over T rows: for each, its query rows and its key rows."""

    queries: list[list[int]]
    keys: list[list[int]]

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.queries))

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """The op's description of the layout."""

        def offsets(rows: list[list[int]]) -> Tensor:
            return torch.tensor([0, *map(len, rows)], device=device).cumsum(0).int()

        return {
            "kv_index": torch.tensor([row for rows in self.keys for row in rows], device=device),
            "cu_seqlens_q": offsets(self.queries),
            "cu_seqlens_k": offsets(self.keys),
            "max_seqlen_q": max(map(len, self.queries)),
            "max_seqlen_k": max(map(len, self.keys)),
        }


def layout(*groups: tuple[int, ...]) -> Rows:
    """Groups as (prompt length, response lengths...), laid out as section 4 of the design says."""
    queries: list[list[int]] = []
    keys: list[list[int]] = []
    row = 0
    for prompt, *responses in groups:
        first = row
        for nth, response in enumerate(responses):
            length = prompt + response - 1 if nth == 0 else response
            queries.append(list(range(row, row + length)))
            keys.append(queries[-1] if nth == 0 else [*range(first, first + prompt - 1), *queries[-1]])
            row += length
    return Rows(queries, keys)


LAYOUTS = {
    "one branch": layout((4, 3)),
    "a group of three": layout((5, 4, 3, 6)),
    "one-token prompts": layout((1, 3, 4), (1, 1, 1, 1)),
    "one-token responses": layout((6, 1, 1, 1), (2, 1, 5)),
    "many": layout((7, 9, 2), (1, 1), (12, 5, 8, 1), (3, 4)),
    "one row": layout((1, 1)),
    # Keys need not be a prompt's: any rows, in any order, and the same row for two branches and twice for one.
    "arbitrary keys": Rows([[0, 1, 2], [3, 4], [5]], [[2, 0, 0, 1, 2], [4, 3, 1, 3, 4], [0, 5]]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window beyond every key": {"window": 1000},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 4, "softcap": 1.5},
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}
SCALE = 0.37  # of no head size: a scale that is dropped or taken twice shows


def dense(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Branch by branch, head by head, query by query: a weighted mean over the keys that the query may see."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for queries, keys in zip(rows.queries, rows.keys, strict=True):
        for nth, row in enumerate(queries):
            last = len(keys) - len(queries) + nth  # the last query sees the last key
            seen = [
                key for place, key in enumerate(keys) if place <= last and (window is None or place > last - window)
            ]
            for head in range(q.shape[1]):
                scores = SCALE * (k[seen, head // group] @ q[row, head])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = (scores - scores.max()).exp()
                out[row, head] = (weights / weights.sum()) @ v[seen, head // group]
    return out


def separately(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Each branch through ordinary torch operations in the inputs' dtype, as an eager model would."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for queries, keys in zip(rows.queries, rows.keys, strict=True):
        kb, vb = (t[keys].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q[queries].transpose(0, 1) @ kb.transpose(1, 2) * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(keys), device=q.device)
        last = place[len(keys) - len(queries) :].unsqueeze(1)
        seen = (place <= last) & (place > last - (window or len(keys)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, torch.promote_types(q.dtype, torch.float32))
        parts.append((weights.to(q.dtype) @ vb).transpose(0, 1))
    return torch.cat(parts)


def inputs(rows: Rows, heads: str, dtype: torch.dtype = torch.float32, size: int = 8, seed: int = 0) -> list[Tensor]:
    """q, k, v and an upstream gradient; as a model's may be, they are views with the heads outermost in memory."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_key_heads = HEADS[heads]
    shapes = (num_heads, num_key_heads, num_key_heads, num_heads)
    return [torch.randn(n, rows.num_rows, size, generator=generator).to(dtype).transpose(0, 1) for n in shapes]


def run(function: Any, tensors: list[Tensor], *args: Any, **extra: Any) -> list[Tensor]:
    """Output, and gradients of q, k, v."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:3]]
    out = function(*leaves, *args, **extra)
    out.backward(tensors[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def ours(rows: Rows, backend: str = "auto", device: str = "cpu") -> Callable[..., Tensor]:
    """The op with a layout filled in."""
    arguments = rows.arguments(device)

    def attend(q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return shared_prefix_attention(q, k, v, **arguments, scale=SCALE, backend=backend, **extra)

    return attend


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()
