"""What `shared_prefix_attention` refuses, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selm_fast.ops import shared_prefix_attention

from .attention_layouts import layout


def _invalid() -> list[tuple[str, dict[str, Any]]]:
    t = torch.zeros
    offsets = torch.tensor
    return [
        ("q must be", {"q": t(3, 8)}),
        ("q must be", {"k": t(3, 8), "v": t(3, 8)}),
        ("q must be", {"v": t(4, 2, 8)}),
        ("q must be", {"q": t(3, 4, 16)}),
        ("q must be", {"q": t(3, 3, 8)}),
        ("share a dtype", {"q": t(3, 4, 8).bfloat16()}),
        ("cu_seqlens_q and cu_seqlens_k", {"cu_seqlens_q": offsets([0, 2, 3])}),
        ("cu_seqlens_q and cu_seqlens_k", {"cu_seqlens_q": offsets([[0, 3]]), "cu_seqlens_k": offsets([[0, 3]])}),
        ("at least as many keys as queries", {"max_seqlen_q": 4}),
        ("window must be at least 1", {"window": 0}),
        ("window must be at least 1", {"window": -1}),
        ("softcap must be > 0", {"softcap": 0.0}),
        ("softcap must be > 0", {"softcap": float("nan")}),
        ("branch 0 has 3 queries and 3 keys.* at most max_seqlen_q = 2", {"max_seqlen_q": 2}),
        ("branch 0 has 3 queries and 3 keys.* max_seqlen_k = 2", {"max_seqlen_q": 2, "max_seqlen_k": 2}),
        ("cu_seqlens_q must rise from 0 to 3; got 0 to 2", {"cu_seqlens_q": offsets([0, 2])}),
        ("cu_seqlens_q must rise from 0 to 3; got 1 to 3", {"cu_seqlens_q": offsets([1, 3])}),
        ("cu_seqlens_k must rise from 0 to 4; got 0 to 3", {"kv_index": offsets([0, 1, 2, 2])}),
        ("backend must be one of", {"backend": "triton"}),
    ]


@pytest.mark.parametrize(("message", "changed"), _invalid())
def test_arguments_that_do_not_fit_are_refused(message: str, changed: dict[str, Any]) -> None:
    good = {
        "q": torch.zeros(3, 4, 8),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        **layout((2, 2)).arguments(),
    }
    shared_prefix_attention(**good, scale=1.0)
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**{**good, **changed}, scale=1.0)


@pytest.mark.parametrize(
    ("queries", "keys", "found"),
    [
        ([0, 3, 3], [0, 3, 4], "branch 1 has 0 queries and 1 keys"),
        ([0, 2, 3], [0, 4, 4], "branch 1 has 1 queries and 0 keys"),
        ([0, 2, 3], [0, 1, 4], "branch 0 has 2 queries and 1 keys"),
        ([0, 4, 3], [0, 3, 4], "branch 0 has 4 queries and 3 keys"),
    ],
)
def test_zero_length_branches_which_hang_the_backward_of_fa3_are_refused(
    queries: list[int], keys: list[int], found: str
) -> None:
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    offsets = (torch.tensor(ends, dtype=torch.int32) for ends in (queries, keys))
    with pytest.raises(ValueError, match=found):  # by a back end that looks at nothing itself
        shared_prefix_attention(q, k, k, torch.tensor([0, 1, 2, 2]), *offsets, 4, 4, scale=1.0, backend="torch")


def test_a_key_beyond_the_last_row_is_an_error() -> None:
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    arguments = layout((2, 2)).arguments() | {"kv_index": torch.tensor([0, 1, 3])}
    with pytest.raises(IndexError):
        shared_prefix_attention(q, k, k, **arguments, scale=1.0)
