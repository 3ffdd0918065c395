"""`linear_logprob` by every back end on the inputs that break such kernels: errors against float64, beside torch's."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import linear_logprob
from tests.ops.head_cases import HEADS, V, assert_as_good_as_torch, by_torch, make, run
from tests.ops.places import BACK_ENDS, MODES_BACK_ENDS, MODES_BACK_ENDS_DTYPES, back_ends

head_module = importlib.import_module("selm_fast.ops.head")

MODES = pytest.mark.parametrize("mode", ["keep", "recompute"])
# (N, D, V): nothing is a multiple of anything, real vocabularies, and a hidden size above every block.
SHAPES = [(3, 47, 123), (193, 70, 517), (129, 64, 50257), (64, 64, 151936), (7, 5003, 130)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, with ragged ends."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(head_module.TILE_ROWS, device, 16)
        monkeypatch.setitem(head_module.TILE_VOCAB, device, 128)


@MODES
@pytest.mark.parametrize(("backend", "dtype", "shape"), back_ends(*SHAPES), indirect=["backend"])
def test_errors_at_the_sizes_of_real_heads(
    shape: tuple[int, int, int], dtype: torch.dtype, mode: str, backend: str, device: str
) -> None:
    rows, size, vocab = shape
    seeds = range(8 if rows * vocab < 1000 else 1)  # torch may hit a handful of numbers by luck
    samples = [make(dtype, rows=rows, size=size, vocab=vocab, seed=seed, device=device) for seed in seeds]
    assert_as_good_as_torch(samples, dtype, mode=mode, backend=backend)


def few(backend: str) -> dict[str, int]:
    """Several tiles each way; the fewest where every row is a program of the interpreter."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return {"rows": 19, "vocab": 140} if interpreted else {"rows": 37, "vocab": V}


def _with_logits(dtype: torch.dtype, seed: int, device: str, kind: str, backend: str) -> dict[str, Any]:
    inputs = make(dtype, **few(backend), seed=seed, device=device, with_bias=True)
    hidden, weight, bias = inputs["hidden"], inputs["weight"], inputs["bias"]
    if kind == "near -200":  # an online maximum that starts at 0 never comes down
        bias.sub_(200)
    elif kind == "offset +20":
        bias.add_(20)
    elif kind == "+-1e4":
        bias[::3] += 1e4
        bias[1::3] -= 1e4
    elif kind == "peaked":  # p > .999
        inputs["targets"] = torch.arange(len(hidden), device=device)
        inputs["hidden"] = weight[: len(hidden)] * 2.5
    elif kind == "ruled out":  # a whole tile of them, and some that are targets of none
        bias[:130] = -torch.inf
        inputs["targets"] = inputs["targets"].clamp(min=130)
    elif kind == "one-sided":
        inputs["upstream"] = inputs["upstream"].abs() * 1e3
    else:
        assert kind == "random"
        hidden.mul_(1.5)
    return inputs


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["random", "near -200", "offset +20", "+-1e4", "peaked", "ruled out", "one-sided"])
@MODES_BACK_ENDS_DTYPES
def test_errors_on_logits_of_every_kind(kind: str, dtype: torch.dtype, mode: str, backend: str, device: str) -> None:
    seeds = range(1 if backend == "triton" else 4)
    samples = [_with_logits(dtype, seed, device, kind, backend) for seed in seeds]
    assert_as_good_as_torch(samples, dtype, mode=mode, backend=backend)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head", HEADS)
@MODES_BACK_ENDS_DTYPES
def test_errors_of_every_head(head: str, dtype: torch.dtype, mode: str, backend: str, device: str) -> None:
    seeds = range(1 if backend == "triton" else 4)
    samples = [make(dtype, **few(backend), seed=seed, device=device, **HEADS[head]) for seed in seeds]
    assert_as_good_as_torch(samples, dtype, mode=mode, backend=backend)


@pytest.mark.usefixtures("small_tiles")
@MODES
@BACK_ENDS
def test_forward_bits_are_the_same_in_every_mode_and_gradients_from_run_to_run(
    dtype: torch.dtype, mode: str, backend: str, device: str
) -> None:
    inputs = make(dtype, **few(backend), device=device, with_bias=True, softcap=3.0)
    first, second = (run(linear_logprob, inputs, mode=mode, backend=backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    arguments = {name: value for name, value in inputs.items() if name != "upstream"}
    assert torch.equal(linear_logprob(**arguments, backend=backend), first["logps"])


@pytest.mark.usefixtures("small_tiles")
@BACK_ENDS
def test_keep_and_recompute_give_the_same_gradients(dtype: torch.dtype, backend: str, device: str) -> None:
    """To the bit in fp32; in 16 bits within two roundings of each share."""
    inputs = make(dtype, **few(backend), device=device, with_bias=True)
    keep, recompute = (run(linear_logprob, inputs, mode=mode, backend=backend) for mode in ("keep", "recompute"))
    for name, value in keep.items():
        if dtype == torch.float32 or name == "logps":
            assert torch.equal(value, recompute[name]), name
        else:
            eps = torch.finfo(dtype).eps
            distance = (value.double() - recompute[name].double()).norm() / value.double().norm()
            assert distance <= 2 * eps, name


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_memory_that_was_never_written_is_never_read(mode: str, backend: str, device: str) -> None:
    """torch.empty full of NaN changes no bit."""
    inputs = make(**few(backend), device=device, with_bias=True)
    expected = run(linear_logprob, inputs, mode=mode, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = run(linear_logprob, inputs, mode=mode, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_upstream_gradients_of_zero_give_zero(mode: str, backend: str, device: str) -> None:
    inputs = make(**few(backend), device=device, with_bias=True, softcap=2.0)
    inputs["upstream"].zero_()
    got = run(linear_logprob, inputs, mode=mode, backend=backend)
    assert all((got[name] == 0).all() for name in ("hidden", "weight", "bias"))


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_gradients_scale_with_upstream_and_accumulate(mode: str, backend: str, device: str) -> None:
    """A power of two scales every bit; two passes add up."""
    inputs = make(**few(backend), device=device, with_bias=True)
    once = run(linear_logprob, inputs, mode=mode, backend=backend)
    scaled = run(linear_logprob, {**inputs, "upstream": inputs["upstream"] * 1024}, mode=mode, backend=backend)
    names = ("hidden", "weight", "bias")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    for _ in range(2):
        out = linear_logprob(targets=inputs["targets"], **leaves, mode=mode, backend=backend)
        out.backward(inputs["upstream"])
    for name in names:
        assert torch.equal(scaled[name], once[name] * 1024), name
        assert torch.equal(leaves[name].grad, once[name] * 2), name


@pytest.mark.usefixtures("small_tiles")
@MODES
def test_ignored_rows_and_rows_that_do_not_exist__liger_1338(mode: str, backend: str, device: str) -> None:
    """Tiles in which every row is ignored, and no rows at all."""
    inputs = make(**few(backend), device=device, with_bias=True)
    inputs["targets"][16:32] = -100
    got = run(linear_logprob, inputs, mode=mode, backend=backend)
    masked = {**inputs, "upstream": inputs["upstream"].masked_fill(inputs["targets"] < 0, 0.0)}
    for name, value in run(by_torch, masked, high=True).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)
    empty = run(linear_logprob, make(rows=0, device=device, with_bias=True), mode=mode, backend=backend)
    assert empty["logps"].shape == (0,)
    assert (empty["weight"] == 0).all()
    assert (empty["bias"] == 0).all()


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_strides_and_frozen_inputs(mode: str, backend: str, device: str) -> None:
    inputs = make(**few(backend), device=device, with_bias=True)
    full = run(linear_logprob, inputs, mode=mode, backend=backend)
    odd = {
        **inputs,
        "hidden": inputs["hidden"].t().contiguous().t(),
        "weight": torch.cat([torch.ones_like(inputs["weight"]), inputs["weight"]], 1)[:, inputs["weight"].shape[1] :],
        "bias": torch.stack([inputs["bias"], inputs["bias"]], 1)[:, 0],
        "targets": torch.stack([inputs["targets"], inputs["targets"]], 1)[:, 1],
    }
    for name, value in run(linear_logprob, odd, mode=mode, backend=backend).items():
        torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-6)
    for trained in ("hidden", "weight", "bias"):
        leaves = {name: inputs[name].clone().requires_grad_(name == trained) for name in ("hidden", "weight", "bias")}
        linear_logprob(targets=inputs["targets"], **leaves, mode=mode, backend=backend).backward(inputs["upstream"])
        assert torch.equal(leaves[trained].grad, full[trained])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 257])
def test_vocabularies_around_the_edges_of_tiles__verl_2899(vocab: int, backend: str, device: str) -> None:
    """Columns beyond V are no tokens, and none counts as exp(0); the last tile may hold the target alone."""
    inputs = make(rows=17, vocab=vocab, device=device)
    inputs["targets"] = torch.arange(17, device=device).neg() % vocab
    for mode in ("keep", "recompute"):
        got = run(linear_logprob, inputs, mode=mode, backend=backend)
        for name, value in run(by_torch, inputs, high=True).items():
            torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=3e-6)


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_a_bias_counts_once_however_large_the_hidden_size__cce_53(mode: str, backend: str, device: str) -> None:
    """A kernel that walks the hidden size in blocks may add it in each."""
    inputs = make(rows=5, size=2500, vocab=140, device=device, with_bias=True)
    inputs["bias"] *= 3
    got = run(linear_logprob, inputs, mode=mode, backend=backend)
    for name, value in run(by_torch, inputs, high=True).items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@MODES_BACK_ENDS
def test_each_tokens_gradient_is_its_own__liger_968_and_1298(mode: str, backend: str, device: str) -> None:
    """An upstream gradient of one token alone gives that token's row and no other."""
    inputs = make(**few(backend), device=device)
    row = len(inputs["targets"]) - 1
    inputs["upstream"] = torch.zeros_like(inputs["upstream"])
    inputs["upstream"][row] = -3.0
    got = run(linear_logprob, inputs, mode=mode, backend=backend)
    assert got["hidden"].any(1).nonzero().flatten().tolist() == [row]
    for name, value in run(by_torch, inputs, high=True).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)


@MODES_BACK_ENDS_DTYPES
def test_the_weight_gradient_is_summed_in_fp32_over_many_tiles__liger_1391(
    dtype: torch.dtype, mode: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 64 row tiles, terms of one sign: a sum in 16 bits errs several times as much as torch's one matmul."""
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(head_module.TILE_ROWS, kind, 4)
    inputs = make(dtype, rows=256, size=12, vocab=40, device=device)
    inputs["upstream"] = inputs["upstream"].abs()
    assert_as_good_as_torch([inputs], dtype, factor=1.5, mode=mode, backend=backend)


@pytest.mark.gpu
def test_more_logits_than_a_32_bit_offset_reaches() -> None:
    """N * V > 2^31: the last rows are those of a computation on them alone, the last tokens those of no kept logits."""
    rows, size, vocab = 16_500, 16, 131_072
    inputs = make(torch.bfloat16, rows=rows, size=size, vocab=vocab, device="cuda")
    got = run(linear_logprob, inputs, mode="keep", backend="triton")
    last = {**inputs, **{name: inputs[name][-200:] for name in ("hidden", "targets", "upstream")}}
    own = run(linear_logprob, last, mode="recompute", backend="triton")
    exact = run(by_torch, last, high=True)
    torch.testing.assert_close(got["logps"][-200:].double(), exact["logps"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got["hidden"][-200:].double(), own["hidden"].double(), rtol=0.02, atol=1e-4)
    again = run(linear_logprob, inputs, mode="recompute", backend="triton")
    distance = (got["weight"][-64:].double() - again["weight"][-64:].double()).norm()
    assert distance <= 2**-7 * again["weight"][-64:].double().norm()


@pytest.mark.gpu
def test_recompute_holds_less_than_half_a_gigabyte_at_8b_shapes() -> None:
    """Beyond inputs and outputs, N = 8192, D = 4096, V = 128256 in bf16; a first call makes cuBLAS's own room."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()
        for shape in ((8192, 4096), (128256, 4096))
    )
    targets = torch.randint(128256, (8192,), generator=generator, device="cuda")
    for _ in range(2):
        hidden.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_logprob(hidden, weight, targets, mode="recompute").sum().backward()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    assert extra <= 0.5e9, extra


@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_is_a_device_side_assertion() -> None:
    """In a process of its own: the device is of no use afterwards."""
    program = (
        "import torch; from selm_fast.ops import linear_logprob\n"
        "h, w = torch.zeros(4, 16, device='cuda'), torch.zeros(9, 16, device='cuda')\n"
        "linear_logprob(h, w, torch.tensor([1, 2, 9, 3], device='cuda')); torch.cuda.synchronize()"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.returncode != 0
    assert "assert" in outcome.stderr.lower()


@BACK_ENDS
@MODES
def test_autocast_casts_as_it_does_for_a_linear_layer(dtype: torch.dtype, mode: str, backend: str, device: str) -> None:
    """fp32 parameters under autocast: the results of casted ones, and gradients in fp32."""
    if dtype == torch.float32:
        pytest.skip("autocast has 16 bits")
    inputs = make(torch.float32, **few(backend), device=device, with_bias=True)
    names = ("hidden", "weight", "bias")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    with torch.autocast(device, dtype=dtype):
        out = linear_logprob(targets=inputs["targets"], **leaves, mode=mode, backend=backend)
        out.backward(inputs["upstream"])
    casted = {**inputs, **{name: inputs[name].to(dtype) for name in names}}
    expected = run(linear_logprob, casted, mode=mode, backend=backend)
    assert torch.equal(out, expected["logps"])
    for name in names:
        assert leaves[name].grad.dtype == torch.float32
        assert torch.equal(leaves[name].grad, expected[name].float())


def test_hidden_states_of_an_autocast_body_meet_fp32_weights(backend: str, device: str) -> None:
    inputs = make(torch.float32, **few(backend), device=device)
    if backend == "triton" and device == "cpu":
        pytest.skip("16 bits need a GPU")
    with torch.autocast(device, dtype=torch.bfloat16):
        got = linear_logprob(inputs["hidden"].bfloat16(), inputs["weight"], inputs["targets"], backend=backend)
    expected = linear_logprob(
        inputs["hidden"].bfloat16(), inputs["weight"].bfloat16(), inputs["targets"], backend=backend
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param({"softcap": 2.0, "logit_scale": 0.7}, id="everything"),
    ],
)
@MODES
@pytest.mark.usefixtures("small_tiles")
def test_the_reference_passes_gradcheck_in_float64(mode: str, settings: dict[str, Any]) -> None:
    """Finite differences through the very tiles and folds of every mode."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((18, 5), (131, 5), (131,))
    )
    targets = torch.randint(131, (18,), generator=generator)
    targets[3] = -100

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, targets, bias=bias, mode=mode, **settings)

    assert function(hidden, weight, bias).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_custom_op_is_sound(dtype: torch.dtype, mode: str) -> None:
    """Schema, fake kernels and autograd registration, under dynamic shapes too."""
    inputs = make(dtype, rows=9, vocab=40, with_bias=True)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    torch.library.opcheck(
        torch.ops.selm_fast.linear_logprob.default,
        (*leaves, inputs["targets"], 2.0, 1.5, -100, mode == "keep", "torch"),
    )


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_torch_compile_takes_it_whole(mode: str) -> None:
    def function(**arguments: Any) -> Tensor:
        return linear_logprob(**{**arguments, "hidden": arguments["hidden"] * 2}, mode=mode) * 3

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (75, 20, 33):
        inputs = make(rows=rows, with_bias=True)
        expected = run(function, inputs)
        for name, value in run(compiled, inputs).items():
            assert torch.equal(value, expected[name]), name


def test_fp64_goes_through_plain_torch_alone() -> None:
    inputs = make(torch.float64)
    arguments = {name: value for name, value in inputs.items() if name != "upstream"}
    torch.testing.assert_close(linear_logprob(**arguments), by_torch(**arguments), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="fp64 tensors, which need 'torch'"):
        linear_logprob(**arguments, backend="triton")


def test_a_sharded_weight_is_refused_with_the_way_out() -> None:
    class Shard(torch.nn.Parameter):
        def full_tensor(self) -> Tensor:
            return self.data

    inputs = make()
    with pytest.raises(ValueError, match=r"weight is a DTensor.*weight\.full_tensor\(\)"):
        linear_logprob(inputs["hidden"], Shard(inputs["weight"]), inputs["targets"])


def test_tensors_of_two_devices_are_refused() -> None:
    inputs = make()
    with pytest.raises(ValueError, match="must be on one device; got cpu, meta, cpu"):
        linear_logprob(inputs["hidden"], inputs["weight"].to("meta"), inputs["targets"])


def test_tied_weights_collect_both_gradients() -> None:
    """One tensor as embedding and head: gradients add up as they do through torch's own operations."""
    inputs = make()
    tokens = torch.arange(len(inputs["targets"])) * 3 % V

    def loss(function: Any, weight: Tensor) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
        return (function(hidden, weight, inputs["targets"]) * inputs["upstream"]).sum()

    weight, exact = inputs["weight"].clone().requires_grad_(), inputs["weight"].double().requires_grad_()
    loss(linear_logprob, weight).backward()
    loss(by_torch, exact).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
