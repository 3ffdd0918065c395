"""The one place that decides which back end serves attention, and the test that each must pass before it does."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from selm_fast.ops import (
    attention_cpp,
    attention_flash,
    attention_flash_cpu,
    attention_reference,
    attention_varlen,
)
from selm_fast.ops.attention_layout import Case, Layout, Scores


class Backend(Protocol):
    """What a back end offers; q (T, H, Dh), k and v (T, Hk, Dh)."""

    def refusal(self, case: Case) -> str | None:
        """Why it cannot serve a case, or None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
        """-> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by q, k and v, contiguous."""


# The first that can serve a case and passes its test does so.
BACKENDS: dict[str, Backend] = {
    "varlen": attention_varlen,
    "flash_attn_3": attention_flash.Flash3(),
    "flash_attn": attention_flash.Flash2(),
    "cpp": attention_cpp,
    "flash_cpu": attention_flash_cpu,
    "torch": attention_reference,
}

# Largest error of a row in the self-test, as a share of the mean row. torch's 16-bit kernels for CPUs come to half of
# it, its fp32 kernels to a thirtieth; a key too many or too few of the nine in the window moves its rows by a third.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
WINDOW = 9
SOFTCAP = 1.5


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is no back end's."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}; got {backend!r}")


@cache
def choose(backend: str, case: Case) -> str:
    """The name of the back end that serves a case; "auto" is the first that can and passes the self-test.

    Warns of one that fails it. Raises ValueError where the back end asked for cannot serve the case, RuntimeError where
    it fails the self-test.
    """
    check_name(backend)
    if backend != "auto":
        reason = BACKENDS[backend].refusal(case)
        if reason is not None:
            raise ValueError(f"attention back end {backend!r} {reason}")
        error = failure(backend, case)
        if error is not None:
            raise RuntimeError(f"attention back end {backend!r} fails its self-test on this machine: {error}")
        return backend
    for name, candidate in BACKENDS.items():
        if candidate.refusal(case) is not None:
            continue
        error = failure(name, case)
        if error is None:
            return name
        warnings.warn(
            f"attention back end {name!r} fails its self-test and is not used: {error}", RuntimeWarning, stacklevel=2
        )
    raise AssertionError("the reference serves every case")


def serving(backend: str, case: Case) -> Backend:
    """The back end that `choose` names."""
    return BACKENDS[choose(backend, case)]


@cache
def failure(name: str, case: Case) -> str | None:
    """How a back end differs from the reference on a small layout, or None.

    The layout has branches with fewer queries than keys (alignment), heads that differ (their pairing), rows of one
    branch read by another (the gather's backward) and more rows than a kernel's tile.
    """
    backend = BACKENDS[name]
    if backend is attention_reference:
        return None
    scores = Scores(1.5 * case.head_size**-0.5, WINDOW if case.window else None, SOFTCAP if case.softcap else None)
    layout, tensors = _problem(case)
    expected = _run(attention_reference, [t.float() for t in tensors], layout, scores)
    try:
        got = _run(backend, tensors, layout, scores)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel that is missing or was built otherwise says so in many ways
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for what, value, right in zip(("output", "dq", "dk", "dv", "logsumexp"), got, expected, strict=True):
        if value.shape != right.shape or not value.is_contiguous():
            return (
                f"{what} is {tuple(value.shape)}, strides {value.stride()}; expected {tuple(right.shape)}, contiguous"
            )
        distance = ((value.float() - right).flatten(1).norm(dim=1).max() / right.flatten(1).norm(dim=1).mean()).item()
        if not distance <= TOLERANCE[case.dtype]:
            return f"error of the {what} is {distance:.2g} of its size (at most {TOLERANCE[case.dtype]:.2g} expected)"
    return None


def _problem(case: Case) -> tuple[Layout, list[Tensor]]:
    """Two groups, with prompts of 70 and 1 tokens, and q, k, v and an upstream gradient."""
    queries, keys, kv_index, row = [0], [0], list[int](), 0
    for prompt, *responses in ((70, 65, 5, 33), (1, 1, 2)):
        first = row
        for nth, response in enumerate(responses):
            own = range(row, row + response + (prompt - 1 if nth == 0 else 0))
            kv_index += (*range(first, first + prompt - 1 if nth else first), *own)
            row = own.stop
            queries.append(row)
            keys.append(len(kv_index))
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(row, heads, case.head_size, generator=generator).to(case.device, case.dtype)
        for heads in (case.heads, case.key_heads, case.key_heads, case.heads)
    ]
    offsets = [torch.tensor(ends, dtype=torch.int32, device=case.device) for ends in (queries, keys)]
    longest = [max(end - start for start, end in pairwise(ends)) for ends in (queries, keys)]
    return Layout(torch.tensor(kv_index, device=case.device), offsets[0], offsets[1], longest[0], longest[1]), tensors


def _run(backend: Backend, tensors: list[Tensor], layout: Layout, scores: Scores) -> list[Tensor]:
    q, k, v, grad = tensors
    out, lse = backend.forward(q, k, v, layout, scores)
    return [out, *backend.backward(grad, q, k, v, out, lse, layout, scores), lse]
