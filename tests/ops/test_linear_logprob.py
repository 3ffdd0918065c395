"""`linear_logprob` against float64 log_softmax, beside torch's own computation in the same dtype."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import linear_logprob
from tests.ops.head_cases import (
    HEADS,
    TILE_ROWS,
    TILE_VOCAB,
    D,
    N,
    V,
    assert_as_good_as_torch,
    by_torch,
    make,
    relative,
    run,
)

head_module = importlib.import_module("selm_fast.ops.head")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles at small sizes, with ends that no tile fits."""
    monkeypatch.setitem(head_module.TILE_ROWS, "cpu", TILE_ROWS)
    monkeypatch.setitem(head_module.TILE_VOCAB, "cpu", TILE_VOCAB)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_output_and_gradients_are_as_exact_as_torchs_own(head: str, dtype: torch.dtype, mode: str) -> None:
    assert_as_good_as_torch([make(dtype, seed=seed, **HEADS[head]) for seed in range(8)], dtype, mode=mode)


@pytest.mark.parametrize("head", ["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kept_logits_are_as_good_as_recomputed_ones_where_matmuls_have_fp32_results(
    dtype: torch.dtype, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Rounded to 16 bits as they are, beside an exact logsumexp, they err 2.4 times as much as torch's."""

    def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, backend: str) -> None:
        product = torch.mm(a.float(), b.float())
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(head_module, "matmul", matmul)
    samples = [make(dtype, seed=seed, **HEADS[head]) for seed in range(8)]
    for mode in ("keep", "recompute"):
        assert_as_good_as_torch(samples, dtype, factor=0.75, mode=mode)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_weight_gradient_of_bf16_is_accumulated_in_fp32_over_many_row_tiles__liger_1391(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum in bf16 over 128 row tiles is several times worse than torch's one matmul (Liger #1391)."""
    monkeypatch.setitem(head_module.TILE_ROWS, "cpu", 8)
    inputs = make(torch.bfloat16, rows=1024, vocab=80)
    inputs["upstream"] = inputs["upstream"].abs()  # terms of one sign: rounding errors grow with the sum
    assert_as_good_as_torch([inputs], torch.bfloat16, factor=1.3, mode=mode)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_hidden_gradient_of_bf16_is_accumulated_in_fp32_over_many_vocabulary_tiles(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.TILE_VOCAB, "cpu", 8)
    inputs = make(torch.bfloat16, vocab=1000)
    inputs["weight"] = inputs["weight"].abs()
    assert_as_good_as_torch([inputs], torch.bfloat16, factor=1.3, mode=mode)


def test_the_rounding_of_16_bit_logits_does_not_touch_the_targets_own() -> None:
    """Logits of 30 are rounded to 0.06 in bf16; the target's comes from an fp32 dot product."""
    inputs = make(torch.bfloat16, rows=64)
    inputs["targets"] = torch.arange(64)
    inputs["hidden"] = inputs["weight"][:64] * 6  # each target's logit is far above the others: logp is about -0
    inputs["weight"] = inputs["weight"] * 2
    ours = run(linear_logprob, inputs, backend="torch")["logps"]
    z = torch.linalg.vecdot(inputs["hidden"].double(), inputs["weight"][:64].double())
    others = (inputs["hidden"].double() @ inputs["weight"].double().t()).scatter_(
        1, torch.arange(64).unsqueeze(1), -torch.inf
    )
    gap = others.logsumexp(1) - z
    rounded = (inputs["hidden"] @ inputs["weight"].t()).double().scatter_(1, torch.arange(64).unsqueeze(1), -torch.inf)
    expected = -torch.nn.functional.softplus(rounded.logsumexp(1) - z)
    torch.testing.assert_close(ours.double(), expected, rtol=3e-5, atol=0)
    assert gap.max() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_mode_and_no_grad_give_the_same_bits_forward(head: str, dtype: torch.dtype) -> None:
    inputs = make(dtype, **HEADS[head])
    keep, recompute = (run(linear_logprob, inputs, mode=mode) for mode in ("keep", "recompute"))
    arguments = {name: value for name, value in inputs.items() if name != "upstream"}
    with torch.no_grad():
        no_grad = linear_logprob(**{**arguments, "hidden": arguments["hidden"].clone().requires_grad_()})
    with torch.inference_mode():
        inference = linear_logprob(**arguments)
    for other in (recompute["logps"], no_grad, linear_logprob(**arguments), inference):
        assert torch.equal(keep["logps"], other)
    assert not no_grad.requires_grad
    if dtype == torch.float32:
        for name in keep:
            assert torch.equal(keep[name], recompute[name]), name


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight"), ("weight", "bias")]
)
def test_inputs_may_be_frozen_one_by_one(trained: tuple[str, ...], mode: str) -> None:
    inputs = make(with_bias=True, softcap=2.0)
    full = run(linear_logprob, inputs, mode=mode)
    leaves = {name: inputs[name].clone().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    out = linear_logprob(targets=inputs["targets"], softcap=2.0, mode=mode, **leaves)
    out.backward(inputs["upstream"])
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)
        assert leaf.grad is None or torch.equal(leaf.grad, full[name])
    assert torch.equal(out, full["logps"])


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_strides_do_not_matter(mode: str) -> None:
    inputs = make(with_bias=True)
    full = run(linear_logprob, inputs, mode=mode)
    spread = torch.zeros(2 * V)
    spread[::2] = inputs["bias"]
    odd = {
        **inputs,
        "hidden": torch.cat([inputs["hidden"], inputs["hidden"]], 1)[:, :D].flip(0).flip(0).t().contiguous().t(),
        "weight": torch.cat([torch.ones(V, 3), inputs["weight"]], 1)[:, 3:],
        "bias": spread[::2],
        "targets": torch.stack([inputs["targets"], inputs["targets"]], 1)[:, 0],
    }
    assert not any(odd[name].is_contiguous() for name in ("hidden", "weight", "bias", "targets"))
    for name, value in run(linear_logprob, odd, mode=mode).items():
        torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_an_expanded_upstream_gradient_is_read_right(mode: str) -> None:
    """`out.sum()` sends one number with stride 0."""
    inputs = make()
    expected = run(linear_logprob, {**inputs, "upstream": torch.ones(N)}, mode=mode)
    hidden = inputs["hidden"].clone().requires_grad_()
    linear_logprob(hidden, inputs["weight"], inputs["targets"], mode=mode).sum().backward()
    torch.testing.assert_close(hidden.grad, expected["hidden"])


def test_leading_dimensions_come_back() -> None:
    inputs = make(rows=60)
    flat = run(linear_logprob, inputs)
    hidden = inputs["hidden"].view(3, 4, 5, D).requires_grad_()
    out = linear_logprob(hidden, inputs["weight"], inputs["targets"].view(3, 4, 5))
    out.backward(inputs["upstream"].view(3, 4, 5))
    assert torch.equal(out, flat["logps"].view(3, 4, 5))
    assert torch.equal(hidden.grad, flat["hidden"].view(3, 4, 5, D))
    single = linear_logprob(inputs["hidden"][1], inputs["weight"], inputs["targets"][1])
    torch.testing.assert_close(single, flat["logps"][1])


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, V - 1])
def test_ignored_rows_give_zero_and_get_no_gradient(ignore_index: int, mode: str) -> None:
    """A whole tile of ignored rows among others (Liger #1338), and an ignore_index that is a token."""
    inputs = make(with_bias=True)
    targets = inputs["targets"].clamp(min=1)
    targets[targets == ignore_index] = 3
    inputs["targets"] = targets.clone()
    exact = run(by_torch, {**inputs, "targets": targets}, high=True)
    ignored = torch.zeros(N, dtype=torch.bool)
    ignored[TILE_ROWS : 2 * TILE_ROWS] = True
    ignored[-1] = True
    inputs["targets"][ignored] = ignore_index
    got = run(linear_logprob, inputs, mode=mode, ignore_index=ignore_index)
    assert (got["logps"][ignored] == 0).all()
    assert (got["hidden"][ignored] == 0).all()
    torch.testing.assert_close(got["logps"][~ignored].double(), exact["logps"][~ignored], rtol=1e-5, atol=1e-5)
    masked = run(
        by_torch, {**inputs, "targets": targets, "upstream": inputs["upstream"].masked_fill(ignored, 0.0)}, high=True
    )
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(got[name].double(), masked[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_all_rows_ignored(mode: str) -> None:
    inputs = make(with_bias=True)
    inputs["targets"] = torch.full((N,), -100)
    for name, value in run(linear_logprob, inputs, mode=mode).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_no_rows(mode: str) -> None:
    got = run(linear_logprob, make(rows=0, with_bias=True), mode=mode)
    assert got["logps"].shape == (0,)
    assert got["hidden"].shape == (0, D)
    assert (got["weight"] == 0).all()
    assert (got["bias"] == 0).all()
    with torch.no_grad():
        assert linear_logprob(torch.zeros(2, 0, D), torch.zeros(V, D), torch.zeros(2, 0, dtype=torch.long)).shape == (
            2,
            0,
        )


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_vocabulary_of_one_token_is_certain_of_it(mode: str) -> None:
    for name, value in run(linear_logprob, make(vocab=1, with_bias=True), mode=mode).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("vocab", [2, TILE_VOCAB - 1, TILE_VOCAB, TILE_VOCAB + 1, 2 * TILE_VOCAB, 2 * TILE_VOCAB + 1])
@pytest.mark.parametrize("rows", [1, TILE_ROWS, TILE_ROWS + 1])
def test_sizes_around_the_edges_of_tiles(rows: int, vocab: int) -> None:
    """Columns beyond V are no tokens (verl #2899 counted each as exp(0)); the last tile may hold the target alone."""
    inputs = make(rows=rows, vocab=vocab, with_bias=True)
    inputs["targets"] = torch.arange(rows).neg() % vocab  # the first target is 0, the second the last token
    for mode in ("keep", "recompute"):
        got = run(linear_logprob, inputs, mode=mode)
        for name, value in run(by_torch, inputs, high=True).items():
            torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=2e-6)


def test_logits_that_are_all_minus_200() -> None:
    """An online maximum that starts at 0 would give log-probs of -200 - ln V or -inf."""
    inputs = make(with_bias=True, rows=33)
    inputs["bias"] = torch.full((V,), -200.0)
    inputs["weight"] = torch.zeros(V, D)
    inputs["targets"] = torch.arange(33) * 9
    got = run(linear_logprob, inputs)
    # 2e-5 is one step of fp32 at 200.
    torch.testing.assert_close(got["logps"], torch.full((33,), -math.log(V)), rtol=0, atol=2e-5)
    torch.testing.assert_close(got["bias"].double(), run(by_torch, inputs, high=True)["bias"], rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_logits_of_ten_thousand(size: float, mode: str) -> None:
    """Nothing overflows, whether one token towers over the rest or lies far below it."""
    weight = torch.zeros(V, D)
    weight[5, 0] = size
    hidden = torch.zeros(N, D)
    hidden[:, 0] = 1.0
    hidden[:, 1] = torch.arange(N) / N
    inputs = {"hidden": hidden, "weight": weight, "targets": torch.arange(N) % 11, "upstream": torch.linspace(-1, 1, N)}
    got, exact = run(linear_logprob, inputs, mode=mode), run(by_torch, inputs, high=True)
    for name, value in exact.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("logit", [8.0, 14.0, 17.0, 20.0])
def test_the_gradient_of_a_near_certain_target_keeps_its_digits(logit: float, mode: str, dtype: torch.dtype) -> None:
    """1 - p is 1e-2 to 6e-7 here. A p rounded to fp32 leaves it one digit or none, a p rounded to bf16 none at all."""
    vocab = TILE_VOCAB + 6
    weight = torch.zeros(vocab, D)
    weight[:, 1] = 1.0  # of no effect on the probabilities: its logit is the same for all
    weight[TILE_VOCAB + 2, 0] = logit  # 8, 14, 17 and 20 are numbers of bf16, and so are all other logits, 0
    hidden = torch.zeros(3, D)
    hidden[:, 0] = 1.0
    inputs = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": torch.full((3,), TILE_VOCAB + 2),
        "upstream": torch.tensor([1.0, -2.0, 0.5]),
    }
    got, exact = run(linear_logprob, inputs, mode=mode), run(by_torch, inputs, high=True)
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(got["logps"].double(), exact["logps"], rtol=2e-6, atol=0)
    torch.testing.assert_close(got["hidden"][:, 0].double(), exact["hidden"][:, 0], rtol=rtol, atol=0)
    torch.testing.assert_close(got["weight"][:, 0].double(), exact["weight"][:, 0], rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0, 3000.0])
def test_a_log_prob_never_exceeds_zero(size: float, dtype: torch.dtype) -> None:
    """lse - z, rounded, does for one token in some hundred."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = (hidden @ weight.t()).argmax(1)
    logps = linear_logprob((hidden * size**0.5).to(dtype), (weight * size**0.5 / 10).to(dtype), targets)
    assert (logps <= 0).all()
    assert torch.isfinite(logps).all()


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_the_slope_at_the_cap_is_that_of_the_capped_logits(mode: str) -> None:
    """Logits of several times the cap: tanh is flat there, and a slope of 1 would be wrong a hundredfold."""
    inputs = make(softcap=0.7, logit_scale=1.3, with_bias=True)
    got, exact = run(linear_logprob, inputs, mode=mode), run(by_torch, inputs, high=True)
    for name in ("hidden", "weight", "bias"):
        assert relative(got[name], exact[name])[0] < 2e-6, name


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_each_tokens_gradient_is_its_own__liger_968_and_1298(mode: str) -> None:
    """An upstream gradient of one token alone gives that token's row and no other (Liger #968, #1298)."""
    inputs = make()
    for row in (1, TILE_ROWS, N - 1):
        upstream = torch.zeros(N)
        upstream[row] = -3.0
        got = run(linear_logprob, {**inputs, "upstream": upstream}, mode=mode)
        exact = run(by_torch, {**inputs, "upstream": upstream}, high=True)
        assert got["hidden"].any(1).nonzero().flatten().tolist() == [row]
        torch.testing.assert_close(got["hidden"].double(), exact["hidden"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["weight"].double(), exact["weight"], rtol=1e-5, atol=1e-6)


def test_a_target_that_occurs_many_times_collects_every_gradient() -> None:
    inputs = make()
    inputs["targets"] = torch.full((N,), TILE_VOCAB)
    got, exact = run(linear_logprob, inputs), run(by_torch, inputs, high=True)
    torch.testing.assert_close(got["weight"].double(), exact["weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_the_same_call_gives_the_same_bits(mode: str) -> None:
    inputs = make(torch.bfloat16, with_bias=True, softcap=3.0)
    first, second = (run(linear_logprob, inputs, mode=mode) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_inputs_are_left_as_they_were() -> None:
    inputs = make(with_bias=True, softcap=2.0, logit_scale=0.5)
    copies = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    run(linear_logprob, inputs)
    for name, value in copies.items():
        assert torch.equal(inputs[name], value), name


def test_a_second_derivative_is_refused() -> None:
    inputs = make()
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = inputs["weight"].clone().requires_grad_()
    logps = linear_logprob(hidden, weight, inputs["targets"])
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("row", "target"), [(0, V), (TILE_ROWS + 3, -1), (N - 1, 10**12), (4, -101)])
def test_a_target_outside_the_vocabulary_is_an_error_that_names_its_row(row: int, target: int) -> None:
    inputs = make()
    inputs["targets"][row] = target
    with pytest.raises(IndexError, match=rf"targets\[{row}\].* is {target}, outside the vocabulary \[0, {V}\)"):
        linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"])


def test_the_first_of_several_targets_outside_the_vocabulary_is_named() -> None:
    targets = torch.tensor([[1, -100, V], [2, -7, V + 1]])
    with pytest.raises(IndexError, match=rf"targets\[2\] \(flattened\) is {V}"):
        linear_logprob(torch.zeros(2, 3, D), torch.zeros(V, D), targets)


def _invalid() -> Iterator[tuple[str, dict[str, Any]]]:
    hidden, weight, targets = torch.zeros(4, D), torch.zeros(V, D), torch.zeros(4, dtype=torch.long)
    good = {"hidden": hidden, "weight": weight, "targets": targets}
    yield "hidden must be", {**good, "hidden": torch.zeros(4, D + 1)}
    yield "hidden must be", {**good, "hidden": torch.zeros(())}
    yield "weight", {**good, "weight": torch.zeros(V, 1, D)}
    yield "weight", {**good, "weight": torch.zeros(0, D)}
    yield "share one of fp32, bf16, fp16", {**good, "hidden": hidden.bfloat16()}
    yield (
        "share one of fp32, bf16, fp16",
        {**good, "hidden": hidden.to(torch.float8_e4m3fn), "weight": weight.to(torch.float8_e4m3fn)},
    )
    yield "targets must be integers", {**good, "targets": torch.zeros(3, dtype=torch.long)}
    yield "targets must be integers", {**good, "targets": torch.zeros(4, 1, dtype=torch.long)}
    yield "targets must be integers", {**good, "targets": torch.zeros(4)}
    yield "bias must be", {**good, "bias": torch.zeros(V - 1)}
    yield "bias must be", {**good, "bias": torch.zeros(V, 1)}
    for softcap in (0.0, -1.0, math.nan):
        yield "softcap must be finite and > 0", {**good, "softcap": softcap}
    for scale in (0.0, math.inf, math.nan):
        yield "logit_scale must be finite", {**good, "logit_scale": scale}
    yield "mode must be", {**good, "mode": "fast"}
    yield "backend must be", {**good, "backend": "cublas"}


@pytest.mark.parametrize(("message", "arguments"), list(_invalid()))
def test_arguments_that_do_not_fit_are_refused(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_targets_may_be_any_integers(dtype: torch.dtype) -> None:
    inputs = make(vocab=200)
    targets = inputs["targets"].clamp(min=0)
    expected = linear_logprob(inputs["hidden"], inputs["weight"], targets)
    ignore = {"ignore_index": 255} if dtype == torch.uint8 else {}
    assert torch.equal(linear_logprob(inputs["hidden"], inputs["weight"], targets.to(dtype), **ignore), expected)
