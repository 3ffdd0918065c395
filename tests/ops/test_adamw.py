"""AdamW against torch.optim.AdamW in fp32 and float64, and what a shard, a scale and a skipped step come to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import adamw, adamw_
from selm_fast.ops.adamw import Tensors, by_torch
from selm_fast.ops.backend import interpreted
from tests.ops.adamw_cases import (
    DEFAULTS,
    MOMENTS,
    bits_of,
    copied,
    make,
    number,
    same_bits,
    settings,
    take,
    torchs_adamw,
)
from tests.ops.triton_cases import assert_as_accurate

NUM_STEPS = 50
KINDS = (torch.float32, torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1, "start": 1.0},
    "recipe": {"lr": 5e-7, "weight_decay": 0.01, "start": 0.02},
    "large step": {"lr": 1.0, "weight_decay": 0.5, "start": 1e4},
    "tiny gradients, tiny eps": {"grads": 1e-15, "eps": 1e-20},
    "gradients below eps": {"grads": 1e-9},
    "large gradients": {"grads": 1e15},
    "other betas": {"beta1": 0.5, "beta2": 0.9999},
    "no memory": {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3},
    "late": {"steps_before": 99_999, "start": 1.0},
}


def run_torchs(param: Tensor, grads: list[Tensor], steps_before: int, numbers: dict[str, float]) -> Tensors:
    """torch's AdamW, one tensor after the other, in the dtype of `param`."""
    param = param.clone().requires_grad_()
    optimizer = torchs_adamw(param, numbers, foreach=False, fused=False)
    zeros = torch.zeros_like(param)
    if steps_before:
        optimizer.state[param] = {"step": number(steps_before), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    state = optimizer.state[param]
    return Tensors(param.detach(), grads[-1], state["exp_avg"], state["exp_avg_sq"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by", ["auto", "reference", "triton"])
def test_as_accurate_as_torch(by: str, case: str) -> None:
    """Weights and fp32 moments after 1 and after 50 steps: at most twice the error of torch's, against float64."""
    if by == "triton" and not interpreted():
        pytest.skip("on a GPU, test_adamw_triton.py holds the kernel to the reference")
    given = dict(CASES[case])
    start, size, before = given.pop("start", 0.0), given.pop("grads", 1.0), given.pop("steps_before", 0)
    numbers = DEFAULTS | given
    generator = torch.Generator().manual_seed(0)
    first = start * torch.randn(500, generator=generator)
    grads = [size * (torch.randn(500, generator=generator) + 0.3) for _ in range(NUM_STEPS)]
    got = Tensors(first.clone(), grads[0], torch.zeros(500), torch.zeros(500))
    for nth, grad in enumerate(grads, 1):
        step = number(before + nth)
        if by == "reference":
            by_torch(got._replace(grad=grad), step, settings(**given), None, None)
        else:
            adamw_(got.param, grad, *got[2:], step=step, **numbers, backend=by)  # type: ignore[arg-type]
        if nth in (1, NUM_STEPS):
            peer, exact = (run_torchs(first.to(dtype), grads[:nth], before, numbers) for dtype in KINDS)
            for name in ("param", "exp_avg", "exp_avg_sq"):
                assert_as_accurate(getattr(got, name), getattr(peer, name), getattr(exact, name), floor=1e-7)


@pytest.mark.parametrize("scale", [None, 0.37])
def test_on_a_cpu_the_bits_of_torchs_fused_kernel(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, and the elements of a tail that fills no vector, included."""
    monkeypatch.setattr(adamw, "FUSED_CHUNK", 1 << 12)
    got = make(3 * (1 << 12) + 1003)
    theirs = copied(got)
    theirs.param.requires_grad_()
    optimizer = torchs_adamw(theirs.param, DEFAULTS, fused=True)
    state = {"step": number(2), "exp_avg": theirs.exp_avg, "exp_avg_sq": theirs.exp_avg_sq}
    optimizer.state[theirs.param] = state
    given = None if scale is None else number(scale)
    for nth in (3, 4):
        theirs.param.grad = got.grad.clone() if scale is None else got.grad.clone().mul_(number(scale))
        optimizer.step()
        before = got.grad.clone()
        adamw_(*got, step=number(nth), **DEFAULTS, grad_scale=given)
        assert torch.equal(got.grad, before)
        assert same_bits(got, theirs._replace(param=theirs.param.detach()))


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_skipped_step_changes_no_bit(backend: str, device: str, moments: torch.dtype) -> None:
    before = make(100, moments, device)
    before.grad[::2] = torch.nan
    before.grad[1] = torch.inf
    flags = [torch.tensor(True), number(1), number(0.5), number(torch.nan)]
    for flag in (flag.to(device) for flag in flags):
        assert same_bits(take(before, skip=flag, backend=backend), before)
        after = copied(before)
        by_torch(after, number(3, device), settings(), None, flag)
        assert same_bits(after, before)


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_step_that_is_not_skipped(backend: str, device: str, moments: torch.dtype) -> None:
    before = make(100, moments, device)
    expected = take(before, backend=backend)
    assert all(not torch.equal(expected[i], before[i]) for i in (0, 2, 3))
    for flag in (torch.tensor(False, device=device), number(0, device)):
        assert same_bits(take(before, skip=flag, backend=backend), expected)
    step = number(3, device)
    adamw_(*copied(before), step=step, **DEFAULTS, backend=backend)  # type: ignore[arg-type]
    assert step == 3


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_scale_is_a_scaled_gradient(backend: str, device: str, moments: torch.dtype) -> None:
    before = make(1000, moments, device)
    scale = number(0.37, device)
    got = take(before, grad_scale=scale, backend=backend)
    expected = take(before._replace(grad=before.grad * scale), backend=backend)
    assert same_bits(got._replace(grad=expected.grad), expected)


@pytest.mark.parametrize("moments", MOMENTS)
def test_shards_equal_the_whole(backend: str, device: str, moments: torch.dtype) -> None:
    """torch's fused kernel, which fp32 moments have on a CPU, repeats itself for whole vectors only."""
    whole = make(3200, moments, device)
    fused = device == "cpu" and backend != "triton" and moments == torch.float32
    cuts = [0, 16, 1600, 3200] if fused else [0, 1, 1000, 1601, 3200]
    for offset in (0, (1 << 31) - 1200, (1 << 32) - 1200, (1 << 40) + 5):
        expected = take(whole, salt=77, offset=offset, backend=backend)
        parts = [
            take(Tensors(*(t[a:b].clone() for t in whole)), salt=77, offset=offset + a, backend=backend)
            for a, b in pairwise(cuts)
        ]
        assert same_bits(Tensors(*(torch.cat(t) for t in zip(*parts, strict=True))), expected)


@pytest.mark.parametrize("moments", MOMENTS)
def test_the_size_of_chunks_is_no_matter(moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those of the reference, and where a position's high half changes."""
    results = []
    for chunk in (1 << 16, 100):
        monkeypatch.setattr(adamw, "CPU_CHUNK", chunk)
        results.append(make(1001, moments))
        by_torch(results[-1], number(3), settings(salt=5, offset=(1 << 32) - 450), number(0.9), None)
    assert same_bits(*results)


def test_stored_moments_are_rounded_by_the_elements_own_bits(backend: str, device: str) -> None:
    """The low half of an element's bits is the first moment's, the high half the second's."""
    salt, offset, nth = -(1 << 61) + 3, (1 << 33) + 11, 7
    before = make(200, torch.bfloat16, device)
    got = take(before, nth, salt=salt, offset=offset, backend=backend)
    m = before.exp_avg.float() * 0.9 + before.grad * (1 - 0.9)
    v = before.exp_avg_sq.float() * 0.999 + before.grad * (1 - 0.999) * before.grad
    for i in range(200):
        random = bits_of(salt, nth, offset + i)
        for stored, exact, half in ((got.exp_avg, m, random & 0xFFFF), (got.exp_avg_sq, v, random >> 16)):
            encoding = (int(exact[i].view(torch.int32)) + half) >> 16
            assert int(stored[i].view(torch.int16)) == encoding


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
def test_any_rank_and_no_elements(backend: str, device: str, shape: tuple[int, ...], moments: torch.dtype) -> None:
    flat = make(30, moments, device)
    numel = torch.Size(shape).numel()
    expected = take(Tensors(*(t[:numel].clone() for t in flat)), backend=backend)
    got = take(Tensors(*(t[:numel].view(shape) for t in flat)), backend=backend)
    assert got.param.shape == shape
    assert same_bits(Tensors(*(t.view(-1) for t in got)), expected)


def test_a_weight_that_requires_gradients() -> None:
    before = make(10)
    weight = torch.nn.Parameter(before.param.clone())
    adamw_(weight, *copied(before)[1:], step=number(3), **DEFAULTS)
    assert torch.equal(weight.detach(), take(before).param) and weight.grad_fn is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"param": torch.zeros(4, 4).double()}, "param must be contiguous torch.float32; got torch.float64"),
    ({"param": torch.zeros(4, 8)[:, ::2]}, r"param must be contiguous .* strides \(8, 2\)"),
    ({"grad": torch.zeros(4, 4).bfloat16()}, "grad must be contiguous torch.float32; got torch.bfloat16"),
    ({"grad": torch.zeros(4, 4).t()[:2]}, "grad must be contiguous"),
    ({"grad": torch.zeros(16)}, r"grad must have param's shape \(4, 4\) on cpu; got \(16,\)"),
    (
        {"exp_avg": torch.zeros(4, 4).half()},
        "exp_avg must be contiguous torch.float32 or torch.bfloat16; got .*16",
    ),
    ({"exp_avg_sq": torch.zeros(4, 8)[:, ::2]}, "exp_avg_sq must be contiguous"),
    ({"exp_avg_sq": torch.zeros(4)}, "exp_avg_sq must have param's shape"),
    (
        {"exp_avg_sq": torch.zeros(4, 4).bfloat16()},
        "exp_avg_sq must have exp_avg's dtype torch.float32; got .*16",
    ),
    ({"exp_avg": torch.zeros(4, 4, device="meta")}, "exp_avg must have param's shape .* on cpu; .* on meta"),
    ({"step": torch.tensor([3.0])}, r"step must be \(\) torch.float32 on cpu; got \(1,\)"),
    ({"step": torch.tensor(3)}, r"step must be \(\) torch.float32 on cpu; got \(\) torch.int64"),
    ({"step": torch.tensor(0.0)}, "step must be the number of this step, from 1; got 0.0"),
    ({"grad_scale": torch.tensor(3.0).double()}, "grad_scale must be"),
    ({"skip": torch.tensor(1)}, r"skip must be \(\) torch.bool or torch.float32"),
    ({"skip": torch.tensor(True, device="meta")}, "skip must be .* on meta"),
    ({"beta1": 1.0}, "beta1 must be at least 0 and below 1; got 1.0"),
    ({"beta2": -0.1}, "beta2 must be"),
    ({"lr": float("nan")}, "lr must be finite and not negative; got nan"),
    ({"eps": -1e-8}, "eps must be"),
    ({"weight_decay": float("inf")}, "weight_decay must be"),
    ({"salt": 1 << 63}, "salt must be an int64"),
    ({"offset": -1}, "offset must be a position"),
    ({"backend": "cuda"}, "backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_refused(wrong: dict[str, Any], message: str) -> None:
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    tensors: dict[str, Tensor] = {name: torch.zeros(4, 4) for name in names}
    with pytest.raises(ValueError, match=message):
        adamw_(**tensors | {"step": number(1)} | DEFAULTS | wrong)  # type: ignore[arg-type]
