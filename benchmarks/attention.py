"""Shared-prefix attention by back end, on groups as long as preference data are, with the heads of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.exact import DTYPES, relative_error
from benchmarks.judge import Checked, Contestant, hold
from benchmarks.peers import BACKWARD, NO_GRAD
from selm_fast.ops import shared_prefix_attention
from selm_fast.ops.attention_choice import BACKENDS
from selm_fast.ops.attention_layout import Case

HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128
GROUPS = {"cpu": 1, "cuda": 8}
PROMPT, RESPONSE = 218, 340  # mean tokens in UltraFeedback; lengths here spread by half
OP = "shared_prefix_attention"

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Packed(NamedTuple):
    """The arguments of the op behind q, k and v."""

    kv_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def layout(groups: int, device: str) -> Packed:
    """Groups of a prompt and three responses: the first goes on from the prompt, others from a copy of its last row."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, kv_index, row = [0], [0], list[int](), 0
    for _ in range(groups):
        shares = 0.5 + torch.rand(4, generator=generator)
        prompt, *responses = (shares * torch.tensor([PROMPT, *[RESPONSE] * 3])).int().tolist()
        first = row
        for nth, response in enumerate(responses):
            own = range(row, row + response + (prompt - 1 if nth == 0 else 0))
            kv_index += [*range(first, first + prompt - 1 if nth else first), *own]
            row = own.stop
            queries.append(row)
            keys.append(len(kv_index))
    longest_q, longest_k = (max(end - start for start, end in pairwise(ends)) for ends in (queries, keys))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (queries, keys))
    return Packed(torch.tensor(kv_index, device=device), cu_q, cu_k, longest_q, longest_k)


def by_branch(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Torch's own: SDPA and autograd for each branch, masked where it has more keys than queries. The yardstick."""
    keys, values = k[packed.kv_index], v[packed.kv_index]
    parts = []
    for (q0, q1), (k0, k1) in zip(
        pairwise(packed.cu_seqlens_q.tolist()), pairwise(packed.cu_seqlens_k.tolist()), strict=True
    ):
        qb, kb, vb = (t.transpose(0, 1).unsqueeze(0) for t in (q[q0:q1], keys[k0:k1], values[k0:k1]))
        square = q1 - q0 == k1 - k0
        mask = None
        if not square:
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(k1 - k0 - (q1 - q0))
        out = scaled_dot_product_attention(qb, kb, vb, attn_mask=mask, is_causal=square, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def check(device: str, dtype: str) -> Iterator[Checked]:
    """Every back end that serves this device and dtype, held against the reference in float64."""
    packed = layout(GROUPS[device], device)
    rows = int(packed.cu_seqlens_q[-1])
    generator = torch.Generator(device).manual_seed(1)
    q, k, v, upstream = (
        torch.randn(rows, heads, HEAD_SIZE, device=device, generator=generator).to(DTYPES[dtype])
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )

    def op(backend: str) -> Forward:
        return partial(_op, packed=packed, backend=backend)

    high = tuple(t.double() for t in (q, k, v))
    expected = _forward_and_backward(op("torch"), high, upstream.double())
    forwards: dict[str, Forward] = {"torch SDPA by branch": partial(by_branch, packed=packed)}
    forwards |= {f"selm_fast {name}": op(name) for name in BACKENDS if _serves(name, q)}
    forward_flops = 4.0 * HEADS * HEAD_SIZE * _pairs(packed)
    torchs: dict[str, float] = {}
    for name, forward in forwards.items():
        for kind in (NO_GRAD, BACKWARD):
            call: Any = partial(_no_grad, forward, (q, k, v))
            if kind == BACKWARD:
                call = partial(_forward_and_backward, forward, (q, k, v), upstream)
            contestant = Contestant(
                op=OP,
                name=name,
                kind=kind,
                ours=name.startswith("selm_fast"),
                per_token=True,
                matmuls=None,
                flops=forward_flops * (1.0 if kind == NO_GRAD else 3.5),
                moved=(q.nbytes + k.nbytes) * (2.0 if kind == NO_GRAD else 6.0),
                call=call,
                shown=_named,
            )
            errors = partial(_errors, expected)
            yield hold(contestant, errors, torchs, dtype, is_yardstick=not contestant.ours)


def unchecked(reason: str) -> Checked:
    """The row of an op that nothing is known of."""
    contestant = Contestant(
        op=OP,
        name="selm_fast",
        kind=BACKWARD,
        ours=True,
        per_token=True,
        matmuls=None,
        flops=0.0,
        moved=0.0,
        call=tuple,
        shown=_named,
    )
    return Checked(contestant=contestant, errors={}, of_torchs={}, problems=[reason], results={})


def _op(q: Tensor, k: Tensor, v: Tensor, packed: Packed, backend: str) -> Tensor:
    return shared_prefix_attention(q, k, v, *packed, scale=HEAD_SIZE**-0.5, backend=backend)


def _serves(backend: str, q: Tensor) -> bool:
    """Is the back end here, for this device and dtype? One that is, and fails its self-test, is wrong."""
    case = Case(q.device, q.dtype, HEADS, KEY_HEADS, HEAD_SIZE, window=False, softcap=False)
    return BACKENDS[backend].refusal(case) is None


def _no_grad(forward: Forward, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (forward(*tensors),)


def _forward_and_backward(forward: Forward, tensors: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = forward(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


def _errors(expected: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> dict[str, float]:
    right = _named(expected)
    return {name: relative_error(got, right[name]) for name, got in _named(outputs).items()}


def _named(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("output", "q", "k", "v"), outputs, strict=False))


def _pairs(packed: Packed) -> float:
    """Query-key pairs that the causal mask lets through."""
    queries, keys = (cu.diff().double() for cu in (packed.cu_seqlens_q, packed.cu_seqlens_k))
    return (queries * (keys - queries) + queries * (queries + 1) / 2).sum().item()
