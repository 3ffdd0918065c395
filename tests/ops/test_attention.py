"""`shared_prefix_attention` on the CPU, against a dense float64 computation that knows branches as lists of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selm_fast.ops import extension, shared_prefix_attention
from selm_fast.ops.attention_layout import Scores
from selm_fast.ops.attention_reference import branch_forward

from .attention_layouts import LAYOUTS, SCALE, SETTINGS, Rows, dense, inputs, layout, ours, rms, run, separately

# Those of a CPU.
BACKENDS = [*(["cpp"] if extension.available() else []), "flash_cpu", "torch"]
ON_A_CPU = [(setting, backend) for setting in SETTINGS for backend in BACKENDS]
ON_A_CPU = [(setting, backend) for setting, backend in ON_A_CPU if backend != "flash_cpu" or "softcap" not in setting]


@pytest.mark.parametrize("heads", ["mha", "gqa", pytest.param("mqa", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("setting", "backend"), ON_A_CPU)
@pytest.mark.parametrize("name", LAYOUTS)
def test_output_and_gradients_are_those_of_dense_float64(name: str, setting: str, backend: str, heads: str) -> None:
    rows = LAYOUTS[name]
    tensors = inputs(rows, heads)
    got = run(ours(rows, backend), tensors, **SETTINGS[setting])
    exact = run(dense, [t.double() for t in tensors], rows, **SETTINGS[setting])
    for value, expected in zip(got, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_reference_in_float64_is_exact(setting: str) -> None:
    rows = LAYOUTS["many"]
    tensors = [t.double() for t in inputs(rows, "gqa")]
    got = run(ours(rows), tensors, **SETTINGS[setting])
    exact = run(dense, tensors, rows, **SETTINGS[setting])
    for value, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_separate_sequences_through_torch_compute_the_same(setting: str) -> None:
    """What 16-bit errors are compared with is no other function."""
    for rows in LAYOUTS.values():
        tensors = [t.double() for t in inputs(rows, "gqa")]
        for value, expected in zip(
            run(separately, tensors, rows, **SETTINGS[setting]),
            run(dense, tensors, rows, **SETTINGS[setting]),
            strict=True,
        ):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck_of_the_reference(setting: str) -> None:
    rows = LAYOUTS["arbitrary keys"]
    leaves = [t.double().requires_grad_() for t in inputs(rows, "gqa", size=4)[:3]]
    assert torch.autograd.gradcheck(lambda *t: ours(rows)(*t, **SETTINGS[setting]), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logsumexp_is_that_of_the_scores(backend: str) -> None:
    rows = LAYOUTS["a group of three"]
    q, k, v, _ = inputs(rows, "gqa")
    a = rows.arguments()
    _, lse = torch.ops.selm_fast.shared_prefix_attention(q, k, v, *a.values(), SCALE, 3, 0.0, backend)
    for head in range(6):
        for queries, keys in zip(rows.queries, rows.keys, strict=True):
            for nth, row in enumerate(queries):
                last = len(keys) - len(queries) + nth
                seen = keys[max(0, last - 2) : last + 1]
                expected = (SCALE * k[seen, head // 3].double() @ q[row, head].double()).logsumexp(0)
                assert lse[head, row].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("setting", "backend"), [case for case in ON_A_CPU if case[0] in ("plain", "window", "softcap")]
)
def test_16_bit_errors_are_at_most_twice_those_of_separate_sequences_through_torch(
    setting: str, backend: str, dtype: torch.dtype
) -> None:
    """Against fp64: rms error of the output and of every gradient; a shared key's gradient is summed in fp32."""
    rows = layout((30, 12, 9, 17), (25, 20, 3))
    tensors = inputs(rows, "gqa", dtype, size=16)
    settings = SETTINGS[setting]
    exact = run(dense, [t.double() for t in tensors], rows, **settings)
    got = run(ours(rows, backend), tensors, **settings)
    torchs = run(separately, tensors, rows, **settings)
    for value, own, expected in zip(got, torchs, exact, strict=True):
        assert value.dtype == dtype
        assert rms(value - expected) <= 2 * rms(own - expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_shared_key_are_summed_in_fp32(backend: str) -> None:
    """One prompt row under 64 branches, in bf16: a sum rounded at each step is off by far more than one rounding."""
    branches = 64
    rows = Rows([[n] for n in range(branches)], [[0, n] for n in range(branches)])
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(branches, 1, 16, generator=generator).bfloat16() for _ in range(4)]
    tensors[3] = tensors[3].abs()
    exact = run(dense, [t.double() for t in tensors], rows)
    got = run(ours(rows, backend), tensors)
    shared, expected = got[3][0].double(), exact[3][0]
    # One rounding to bf16 is 2^-8 at most; the rest is of fp32.
    assert ((shared - expected).abs() <= (2**-8 + 1e-5) * expected.abs()).all()


@pytest.mark.parametrize(("setting", "backend"), ON_A_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, setting: str, backend: str) -> None:
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa", dtype)
    first, second = (run(ours(rows, backend), tensors, **SETTINGS[setting]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_does_not_see_its_neighbours(backend: str, dtype: torch.dtype) -> None:
    """Bits of a group's rows, alone and between others."""
    alone, among = layout((50, 40, 33)), layout((3, 2, 2), (50, 40, 33), (80, 10))
    tensors = inputs(among, "gqa", dtype, size=32)
    inside = slice(6, 6 + alone.num_rows)
    got = run(ours(among, backend), tensors)
    single = run(ours(alone, backend), [t[inside] for t in tensors])
    for packed, own in zip(got, single, strict=True):
        assert torch.equal(packed[inside], own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_branch_reads_are_not_read(backend: str) -> None:
    """NaN in a row of k and v that kv_index leaves out changes nothing, and its gradient is 0."""
    rows = Rows([[0, 1], [2, 3]], [[0, 1], [0, 2, 3]])
    tensors = inputs(rows, "gqa")
    clean = run(ours(rows, backend), tensors)
    rows = Rows([[0, 1], [2, 3], [4]], [[0, 1], [0, 2, 3], [0]])
    q, k, v, grad = (torch.cat([t, t[:1]]) for t in tensors)
    k[4], v[4] = torch.nan, torch.nan
    got = run(ours(rows, backend), [q, k, v, grad * torch.tensor([1.0, 1, 1, 1, 0]).view(-1, 1, 1)])
    for value, expected in zip(got, clean, strict=True):
        torch.testing.assert_close(value[:4], expected, rtol=1e-6, atol=1e-6)
    assert not got[2][4].any() and not got[3][4].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_large_scores_do_not_overflow(backend: str, scale: float) -> None:
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa")
    tensors[0] = tensors[0] * scale / SCALE
    exact = run(dense, [t.double() for t in tensors], rows)
    for value, expected in zip(run(ours(rows, backend), tensors), exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_contiguous_inputs_give_the_same(backend: str) -> None:
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa")
    got = run(ours(rows, backend), tensors)
    again = run(ours(rows, backend), [t.contiguous() for t in tensors])
    for one, other in zip(got, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_frozen(backend: str, frozen: int) -> None:
    rows = LAYOUTS["a group of three"]
    tensors = inputs(rows, "gqa")
    full = run(ours(rows, backend), tensors)[1:]
    leaves = [t.clone().requires_grad_(nth != frozen) for nth, t in enumerate(tensors[:3])]
    ours(rows, backend)(*leaves).backward(tensors[3])
    for nth, leaf in enumerate(leaves):
        assert leaf.grad is None if nth == frozen else torch.equal(leaf.grad, full[nth])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_what_comes_in_and_nothing_within(backend: str) -> None:
    """As it does for scaled_dot_product_attention; q and k may come in fp32 from a norm, v in bf16 from a product."""
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa", torch.bfloat16)
    expected = run(ours(rows, backend), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(ours(rows, backend), [tensors[0].float(), tensors[1].float(), *tensors[2:]])
    for value, right in zip(got, expected, strict=True):
        assert torch.equal(value.to(right.dtype), right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_are_no_error(backend: str) -> None:
    q, k = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(0, 2, 8, requires_grad=True)
    none, start = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    out = shared_prefix_attention(q, k, k, none, start, start, 0, 0, scale=1.0, backend=backend)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8) and k.grad.shape == (0, 2, 8)


@pytest.mark.parametrize("setting", ["plain", "window", "softcap"])
def test_the_custom_op_is_sound(setting: str) -> None:
    """Schema, fake kernels and autograd registration, under dynamic shapes too."""
    rows = LAYOUTS["a group of three"]
    q, k, v, _ = (t.detach().requires_grad_() for t in inputs(rows, "gqa"))
    window, softcap = SETTINGS[setting].get("window", -1), SETTINGS[setting].get("softcap", 0.0)
    torch.library.opcheck(
        torch.ops.selm_fast.shared_prefix_attention.default,
        (q, k, v, *rows.arguments().values(), SCALE, window, softcap, "auto"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fake_kernels_give_shapes_dtypes_and_strides(dtype: torch.dtype, backend: str) -> None:
    rows = LAYOUTS["a group of three"]
    arguments = (*rows.arguments().values(), SCALE, -1, 0.0, backend)
    q, k, v, grad = (t.to(dtype) for t in inputs(rows, "gqa"))
    forward = torch.ops.selm_fast.shared_prefix_attention
    backward = torch.ops.selm_fast.shared_prefix_attention_backward
    out, lse = forward(q, k, v, *arguments)
    real = [out, lse, *backward(grad, q, k, v, out, lse, *arguments)]
    q, k, v, grad, out, lse = (t.to("meta") for t in (q, k, v, grad, out, lse))
    meta = [*forward(q, k, v, *arguments), *backward(grad, q, k, v, out, lse, *arguments)]
    assert ours(rows, backend)(q, k, v).device.type == "meta"
    for fake, value in zip(meta, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (value.shape, value.dtype, value.stride())


def test_a_compiled_caller_gives_the_same_without_a_graph_break() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int) -> Tensor:
        return shared_prefix_attention(2 * q, k, v, index, cu_q, cu_k, *longest, scale=SCALE).relu()

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("many", "a group of three"):
        rows = LAYOUTS[name]
        tensors = inputs(rows, "gqa")
        arguments = rows.arguments().values()
        for one, other in zip(run(compiled, tensors, *arguments), run(attend, tensors, *arguments), strict=True):
            assert torch.equal(one, other)


def test_the_reference_branch_gives_its_logsumexp() -> None:
    q, k, v, _ = (t.double() for t in inputs(layout((5, 4)), "gqa"))
    _, lse = branch_forward(q[3:], k, v, Scores(SCALE, None, None))
    last = (SCALE * k[:, 1] @ q[-1, 4]).logsumexp(0)
    assert lse[4, -1].item() == pytest.approx(last.item(), rel=1e-12)
