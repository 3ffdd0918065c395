"""Attention in C++ against torch's own kernels, both against float64, for every instruction set of the processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import attention_cpp, attention_flash_cpu, attention_reference
from selm_fast.ops.attention_layout import Layout, Scores

from .attention_layouts import LAYOUTS, SCALE, SETTINGS, Rows, dense, layout, run, separately
from .cpp_cases import CPP, variant
from .triton_cases import assert_as_accurate

__all__ = ["variant"]
pytestmark = [CPP, pytest.mark.usefixtures("variant")]

PLAIN = Scores(SCALE, None, None)
# Both sides of a tile of 64 queries and of one and two blocks of 96 keys, and of what these are rounded to.
LONG = layout((70, 65, 5, 33), (1, 1, 2), (27, 163, 64, 97), (96, 1, 95), (8, 57, 9))
# As LONG, but that keys come in any order, some of them twice and from other groups, and that a row has no reader.
SHUFFLED = Rows(
    [list(range(0, 100)), list(range(100, 140)), [140], [141]],
    [[(n * 37) % 140 for n in range(123)], [n % 7 for n in range(64)], [5], [0, 140]],
)
HEADS = {"1 for 1": (2, 2), "3 for 1": (6, 2), "8 for 1": (8, 1)}
SIZES = [1, 2, 4, 7, 8, 16, 20, 32, 33, 48, 64, 80, 96, 128]


def make(rows: Rows, heads: str, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and an upstream gradient; at SCALE the scores spread over some units whatever the size."""
    generator = torch.Generator().manual_seed(size)
    num_heads, num_key_heads = HEADS[heads]
    tensors = [
        torch.randn(rows.num_rows, n, size, generator=generator)
        for n in (num_heads, num_key_heads, num_key_heads, num_heads)
    ]
    tensors[0] *= 5 * size**-0.5
    return [t.to(dtype) for t in tensors]


def attend(backend: Any, tensors: list[Tensor], rows: Rows, scores: Scores = PLAIN) -> list[Tensor]:
    """Output, gradients of q, k, v, and the logsumexp."""
    q, k, v, grad = tensors
    where = Layout(**rows.arguments())
    out, lse = backend.forward(q, k, v, where, scores)
    grads = backend.backward(grad, q, k, v, out, lse, where, scores)
    return [out, *grads, lse]


def assert_accurate(tensors: list[Tensor], rows: Rows, **setting: Any) -> None:
    """Errors of everything are at most twice those of torch in the same dtype."""
    scores = Scores(SCALE, setting.get("window"), setting.get("softcap"))
    peer = attention_reference if scores.softcap else attention_flash_cpu
    got, torchs = (attend(backend, tensors, rows, scores) for backend in (attention_cpp, peer))
    exact = attend(attention_reference, [t.double() for t in tensors], rows, scores)
    for value, own, right in zip(got, torchs, exact, strict=True):
        assert value.is_contiguous()
        assert_as_accurate(value, own, right.double())


# Sizes in CI: those with a whole block, a ragged one, and less than one.
SOME_SIZES = [size if size in (1, 7, 33, 64, 128) else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]


@pytest.mark.parametrize("size", SOME_SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_head_sizes_and_groups(heads: str, size: int) -> None:
    assert_accurate(make(LONG, heads, size), LONG)


# With one key in sight dS is 0: rounding errors of the flash kernels' formula, and of the reference's none.
WINDOWS = [(1, None), *((size, softcap) for size in (2, 3, 17, 63, 64, 65, 96, 100, 1000) for softcap in (None, 1.5))]


@pytest.mark.parametrize(("window", "softcap"), WINDOWS)
def test_windows_and_softcaps(window: int, softcap: float | None) -> None:
    """A narrow window hides the first keys of a tile from its last queries, a whole block of them among them."""
    assert_accurate(make(LONG, "3 for 1", 16), LONG, window=window, softcap=softcap)


@pytest.mark.parametrize("level", [-27.0, 27.0])
def test_scores_far_from_0(level: float) -> None:
    """Near -200 and 200, which an online maximum that begins at 0 would lose."""
    tensors = make(LONG, "3 for 1", 16)
    tensors[0][..., 0], tensors[1][..., 0] = 20.0, level
    assert_accurate(tensors, LONG)


@pytest.mark.parametrize("setting", SETTINGS)
def test_keys_in_any_order(setting: str) -> None:
    assert_accurate(make(SHUFFLED, "3 for 1", 20), SHUFFLED, **SETTINGS[setting])
    assert not any(t[141].any() for t in attend(attention_cpp, make(SHUFFLED, "3 for 1", 20), SHUFFLED)[2:4])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiny_branches(name: str, setting: str) -> None:
    rows = LAYOUTS[name]
    tensors = make(rows, "3 for 1", 8)
    window, softcap = SETTINGS[setting].get("window"), SETTINGS[setting].get("softcap")
    got = attend(attention_cpp, tensors, rows, Scores(SCALE, window, softcap))
    exact = run(dense, [t.double() for t in tensors], rows, **SETTINGS[setting])
    for value, right in zip(got, exact, strict=False):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 20])
def test_16_bits_are_widened_and_rounded_once(size: int, dtype: torch.dtype) -> None:
    """All bits are those of the computation in fp32, rounded; and so the errors are torch's at most."""
    tensors = make(LONG, "3 for 1", size, dtype)
    q, k, v, grad = wide = [t.float() for t in tensors]
    where = Layout(**LONG.arguments())
    out, lse = attention_cpp.forward(q, k, v, where, PLAIN)
    grads = attention_cpp.backward(grad, q, k, v, out.to(dtype).float(), lse, where, PLAIN)
    got = attend(attention_cpp, tensors, LONG)
    assert torch.equal(got[-1], lse)
    for value, right in zip(got, [out, *grads], strict=False):
        assert torch.equal(value, right.to(dtype))
    exact, torchs = run(separately, [t.double() for t in wide], LONG), run(separately, tensors, LONG)
    for value, own, right in zip(got, torchs, exact, strict=False):
        assert_as_accurate(value, own, right)


class TestStrides:
    """Bits do not depend on where numbers lie."""

    @pytest.mark.parametrize("size", [16, 20])
    def test_of_tensors_that_are_views(self, size: int) -> None:
        tensors = make(LONG, "3 for 1", size)
        right = attend(attention_cpp, tensors, LONG)
        heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
        sizes_first = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in tensors]
        together = torch.cat([t.flatten(1) for t in tensors], 1)  # as one projection to all of them gives them
        ends = torch.tensor([t.shape[1] * size for t in tensors]).cumsum(0).tolist()[:-1]
        parts = [part.unflatten(1, (-1, size)) for part in together.tensor_split(ends, 1)]
        for views in (heads_first, sizes_first, parts):
            assert not views[0].is_contiguous()
            for value, expected in zip(attend(attention_cpp, views, LONG), right, strict=True):
                assert value.is_contiguous() and torch.equal(value, expected)

    def test_of_an_expanded_gradient(self) -> None:
        """As that of a sum is: one number, with strides of 0."""
        tensors = make(LONG, "3 for 1", 16)
        ones = torch.ones(()).expand(tensors[3].shape)
        for value, right in zip(
            attend(attention_cpp, [*tensors[:3], ones], LONG),
            attend(attention_cpp, [*tensors[:3], ones.contiguous()], LONG),
            strict=True,
        ):
            assert torch.equal(value, right)

    def test_of_a_logsumexp_and_offsets_of_another_kind(self) -> None:
        q, k, v, grad = make(LONG, "3 for 1", 16)
        where = Layout(**LONG.arguments())
        out, lse = attention_cpp.forward(q, k, v, where, PLAIN)
        right = attention_cpp.backward(grad, q, k, v, out, lse, where, PLAIN)
        where = where._replace(
            kv_index=where.kv_index.repeat_interleave(2)[::2],
            cu_seqlens_q=where.cu_seqlens_q.long(),
            cu_seqlens_k=where.cu_seqlens_k.repeat_interleave(3)[::3],
        )
        for value, expected in zip(
            attention_cpp.backward(grad, q, k, v, out, lse.T.contiguous().T, where, PLAIN), right, strict=True
        ):
            assert torch.equal(value, expected)


class TestBits:
    @pytest.mark.parametrize("rows", [LONG, SHUFFLED, layout((40, 300))], ids=["many", "any order", "one branch"])
    @pytest.mark.parametrize("heads", HEADS)
    def test_do_not_depend_on_the_number_of_threads(self, heads: str, rows: Rows) -> None:
        tensors = make(rows, heads, 32)
        one = attend(attention_cpp, tensors, rows)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for value, right in zip(attend(attention_cpp, tensors, rows), one, strict=True):
                assert torch.equal(value, right)

    def test_are_those_of_the_instruction_set_that_was_chosen(self, variant: str) -> None:
        """Each adds up in vectors of its own length."""
        tensors = make(LONG, "3 for 1", 64)
        own = attend(attention_cpp, tensors, LONG)
        for other in set(torch.ops.selm_fast_cpp.variants()) - {variant}:
            torch.ops.selm_fast_cpp.set_variant(other)
            assert not torch.equal(attend(attention_cpp, tensors, LONG)[1], own[1])

    def test_of_a_shared_row_are_a_sum_in_the_order_of_the_keys(self) -> None:
        """1 + 2^24 - 2^24 is 0 in this order, and 1 in others."""
        rows = Rows([[0], [1], [2]], [[0], [0], [0]])
        q, k, v, _ = make(rows, "1 for 1", 16)
        for numbers, total in (([1.0, 2.0**24, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1.0], 1.0)):
            grad = torch.tensor(numbers).view(3, 1, 1).expand(q.shape)
            dv = attend(attention_cpp, [q, k, v, grad], rows)[3]
            assert dv[0].eq(total).all() and not dv[1:].any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_shows_where_it_is_seen_and_nowhere_else(which: int) -> None:
    """In a query it is that query's; in a key, that of the branches that read it."""
    rows = layout((70, 65, 5), (9, 3))
    tensors = make(rows, "3 for 1", 16)
    clean = attend(attention_cpp, tensors, rows)[0]
    tensors[which][136, 0] = torch.nan  # of the second branch, which nobody else reads
    got = attend(attention_cpp, tensors, rows)[0]
    wrong = got.isnan().flatten(1).any(1)
    assert wrong[136] and not wrong[:134].any() and not wrong[139:].any()
    assert torch.equal(got[~wrong], clean[~wrong])


def _misfits() -> list[tuple[type[Exception], str, dict[str, Any]]]:
    t, offsets = torch.zeros, torch.tensor
    return [
        (ValueError, "q must be .*H a multiple of Hk", {"q": t(3, 3, 8)}),
        (ValueError, "q must be .*H a multiple of Hk", {"k": t(3, 0, 8), "v": t(3, 0, 8)}),
        (ValueError, "q must be .*H a multiple of Hk", {"q": t(3, 8)}),
        (ValueError, r"k must be \[3, 2, 8\] Float; got \[2, 2, 8\]", {"k": t(2, 2, 8)}),
        (ValueError, "k must be .* got .* Half", {"k": t(3, 2, 8).half()}),
        (ValueError, r"v must be \[3, 2, 8\]", {"v": t(3, 2, 7)}),
        (ValueError, r"q must be \[3, 4, 7\]|k must be \[3, 2, 7\]", {"q": t(3, 4, 7)}),
        (ValueError, "q must be fp32, bf16 or fp16", {n: t(3, h, 8).double() for n, h in zip("qkv", (4, 2, 2))}),  # noqa: B905
        (ValueError, "cu_seqlens_q must be one row of integers", {"cu_seqlens_q": offsets([[0, 2, 3]])}),
        (ValueError, "cu_seqlens_k must be one row of integers", {"cu_seqlens_k": offsets([0.0, 2.0, 4.0])}),
        (ValueError, "kv_index must be one row of integers", {"kv_index": t(4)}),
        (ValueError, r"must both be \(B\+1,\)", {"cu_seqlens_q": offsets([0, 3])}),
        (ValueError, r"must both be \(B\+1,\)", {"cu_seqlens_q": offsets([]).int(), "cu_seqlens_k": offsets([]).int()}),
        (ValueError, "cu_seqlens_q must rise from 0 to 3; got 1 to 3", {"cu_seqlens_q": offsets([1, 2, 3])}),
        (ValueError, "cu_seqlens_q must rise from 0 to 3; got 0 to 4", {"cu_seqlens_q": offsets([0, 2, 4])}),
        (ValueError, "cu_seqlens_k must rise from 0 to 4; got -1 to 4", {"cu_seqlens_k": offsets([-1, 2, 4])}),
        (ValueError, "cu_seqlens_k must rise from 0 to 4; got 0 to 5", {"cu_seqlens_k": offsets([0, 2, 5])}),
        (
            ValueError,
            "branch 1 has -1 queries",
            {"cu_seqlens_q": offsets([0, 4, 3]), "cu_seqlens_k": offsets([0, 4, 4])},
        ),
        (ValueError, "branch 0 has 0 queries", {"cu_seqlens_q": offsets([0, 0, 3])}),
        (ValueError, "branch 0 has 2 queries and 1 keys", {"cu_seqlens_k": offsets([0, 1, 4])}),
        (ValueError, "branch 1 has 1 queries and -1 keys", {"cu_seqlens_k": offsets([0, 5, 4])}),
        (IndexError, "kv_index must name rows below 3", {"kv_index": offsets([0, 1, 3, 2])}),
        (IndexError, "kv_index must name rows below 3", {"kv_index": offsets([0, -1, 1, 2])}),
    ]


GOOD = {
    "q": torch.zeros(3, 4, 8),
    "k": torch.zeros(3, 2, 8),
    "v": torch.zeros(3, 2, 8),
    "kv_index": torch.tensor([0, 1, 0, 2]),
    "cu_seqlens_q": torch.tensor([0, 2, 3]),
    "cu_seqlens_k": torch.tensor([0, 2, 4]),
}


@pytest.mark.parametrize(("error", "message", "changed"), _misfits())
def test_what_does_not_fit_is_refused_before_it_is_read(
    error: type[Exception], message: str, changed: dict[str, Any]
) -> None:
    q, k, v, *where = (GOOD | changed).values()
    with pytest.raises(error, match=message):
        torch.ops.selm_fast_cpp.attention(q, k, v, *where, 1.0, -1, 0.0)
    with pytest.raises(error, match=message):
        torch.ops.selm_fast_cpp.attention_backward(q, q, k, v, q, torch.zeros(4, 3), *where, 1.0, -1, 0.0)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("grad", torch.zeros(2, 4, 8)), ("out", torch.zeros(3, 4, 8).bfloat16()), ("lse", torch.zeros(3, 4))],
)
def test_backward_refuses_results_of_another_call(name: str, changed: Tensor) -> None:
    q, k, v, *where = GOOD.values()
    given = {"grad": q, "q": q, "k": k, "v": v, "out": q, "lse": torch.zeros(4, 3)}
    torch.ops.selm_fast_cpp.attention_backward(*given.values(), *where, 1.0, -1, 0.0)
    with pytest.raises(ValueError, match=f"{name} must be "):
        torch.ops.selm_fast_cpp.attention_backward(*(given | {name: changed}).values(), *where, 1.0, -1, 0.0)


def test_no_branches_are_no_error() -> None:
    q, k, none = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8), torch.zeros(0, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int32)
    out, lse = torch.ops.selm_fast_cpp.attention(q, k, k, none, start, start, 1.0, -1, 0.0)
    grads = torch.ops.selm_fast_cpp.attention_backward(q, q, k, k, out, lse, none, start, start, 1.0, -1, 0.0)
    assert [tuple(t.shape) for t in (out, lse, *grads)] == [(0, 4, 8), (4, 0), (0, 4, 8), (0, 2, 8), (0, 2, 8)]
