"""The norm against what transformers computes, both against float64: outputs, gradients, bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selm_fast.ops import rms_norm as module
from selm_fast.ops.rms_norm import rms_norm
from tests.ops.cpp_cases import CPP, DTYPES, in_dtype, served
from tests.ops.triton_cases import assert_as_accurate

__all__ = ["served"]
FAMILIES = {
    "Llama": {"offset": 0.0, "rounds_first": True},
    "Gemma": {"offset": 1.0, "rounds_first": False},
    "OLMo 2": {"offset": 0.0, "rounds_first": False},
}
families = pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Both sides of a vector and of four of them; one row, one chunk of 64 rows, and chunks with a rest.
SHAPES = [(1, 1), (3, 5), (7, 16), (64, 17), (65, 64), (130, 72), (200, 100), (5, 1000)]
EPS = 1e-3


def own(x: Tensor, weight: Tensor, offset: float, rounds_first: bool) -> Tensor:
    """As transformers computes it."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + EPS)
    if rounds_first:
        return weight * normalised.to(x.dtype)
    return (normalised * (offset + weight.to(high.dtype))).to(x.dtype)


def make(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, whose rows are of all sizes beside eps, weight, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 2, rows).unsqueeze(1)
    return x, 1 + torch.randn(width, generator=generator), torch.randn(rows, width, generator=generator)


def results(function: object, x: Tensor, weight: Tensor, grad: Tensor, **settings: object) -> list[Tensor]:
    """Output and both gradients."""
    out = function(x, weight, **settings)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out.dtype))]


@families
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(
    shape: tuple[int, int], dtype: torch.dtype, settings: dict[str, object], served: str
) -> None:
    rounded = [t.to(dtype) for t in make(*shape)]
    x, weight, grad = in_dtype(rounded, dtype)
    got = results(rms_norm, x, weight, grad, eps=EPS, backend=served, **settings)
    peer = results(own, x, weight, grad, **settings)
    exact = results(own, *in_dtype(rounded, torch.float64), **settings)
    for mine, theirs, right in zip(got, peer, exact, strict=True):
        assert mine.isfinite().all()
        assert_as_accurate(mine, theirs, right)


@families
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_outputs_are_rounded_where_transformers_rounds_them(
    dtype: torch.dtype, settings: dict[str, object], served: str
) -> None:
    """Equal bits, but where the last bit of an fp32 sum decides: a number in some thousands."""
    x, weight, _ = (t.to(dtype) for t in make(200, 256))
    got = rms_norm(x, weight, EPS, backend=served, **settings)
    assert (got != own(x, weight, **settings)).float().mean() < 1e-3


@families
def test_the_algorithm_has_the_gradient_of_its_formula(settings: dict[str, object]) -> None:
    x, weight, _ = in_dtype(list(make(5, 7)), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, EPS, **settings), (x, weight))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_frozen_tensors_get_no_gradient(needs: tuple[bool, bool], served: str) -> None:
    x, weight, grad = make(70, 40)
    expected = results(rms_norm, x.requires_grad_(), weight.requires_grad_(), grad, eps=EPS, backend=served)[1:]
    some = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
    out = rms_norm(*some, EPS, backend=served)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad)
    for t, need, right in zip(some, needs, expected, strict=True):
        assert (t.grad is not None) == need
        assert not need or torch.equal(t.grad, right)


@pytest.mark.parametrize("strided", ["columns", "dimensions"])
def test_any_shape_and_strides(strided: str, served: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 40, 6, generator=generator).permute(2, 0, 1) for _ in range(2))
    if strided == "columns":
        x, grad = (t.contiguous().view(15, 80)[:, ::2] for t in (x, grad))
    weight = torch.randn(80, generator=generator)[::2]
    got = results(rms_norm, x.requires_grad_(), weight.requires_grad_(), grad, eps=EPS, backend=served)
    plain = [t.detach().contiguous() for t in (x, weight, grad)]
    expected = results(rms_norm, *(t.requires_grad_() for t in plain[:2]), plain[2], eps=EPS, backend=served)
    assert got[0].shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_or_one(rows: int, served: str) -> None:
    x, weight = torch.randn(rows, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    rms_norm(x, weight, EPS, backend=served).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert rows or weight.grad.eq(0).all()


@CPP
@dtypes
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x, weight, grad = make(1001, 200)
    tensors = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)]
    one = results(rms_norm, *tensors, eps=EPS, backend="cpp")
    torch.set_num_threads(3)
    three = results(rms_norm, *tensors, eps=EPS, backend="cpp")
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@CPP
@dtypes
def test_the_gradient_of_the_weight_is_summed_exactly_enough(dtype: torch.dtype) -> None:
    """Many rows: a running fp32 sum over 40,000 of them would be off by 100 times as much."""
    x = torch.ones(40_000, 4, dtype=dtype)
    weight, grad = torch.ones(4, dtype=dtype, requires_grad=True), torch.full_like(x, 1 / 3)
    rms_norm(x, weight, 0.0, backend="cpp").backward(grad)
    exact = (40_000 * grad[0].double()).to(dtype)
    assert torch.allclose(weight.grad, exact, rtol=3e-7 if dtype == torch.float32 else 0, atol=0)


def test_what_autograd_keeps_is_x_and_a_number_a_row() -> None:
    x, weight = torch.randn(50, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert sorted(t.numel() for t in kept) == [40, 50, 2000]
    assert next(t for t in kept if t.numel() == 2000).data_ptr() == x.data_ptr()


def test_the_op_is_what_it_says_to_compilers(served: str) -> None:
    x, weight, _ = make(9, 20)
    for needs in ((True, True), (False, True)):
        tensors = [t.clone().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
        torch.library.opcheck(module._op, (*tensors, EPS, 1.0, False, served))
    inverse, grad = torch.rand(9), torch.randn(9, 20)
    for needed in ((True, True), (True, False), (False, True)):
        args = (grad, x, weight, inverse, 0.0, *needed, served)
        torch.library.opcheck(module._backward_op, args, test_utils=("test_schema", "test_faketensor"))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    for args, message in (
        ((x, weight[:7]), "D"),
        ((x, weight.unsqueeze(0)), "D"),
        ((x.bfloat16(), weight), "bfloat16"),
        ((x.int(), weight.int()), "int32"),
        ((x, weight.to("meta")), "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm(*args, EPS)
    with pytest.raises(ValueError, match="triton"):
        rms_norm(x, weight, EPS, backend="triton")


@CPP
def test_kernels_refuse_tensors_that_do_not_fit() -> None:
    x, weight, out, inverse = torch.zeros(3, 8), torch.zeros(8), torch.zeros(3, 8), torch.zeros(3)
    given = {"x": x, "weight": weight, "out": out, "inverse": inverse}
    for bad in (
        {"x": x.double()},
        {"x": torch.zeros(3, 16)[:, ::2]},
        {"weight": weight[:7]},
        {"weight": weight.half()},
        {"out": out[:2]},
        {"inverse": inverse[:2]},
        {"inverse": inverse.double()},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            torch.ops.selm_fast_cpp.rms_norm(eps=EPS, offset=0.0, rounds_first=True, **given | bad)
    given = {"grad": x, "x": x, "weight": weight, "inverse": inverse, "dx": out, "d_weight": weight.clone()}
    for bad in (
        {"grad": x[:2]},
        {"grad": x.half()},
        {"weight": weight[:7]},
        {"inverse": inverse[:2]},
        {"dx": out[:2]},
        {"d_weight": weight[:7]},
        {"d_weight": weight.half()},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            torch.ops.selm_fast_cpp.rms_norm_backward(offset=0.0, **given | bad)
