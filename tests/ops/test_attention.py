"""`shared_prefix_attention` against a dense float64 computation that knows branches only as lists of rows."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import shared_prefix_attention

op = importlib.import_module("selm_fast.ops.attention")


@dataclass(frozen=True)
class Layout:
    """Branches over T rows: for each, its query rows and its key rows."""

    queries: list[list[int]]
    keys: list[list[int]]

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.queries))

    def arguments(self) -> dict[str, Any]:
        """The op's description of the layout."""

        def offsets(rows: list[list[int]]) -> Tensor:
            return torch.tensor([0, *map(len, rows)]).cumsum(0).int()

        return {
            "kv_index": torch.tensor([row for rows in self.keys for row in rows]),
            "cu_seqlens_q": offsets(self.queries),
            "cu_seqlens_k": offsets(self.keys),
            "max_seqlen_q": max(map(len, self.queries)),
            "max_seqlen_k": max(map(len, self.keys)),
        }


def layout(*groups: tuple[int, ...]) -> Layout:
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
    return Layout(queries, keys)


LAYOUTS = {
    "one branch": layout((4, 3)),
    "a group of three": layout((5, 4, 3, 6)),
    "one-token prompts": layout((1, 3, 4), (1, 1, 1, 1)),
    "one-token responses": layout((6, 1, 1, 1), (2, 1, 5)),
    "many": layout((7, 9, 2), (1, 1), (12, 5, 8, 1), (3, 4)),
    "one row": layout((1, 1)),
    # Keys need not be a prompt's: any rows, in any order, and the same row for two branches and twice for one.
    "arbitrary keys": Layout([[0, 1, 2], [3, 4], [5]], [[2, 0, 0, 1, 2], [4, 3, 1, 3, 4], [0, 5]]),
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
    q: Tensor, k: Tensor, v: Tensor, rows: Layout, *, window: int | None = None, softcap: float | None = None
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


def inputs(rows: Layout, heads: str, dtype: torch.dtype = torch.float32, size: int = 8, seed: int = 0) -> list[Tensor]:
    """q, k, v and an upstream gradient; as a model's, they are views with the heads outermost in memory."""
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


def ours(rows: Layout) -> Any:
    """The op with a layout filled in."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return shared_prefix_attention(q, k, v, **rows.arguments(), scale=SCALE, **extra)

    return attend


@pytest.fixture(params=["flash", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the op on a CPU: torch's flash kernel, and the plain computation."""
    if request.param == "plain":
        monkeypatch.setattr(op, "_uses_flash", lambda q, softcap: False)
    return request.param


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("path")
def test_output_and_gradients_are_those_of_dense_float64(name: str, setting: str, heads: str) -> None:
    rows = LAYOUTS[name]
    tensors = inputs(rows, heads)
    got = run(ours(rows), tensors, **SETTINGS[setting])
    exact = run(dense, [t.double() for t in tensors], rows, **SETTINGS[setting])
    for value, expected in zip(got, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=3e-6)


def test_the_plain_path_in_float64_is_exact() -> None:
    rows = LAYOUTS["many"]
    for setting in SETTINGS.values():
        tensors = [t.double() for t in inputs(rows, "gqa")]
        branch = rows.arguments()
        start = branch["cu_seqlens_k"].tolist()
        q, k, v = tensors[:3]
        parts = []
        for nth, queries in enumerate(rows.queries):
            index = branch["kv_index"][start[nth] : start[nth + 1]]
            cap, window = setting.get("softcap"), setting.get("window")
            parts.append(op.branch_attention(q[queries], k[index], v[index], scale=SCALE, window=window, softcap=cap))
        torch.testing.assert_close(torch.cat(parts), dense(q, k, v, rows, **setting), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setting", ["plain", "window", "softcap"])
@pytest.mark.usefixtures("path")
def test_16_bit_errors_are_at_most_twice_those_of_separate_sequences_through_torch(
    setting: str, dtype: torch.dtype
) -> None:
    """Against fp64: rms error of the output and of every gradient; a shared key's gradient is summed in fp32."""
    rows = layout((30, 12, 9, 17), (25, 20, 3))
    tensors = inputs(rows, "gqa", dtype, size=16)
    settings = SETTINGS[setting]
    exact = run(dense, [t.double() for t in tensors], rows, **settings)
    got = run(ours(rows), tensors, **settings)
    torchs = run(_separately, tensors, rows, **settings)
    for value, own, expected in zip(got, torchs, exact, strict=True):
        assert value.dtype == dtype
        error, own_error = ((t.double() - expected).square().mean().sqrt().item() for t in (value, own))
        assert error <= 2 * own_error, (error, own_error)


def _separately(
    q: Tensor, k: Tensor, v: Tensor, rows: Layout, *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Each branch through ordinary torch operations in the inputs' dtype, as an eager model would."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for queries, keys in zip(rows.queries, rows.keys, strict=True):
        kb, vb = (t[keys].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q[queries].transpose(0, 1) @ kb.transpose(1, 2) * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(keys))
        last = place[len(keys) - len(queries) :].unsqueeze(1)
        seen = (place <= last) & (place > last - (window or len(keys)))
        weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)
        parts.append((weights @ vb).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.usefixtures("path")
def test_gradients_of_a_shared_key_are_summed_in_fp32() -> None:
    """One prompt row under 64 branches, in bf16: a sum rounded at each step is off by far more than one rounding."""
    branches = 64
    rows = Layout([[n] for n in range(branches)], [[0, n] for n in range(branches)])
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(branches, 1, 16, generator=generator).bfloat16() for _ in range(4)]
    tensors[3] = tensors[3].abs()
    exact = run(dense, [t.double() for t in tensors], rows)
    got = run(ours(rows), tensors)
    shared, expected = got[3][0].double(), exact[3][0]
    # A rounding to bf16 is 2^-9 at most; each of the 64 terms has one in 2^-9 of its own size, of random signs.
    assert ((shared - expected).abs() <= 2**-8 * expected.abs()).all()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("path")
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, setting: str) -> None:
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa", dtype)
    first, second = (run(ours(rows), tensors, **SETTINGS[setting]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("path")
def test_a_group_does_not_see_its_neighbours() -> None:
    """Bits of a group's rows, alone and between others."""
    alone, among = layout((5, 4, 3)), layout((3, 2, 2), (5, 4, 3), (8, 1))
    tensors = inputs(among, "gqa")
    inside = slice(6, 6 + alone.num_rows)
    got = run(ours(among), tensors)
    single = run(ours(alone), [t[inside] for t in tensors])
    for packed, own in zip(got, single, strict=True):
        assert torch.equal(packed[inside], own)


def test_contiguous_inputs_give_the_same() -> None:
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa")
    got = run(ours(rows), tensors)
    again = run(ours(rows), [t.contiguous() for t in tensors])
    for one, other in zip(got, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.usefixtures("path")
def test_inputs_may_be_frozen(frozen: int) -> None:
    rows = LAYOUTS["a group of three"]
    tensors = inputs(rows, "gqa")
    full = run(ours(rows), tensors)[1:]
    leaves = [t.clone().requires_grad_(nth != frozen) for nth, t in enumerate(tensors[:3])]
    ours(rows)(*leaves).backward(tensors[3])
    for nth, leaf in enumerate(leaves):
        assert leaf.grad is None if nth == frozen else torch.equal(leaf.grad, full[nth])


@pytest.mark.parametrize("setting", ["plain", "window", "softcap"])
def test_the_custom_op_is_sound(setting: str) -> None:
    """Schema, fake kernels and autograd registration, under dynamic shapes too."""
    rows = LAYOUTS["a group of three"]
    arguments = rows.arguments()
    q, k, v, _ = (t.detach().requires_grad_() for t in inputs(rows, "gqa"))
    window, softcap = SETTINGS[setting].get("window", -1), SETTINGS[setting].get("softcap", 0.0)
    torch.library.opcheck(
        torch.ops.selm_fast.shared_prefix_attention.default,
        (q, k, v, arguments["kv_index"], arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], SCALE, window, softcap),
    )


def test_the_fake_kernel_gives_shapes_dtypes_and_strides() -> None:
    rows = LAYOUTS["a group of three"]
    tensors = [t.bfloat16() for t in inputs(rows, "gqa")]
    real = ours(rows)(*tensors[:3])
    meta = ours(replace(rows))(*(t.to("meta") for t in tensors[:3]))
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def _invalid() -> list[tuple[str, dict[str, Any]]]:
    t = torch.zeros
    return [
        ("q must be", {"q": t(3, 8)}),
        ("q must be", {"k": t(3, 8), "v": t(3, 8)}),
        ("q must be", {"v": t(4, 2, 8)}),
        ("q must be", {"q": t(3, 4, 16)}),
        ("q must be", {"q": t(3, 3, 8)}),
        ("cu_seqlens_q and cu_seqlens_k", {"cu_seqlens_q": torch.tensor([0, 2, 3])}),
        (
            "cu_seqlens_q and cu_seqlens_k",
            {"cu_seqlens_q": torch.tensor([[0, 3]]), "cu_seqlens_k": torch.tensor([[0, 3]])},
        ),
        ("at least as many keys as queries", {"max_seqlen_q": 4}),
        ("window must be at least 1", {"window": 0}),
        ("window must be at least 1", {"window": -1}),
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
