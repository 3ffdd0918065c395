"""The gated feed-forward layer against what transformers computes, both against float64: outputs, gradients, bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selm_fast.ops import extension
from selm_fast.ops import gated_mlp as module
from selm_fast.ops.gated_mlp import gated_mlp
from tests.ops.cpp_cases import CPP, DTYPES, in_dtype, served
from tests.ops.memory import allocated
from tests.ops.triton_cases import assert_as_accurate

__all__ = ["served"]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("x", "gate", "up", "down", "gate bias", "up bias", "down bias")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, the last of them not whole, in a small case."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)


def own(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor | None, activation: str, backend: str = ""
) -> Tensor:
    """As transformers computes it."""
    gate_bias, up_bias, down_bias = biases
    return F.linear(ACTIVATIONS[activation](F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)


def fused(*tensors: Tensor | None, **settings: str) -> Tensor:
    """The op, called as `own` is."""
    return gated_mlp(*tensors[:4], biases=tensors[4:], **settings)


def make(rows: int = 37, width: int = 20, hidden: int = 27, *, with_biases: bool = True) -> list[Tensor | None]:
    """x, weights and biases; the argument of the activation runs from -8 to 8."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (hidden, width), (hidden, width), (width, hidden), (hidden,), (hidden,), (width,)]
    made = [torch.randn(shape, generator=generator) * (0.5 if len(shape) == 2 else 1.0) for shape in shapes]
    made[0] *= 2
    return [*made[:4], *(made[4:] if with_biases else [None] * 3)]


def results(function: object, tensors: list[Tensor | None], grad: Tensor, **settings: str) -> list[Tensor]:
    """Output and all gradients."""
    out = function(*tensors, **settings)  # type: ignore[operator]
    leaves = [t for t in tensors if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@activations
@dtypes
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("serves", [True, False], ids=["fp32 results", "rounded results"])
def test_outputs_and_gradients(
    dtype: torch.dtype,
    activation: str,
    with_biases: bool,
    serves: bool,
    served: str,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no GEMM gives fp32 results for operands of 16 bits."""
    if not serves:
        monkeypatch.setattr(module, "matmul", lambda *args, **given: MATMUL(*args, **given | {"backend": "torch"}))
    rounded = [None if t is None else t.to(dtype) for t in make(with_biases=with_biases)]
    grad = torch.randn(rounded[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = in_dtype(rounded, dtype)
    got = results(fused, tensors, grad, activation=activation, backend=served)
    peer = results(own, tensors, grad, activation=activation)
    exact = results(own, in_dtype(rounded, torch.float64), grad, activation=activation)
    for mine, theirs, right in zip(got, peer, exact, strict=True):
        assert mine.isfinite().all()
        assert_as_accurate(mine, theirs, right)


MATMUL = module.matmul


@activations
@dtypes
def test_the_product_alone(dtype: torch.dtype, activation: str, served: str) -> None:
    """Number by number, from the least to the largest, whatever the GEMMs do."""
    x = torch.cat([torch.linspace(-30, 30, 2003), torch.logspace(-30, 3, 101), -torch.logspace(-30, 3, 101)]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    up, grad = (torch.randn(x.shape, generator=generator).to(dtype) for _ in range(2))
    got = [torch.empty_like(x) for _ in range(4)]
    module._gated(x, up, activation, got[0], served)
    module._gated_backward(grad, x, up, activation, got[1], got[2], got[3], served)
    assert torch.equal(got[0], got[3])
    columns = []
    for fp in (dtype, torch.float64):
        leaves = in_dtype([x, up], fp)
        out = ACTIVATIONS[activation](leaves[0]) * leaves[1]
        columns.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(fp))])
    for mine, theirs, right in zip(got, *columns, strict=False):
        assert_as_accurate(mine, theirs, right)
        # Number by number, too: to a few roundings of what each is the product of.
        roundings = (mine.double() - right).abs() / torch.finfo(dtype).eps
        assert (roundings <= 4 * (right.abs() + (grad * up).double().abs() + torch.finfo(dtype).tiny)).all()


@activations
def test_act_is_rounded_before_it_is_multiplied(activation: str, served: str) -> None:
    """The same bits as between two modules, but where the last bit of an fp32 number decides."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(200, 99, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty_like(gate)
    module._gated(gate, up, activation, out, served)
    assert (out != ACTIVATIONS[activation](gate) * up).float().mean() < 1e-3


@activations
@pytest.mark.usefixtures("small_blocks")
def test_the_algorithm_has_the_gradient_of_its_formula(activation: str) -> None:
    tensors = in_dtype(make(21, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: fused(*t, activation=activation), tensors)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {3}, {4}, {5}, {6}, {1, 2, 4, 5}, {1, 2, 3}, {0, 4, 5, 6}], ids=str)
def test_frozen_tensors_get_no_gradient(frozen: set[int], served: str) -> None:
    tensors = make()
    grad = torch.randn(37, 20, generator=torch.Generator().manual_seed(1))
    settings = {"activation": "silu", "backend": served}
    expected = results(fused, in_dtype(tensors, torch.float32), grad, **settings)[1:]
    some = [t.clone().requires_grad_(nth not in frozen) for nth, t in enumerate(tensors)]
    fused(*some, **settings).backward(grad)
    for nth, (t, right) in enumerate(zip(some, expected, strict=True)):
        assert (t.grad is None) == (nth in frozen), NAMES[nth]
        assert nth in frozen or torch.equal(t.grad, right), NAMES[nth]


@dtypes
@pytest.mark.usefixtures("small_blocks")
def test_the_same_bits_without_gradients(dtype: torch.dtype, served: str) -> None:
    """Step 0 is exact only so: the reference pass asks for none."""
    tensors = in_dtype(make(), dtype)
    out = fused(*tensors, activation="silu", backend=served)
    with torch.no_grad():
        assert torch.equal(fused(*tensors, activation="silu", backend=served), out)
    assert torch.equal(fused(*(t.detach() for t in tensors), activation="silu", backend=served), out)


@CPP
@dtypes
@activations
def test_the_product_has_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, activation: str) -> None:
    gate, up, grad = (torch.randn(333, 401, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    outs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outs.append([torch.empty_like(gate) for _ in range(4)])
        module._gated(gate, up, activation, outs[-1][0], "cpp")
        module._gated_backward(grad, gate, up, activation, *outs[-1][1:], "cpp")
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_any_shape_and_strides(served: str) -> None:
    tensors = in_dtype(make(24), torch.float32)
    grad = torch.randn(24, 20, generator=torch.Generator().manual_seed(1))
    settings = {"activation": "silu", "backend": served}
    expected = results(fused, tensors, grad, **settings)
    strided = [
        t.detach().t().contiguous().t() if t.dim() == 2 else t.detach().repeat_interleave(2)[::2] for t in tensors
    ]
    strided[0] = tensors[0].detach().view(4, 6, 20).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    got = results(
        fused, [t.requires_grad_() for t in strided], grad.view(4, 6, 20).transpose(0, 2).contiguous().transpose(0, 2),
        **settings,
    )  # fmt: skip
    assert got[0].shape == (4, 6, 20)
    for mine, right in zip(got, expected, strict=True):
        assert torch.allclose(mine.reshape(right.shape), right, rtol=1e-5, atol=1e-5)  # GEMMs take other paths


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_or_one(rows: int, served: str) -> None:
    tensors = in_dtype(make(rows), torch.float32)
    out = fused(*tensors, activation="silu", backend=served)
    out.sum().backward()
    assert out.shape == (rows, 20)
    for t in tensors:
        assert t.grad is not None and t.grad.isfinite().all()
        assert rows or t.grad.eq(0).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.skipif(not extension.available(), reason=extension.status())
def test_no_third_tensor_as_wide_as_the_hidden_layer() -> None:
    """Forward gate(x) and up(x) alone stand for all rows, without gradients nothing does, and backward nothing new."""
    rows, width, hidden = 640, 8, 512
    tensors = in_dtype(make(rows, width, hidden, with_biases=False), torch.float32)
    whole = rows * hidden * 4
    small = 4 * 16 * hidden * 4 + 2 * rows * width * 4 + 4 * width * hidden * 4  # blocks, x and its gradient, weights
    forward = allocated(lambda: fused(*tensors, activation="silu"))
    assert 2 * whole <= forward.peak <= 2 * whole + small
    with torch.no_grad():
        assert allocated(lambda: fused(*tensors, activation="silu")).peak <= small
    out = fused(*tensors, activation="silu")
    leaves = [t for t in tensors if t is not None]
    backward = allocated(lambda: torch.autograd.grad(out.sum(), leaves, retain_graph=True))
    assert backward.peak <= small


@pytest.mark.usefixtures("small_blocks")
def test_the_op_is_what_it_says_to_compilers(served: str) -> None:
    tensors = make(35)
    for keep in (True, False):
        given = [t.clone().requires_grad_(keep) for t in tensors]
        torch.library.opcheck(module._op, (*given, "silu", keep, served))
    kept, grad = torch.randn(2, 35, 27), torch.randn(35, 20)
    for needs in ([True] * 7, [False, True] * 3 + [False]):
        args = (grad, *tensors[:4], *kept, "gelu_tanh", needs, served)
        torch.library.opcheck(module._backward_op, args, test_utils=("test_schema", "test_faketensor"))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, gate, up, down, *biases = make()
    good = {"x": x, "gate": gate, "up": up, "down": down, "biases": tuple(biases), "activation": "silu"}
    for bad, message in (
        ({"x": x[:, :19]}, "x must be"),
        ({"gate": gate[:26]}, "x must be"),
        ({"up": up.t()}, "x must be"),
        ({"down": up}, "x must be"),
        ({"biases": (biases[2], None, None)}, "x must be"),
        ({"biases": (None, None, biases[0])}, "x must be"),
        ({"x": x.half()}, "float16"),
        ({"biases": (None, None, biases[2].double())}, "float64"),
        ({"up": up.to("meta")}, "meta"),
        ({"activation": "relu"}, "silu, gelu_tanh; got 'relu'"),
        ({"backend": "triton"}, "triton"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_mlp(**good | bad)


@CPP
def test_kernels_refuse_tensors_that_do_not_fit() -> None:
    a = torch.zeros(3, 8)
    for name in ("gate", "up", "out", "grad", "d_gate", "d_up"):
        for bad in (a[:, :7], a.double(), a[:2]):
            given = dict.fromkeys(("gate", "up", "out", "grad", "d_gate", "d_up"), a) | {name: bad}
            with pytest.raises(ValueError, match="must be"):
                torch.ops.selm_fast_cpp.gated_backward(activation="silu", **given)
    with pytest.raises(ValueError, match="relu"):
        torch.ops.selm_fast_cpp.gated(a, a, "relu", a.clone())
