"""`fused_preference_loss`: the bits of the three ops one after the other, in one autograd node."""

from __future__ import annotations

import importlib
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import Pairs, fused_preference_loss, linear_logprob, preference_loss, sequence_sum
from tests.ops.memory import allocated
from tests.ops.places import BACK_ENDS, MODES_BACK_ENDS, MODES_BACK_ENDS_DTYPES

head_module = importlib.import_module("selm_fast.ops.head")
D, V = 16, 90
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"with_bias": True, "softcap": 3.0, "logit_scale": 0.7},
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "selm": {"beta": 0.1, "exploration_weight": 0.05},
    "smoothed": {"beta": 0.5, "exploration_weight": 0.2, "label_smoothing": 0.1, "num_groups": 9},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(head_module.TILE_ROWS, device, 16)
        monkeypatch.setitem(head_module.TILE_VOCAB, device, 32)


def batch(
    groups: int = 5,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    longest: int = 9,
    with_bias: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Groups of two or three sequences of 1 to `longest` tokens; explored is one's own, an alias, or absent."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    roles, lengths = [], []
    for _ in range(groups):
        first = len(lengths)
        explored = chooser.choice([first + 2, first, first + 1, -1])
        roles.append((first, first + 1, explored))
        lengths += [chooser.randint(1, longest) for _ in range(3 if explored == first + 2 else 2)]
    chosen, rejected, explored_at = torch.tensor(roles, dtype=torch.long).reshape(-1, 3).unbind(1)
    rows = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": normal(rows, D).to(device, dtype),
        "weight": (normal(V, D) * 0.5).to(device, dtype),
        "bias": normal(V).to(device, dtype) if with_bias else None,
        "targets": torch.randint(V, (rows,), generator=generator).to(device),
        "cu_responses": torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        "pairs": Pairs(chosen=chosen, rejected=rejected, explored=explored_at).to(device),
        "reference_logps": (normal(len(lengths)).double() * 2 - 4.5 * torch.tensor(lengths)).to(device),
        **settings,
    }


def one_by_one(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_responses: Tensor,
    pairs: Pairs,
    reference_logps: Tensor,
    *,
    backend: str = "auto",
    mode: str = "auto",
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The three ops that the fused one stands for."""
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "mode": mode, "backend": backend}
    logps = linear_logprob(hidden, weight, targets, **head)
    return preference_loss(sequence_sum(logps, cu_responses, backend=backend), reference_logps, pairs, **settings)


def by_formula(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_responses: Tensor,
    pairs: Pairs,
    reference_logps: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in plain operations of torch on whole matrices."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    sums = torch.stack([part.sum() for part in logps.split(cu_responses.diff().tolist())])
    return preference_loss(sums, reference_logps, pairs, **settings)


def run(function: Any, inputs: dict[str, Any], *, high: bool = False, upstream: float = 1.0, **extra: Any) -> Any:
    """Loss, metrics and gradients by name."""
    inputs = dict(inputs)
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        if inputs.get(name) is not None:
            value = inputs[name]
            inputs[name] = leaves[name] = (value.double() if high else value).detach().clone().requires_grad_()
    loss, metrics = function(**inputs, **extra)
    (upstream * loss).backward()
    return loss.detach(), metrics, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same_loss_bits(one: Any, other: Any) -> None:
    (loss, metrics, _), (other_loss, other_metrics, _) = one, other
    assert torch.equal(loss, other_loss)
    for name, value in metrics.items():
        assert torch.equal(value.nan_to_num(7.5), other_metrics[name].nan_to_num(7.5)), name


def assert_same_bits(one: Any, other: Any) -> None:
    assert_same_loss_bits(one, other)
    (_, _, grads), (_, _, other_grads) = one, other
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


@MODES_BACK_ENDS
@pytest.mark.parametrize("loss", [pytest.param("dpo", marks=pytest.mark.slow), "selm", "smoothed"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_metrics_and_gradients_are_those_of_the_formula_in_float64(
    head: str, loss: str, mode: str, backend: str, device: str
) -> None:
    inputs = batch(device=device, **HEADS[head], **LOSSES[loss])
    value, metrics, grads = run(fused_preference_loss, inputs, mode=mode, backend=backend)
    exact, exact_metrics, exact_grads = run(by_formula, inputs, high=True)
    assert value.dtype == torch.float64
    assert value.shape == ()
    # fp32 log-probs: 1e-6 each, at most 27 tokens a group.
    torch.testing.assert_close(value, exact, rtol=3e-6, atol=3e-6)
    assert metrics.keys() == exact_metrics.keys()
    for name, numbers in exact_metrics.items():
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], numbers, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name, grad in exact_grads.items():
        assert grads[name].dtype == torch.float32
        size = grad.abs().max().item()
        torch.testing.assert_close(grads[name].double(), grad, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_torch_gives_what_the_three_ops_give(head: str, loss: str, mode: str, dtype: torch.dtype) -> None:
    """Loss and metrics to the bit; a slope's last bit of fp64 may round a token's gradient to its neighbour in fp32."""
    for seed in range(3):
        inputs = batch(seed=seed, dtype=dtype, **HEADS[head], **LOSSES[loss])
        settings = {"mode": mode, "backend": "torch"}
        fused = run(fused_preference_loss, inputs, upstream=1.7, **settings)
        expected = run(one_by_one, inputs, upstream=1.7, **settings)
        assert_same_loss_bits(fused, expected)
        for name, grad in expected[2].items():
            difference = (fused[2][name].double() - grad.double()).norm() / grad.double().norm()
            assert difference <= {torch.float32: 2e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype], name


@MODES_BACK_ENDS_DTYPES
def test_the_log_probs_have_the_bits_of_the_three_ops(mode: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """What a reference cache holds comes from `sequence_sum`; step 0 is exact because the two agree to the bit."""
    for seed in range(1 if backend == "triton" else 3):
        inputs = batch(seed=seed, dtype=dtype, device=device, **LOSSES["selm"])
        metrics = run(fused_preference_loss, inputs, mode=mode, backend=backend)[1]
        expected = run(one_by_one, inputs, backend=backend)[1]
        for name in ("logps/chosen", "logps/rejected", "logps/explored"):
            assert torch.equal(metrics[name].nan_to_num(7.5), expected[name].nan_to_num(7.5)), name


@BACK_ENDS
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_step_zero_is_ln_2_to_the_bit(smoothing: float, dtype: torch.dtype, backend: str, device: str) -> None:
    for groups in (1, 12) if backend == "triton" else range(1, 25):
        inputs = batch(groups, seed=groups, dtype=dtype, device=device, longest=3)
        with torch.no_grad():
            logps = linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"], backend=backend)
            inputs["reference_logps"] = sequence_sum(logps, inputs["cu_responses"], backend=backend)
        loss, metrics = fused_preference_loss(
            **inputs, beta=0.1, exploration_weight=1e-3, label_smoothing=smoothing, backend=backend
        )
        assert loss.item() == math.log(2)
        assert (metrics["loss"] == math.log(2)).all()
        assert (metrics["rewards/margins"] == 0).all()


def test_everything_is_one_autograd_node() -> None:
    inputs = batch(with_bias=True, beta=0.1)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, _ = fused_preference_loss(**inputs)
    variables = [function.variable for function, _ in loss.grad_fn.next_functions if function is not None]
    assert len(variables) == 3
    assert all(variable is leaf for variable, leaf in zip(variables, leaves, strict=True))


def test_micro_batches_accumulate_to_the_step() -> None:
    inputs = batch(6, beta=0.2, exploration_weight=0.1)
    whole = run(fused_preference_loss, inputs)
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    total = 0.0
    for groups in (slice(0, 2), slice(2, 3), slice(3, 6)):
        roles = [getattr(inputs["pairs"], role)[groups] for role in ("chosen", "rejected", "explored")]
        first, last = int(torch.stack(roles[:2]).min()), int(torch.stack(roles).max()) + 1
        cu = inputs["cu_responses"].tolist()
        rows = slice(cu[first], cu[last])
        shifted = [torch.where(role < 0, role, role - first) for role in roles]
        loss, _ = fused_preference_loss(
            hidden[rows],
            weight,
            inputs["targets"][rows],
            inputs["cu_responses"][first : last + 1] - cu[first],
            Pairs(chosen=shifted[0], rejected=shifted[1], explored=shifted[2]),
            inputs["reference_logps"][first:last],
            beta=0.2,
            exploration_weight=0.1,
            num_groups=6,
        )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole[0].item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, whole[2]["hidden"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(weight.grad, whole[2]["weight"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_sequences_of_one_token_and_unused_ones(mode: str, backend: str, device: str) -> None:
    """Groups of single tokens; a sequence that no group names gets no gradient, an empty one has log-prob 0."""
    inputs = batch(4, device=device, longest=1, beta=0.4, exploration_weight=0.3)
    names = ("chosen", "rejected", "explored")
    pairs = inputs["pairs"]
    inputs["pairs"] = Pairs(**{name: getattr(pairs, name)[1:] for name in names})
    inputs["cu_responses"] = torch.cat([inputs["cu_responses"], inputs["cu_responses"][-1:]])
    inputs["reference_logps"] = torch.cat([inputs["reference_logps"], inputs["reference_logps"][:1]])
    _, _, grads = run(fused_preference_loss, inputs, mode=mode, backend=backend)
    _, _, exact = run(by_formula, inputs, high=True)
    assert (grads["hidden"][:2] == 0).all()
    for name, grad in exact.items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=2e-5, atol=1e-7)


@MODES_BACK_ENDS
def test_no_groups_and_no_rows_give_a_loss_of_zero(mode: str, backend: str, device: str) -> None:
    loss, metrics, grads = run(fused_preference_loss, batch(0, device=device, beta=0.1), mode=mode, backend=backend)
    assert loss.item() == 0.0
    assert all(value.shape == (0,) for value in metrics.values())
    assert grads["hidden"].shape == (0, D)
    assert (grads["weight"] == 0).all()


def test_without_gradients_nothing_is_kept() -> None:
    inputs = batch(beta=0.1)
    loss, _ = fused_preference_loss(**inputs, mode="keep")
    assert not loss.requires_grad
    inputs["hidden"].requires_grad_()
    assert torch.equal(fused_preference_loss(**inputs, mode="keep")[0], loss)
    with torch.no_grad():
        spent = allocated(lambda: fused_preference_loss(**inputs, mode="keep"))
    assert inputs["hidden"].shape[0] * V * 4 not in spent.sizes


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_recompute_holds_nothing_of_the_size_of_the_logits(dtype: torch.dtype) -> None:
    inputs = batch(12, dtype=dtype, beta=0.1)
    inputs["weight"] = inputs["weight"].repeat(8, 1)
    spent = allocated(lambda: run(fused_preference_loss, inputs, mode="recompute"))
    logits = inputs["hidden"].shape[0] * 8 * V * dtype.itemsize
    weight = inputs["weight"].nbytes
    assert max(size for size in spent.sizes if size != weight) < logits / 4
    assert spent.peak < 2 * weight + logits / 2  # the weight is cloned, and has a gradient


@MODES_BACK_ENDS_DTYPES
def test_the_same_call_gives_the_same_bits_whatever_memory_held(
    mode: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """The second time every torch.empty is full of NaN."""
    groups = 2 if backend == "triton" else 5
    inputs = batch(groups, dtype=dtype, device=device, with_bias=True, softcap=3.0, **LOSSES["smoothed"])
    first = run(fused_preference_loss, inputs, mode=mode, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        second = run(fused_preference_loss, inputs, mode=mode, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(first, second)


def test_the_node_passes_gradcheck_in_float64() -> None:
    inputs = batch(2, with_bias=True, longest=3, softcap=2.0, **LOSSES["smoothed"])
    names = ("hidden", "weight", "bias")
    inputs |= {name: inputs[name][:, :5] for name in ("hidden", "weight")}
    leaves = [inputs.pop(name).double().requires_grad_() for name in names]

    def function(*tensors: Tensor) -> Tensor:
        return fused_preference_loss(**dict(zip(names, tensors, strict=True)), **inputs)[0]

    assert torch.autograd.gradcheck(function, leaves, atol=1e-9, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_nothing_waits_for_the_gpu(mode: str) -> None:
    inputs = batch(dtype=torch.bfloat16, device="cuda", with_bias=True, **LOSSES["selm"])
    run(fused_preference_loss, inputs, mode=mode)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused_preference_loss, inputs, mode=mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_the_custom_op_is_sound(mode: str) -> None:
    """Schema, fake kernels and autograd registration, under dynamic shapes too."""
    inputs = batch(3, with_bias=True)
    pairs = replace(inputs["pairs"], explored=inputs["pairs"].chosen)  # NaN in a metric would equal nothing
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    torch.library.opcheck(
        torch.ops.selm_fast.fused_preference_loss.default,
        (
            *leaves, inputs["targets"], inputs["cu_responses"], pairs.chosen, pairs.rejected, pairs.explored,
            inputs["reference_logps"], 0.1, 0.01, 0.1, 3, 2.0, 1.5, mode == "keep", "torch",
        ),
    )  # fmt: skip


def test_torch_compile_takes_it_whole() -> None:
    def step(**arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = fused_preference_loss(**{**arguments, "hidden": arguments["hidden"] * 2})
        return loss * 3, metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for groups in (5, 3, 8):
        inputs = batch(groups, seed=groups, with_bias=True, softcap=2.0, **LOSSES["smoothed"])
        assert_same_bits(run(compiled, inputs), run(step, inputs))


@pytest.mark.gpu
def test_inductor_takes_it_whole_on_a_gpu() -> None:
    inputs = batch(dtype=torch.bfloat16, device="cuda", **LOSSES["selm"])
    compiled = torch.compile(fused_preference_loss, fullgraph=True)
    assert_same_bits(run(compiled, inputs), run(fused_preference_loss, inputs))


@pytest.mark.gpu
def test_no_mode_changes_the_bits_at_the_sizes_of_real_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matmuls of 4096 x 6144 and their ragged ends: cuBLAS chooses by size, and must choose alike."""
    monkeypatch.undo()
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.05)
        for shape in ((5000, 1024), (32064, 1024))
    )
    targets = torch.randint(32064, (5000,), generator=generator, device="cuda")
    expected = linear_logprob(hidden, weight, targets)
    for mode in ("keep", "recompute"):
        assert torch.equal(linear_logprob(hidden.requires_grad_(), weight, targets, mode=mode), expected)


META = torch.zeros(5, device="meta")


def _pairs(chosen: list[int], rejected: list[int], explored: list[int]) -> Pairs:
    return Pairs(chosen=torch.tensor(chosen), rejected=torch.tensor(rejected), explored=torch.tensor(explored))


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("sequence 0 serves two groups", {"pairs": _pairs([0, 0], [1, 3], [-1, -1])}),
        ("sequence 1 serves two groups", {"pairs": _pairs([0, 2], [1, 3], [-1, 1])}),
        ("sequence 4 serves two groups", {"pairs": _pairs([0, 2], [1, 3], [4, 4])}),
        (r"must lie in \[0, S\) = \[0, 5\)", {"pairs": _pairs([0, 2], [1, 5], [-1, -1])}),
        (r"must lie in \[0, S\)", {"pairs": _pairs([0, -1], [1, 3], [-1, -1])}),
        (r"must lie in \[0, S\)", {"pairs": _pairs([0, 2], [1, 3], [-2, -1])}),
        ("must all be", {"pairs": _pairs([0, 2], [1], [-1, -1])}),
        ("reference_logps must be", {"reference_logps": torch.zeros(4)}),
        ("rise from 0 to N = 10", {"cu_responses": torch.tensor([0, 2, 4, 6, 8, 9])}),
        ("cu_responses must be", {"cu_responses": torch.zeros(6)}),
        ("hidden must be", {"hidden": torch.zeros(1, 10, D), "targets": torch.zeros(1, 10, dtype=torch.long)}),
        ("must be on the device of hidden, cpu; got cpu, cpu, cpu, cpu, meta", {"reference_logps": META}),
        ("beta must be", {"beta": 0.0}),
        ("label_smoothing must be", {"label_smoothing": 0.5}),
        ("num_groups must be", {"num_groups": 0}),
        ("softcap must be", {"softcap": -1.0}),
        ("mode must be", {"mode": "fast"}),
        ("backend must be", {"backend": "cublas"}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(message: str, changed: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(10, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(10, dtype=torch.long),
        "cu_responses": torch.tensor([0, 2, 4, 6, 8, 10]),
        "pairs": _pairs([0, 2], [1, 3], [4, -1]),
        "reference_logps": torch.zeros(5),
        "beta": 0.1,
    }
    fused_preference_loss(**good)
    with pytest.raises(ValueError, match=message):
        fused_preference_loss(**{**good, **changed})


@pytest.mark.parametrize("target", [V, -1, -100])
def test_a_target_outside_the_vocabulary_is_an_error_that_names_its_row(target: int) -> None:
    inputs = batch(beta=0.1)
    inputs["targets"][3] = target
    with pytest.raises(IndexError, match=rf"targets\[3\] \(flattened\) is {target}, outside the vocabulary"):
        fused_preference_loss(**inputs)


def test_aliases_within_a_group_add_up() -> None:
    """Explored may be chosen or rejected, and chosen may even be rejected."""
    inputs = batch(1, beta=0.3, exploration_weight=0.2)
    inputs.update(pairs=_pairs([0, 2], [1, 2], [1, 2]), targets=torch.arange(6) % V)
    inputs.update(cu_responses=torch.tensor([0, 2, 4, 6]), reference_logps=torch.zeros(3, dtype=torch.float64))
    inputs["hidden"] = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
    _, _, grads = run(fused_preference_loss, inputs)
    _, _, exact = run(by_formula, inputs, high=True)
    torch.testing.assert_close(grads["hidden"].double(), exact["hidden"], rtol=1e-5, atol=1e-8)
