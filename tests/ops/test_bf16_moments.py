"""What bf16 moments do to weights: the error that `adamw_` states, which rounding to the nearest would exceed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selm_fast.ops.adamw import Tensors, adamw_
from tests.ops.adamw_cases import DEFAULTS, number

STEP_ERROR = 0.027  # rms of a step's difference as a share of its size; that of a sum of steps is no larger
V_ERROR = 0.0525  # of stored v; 5.2% is left of it after a step's decay
M_ERROR = 0.009  # of stored m, wherever it lies between powers of two
V_BIAS = 0.004  # the mean over 2,000 elements has a standard deviation of .0525 / sqrt(2000) = .0012

Gradient = Callable[[Tensor, int], Tensor]


def run(gradient: Gradient, size: int, num_steps: int, moments: torch.dtype, v: float, lr: float) -> Tensors:
    """Weights from 0; where v is given, the run is one of 5,000 steps already."""
    state = Tensors(*(torch.zeros(size) for _ in range(2)), *(torch.zeros(size, dtype=moments) for _ in range(2)))
    state.exp_avg_sq.fill_(v)
    numbers = DEFAULTS | {"weight_decay": 0.0, "lr": lr}
    for nth in range(1, num_steps + 1):
        state.grad.copy_(gradient(state.param, nth))
        adamw_(*state, step=number(nth + (5000 if v else 0)), **numbers, salt=1)  # type: ignore[arg-type]
    return state


def both(gradient: Gradient, size: int, num_steps: int, v: float = 0.0, lr: float = 1e-3) -> tuple[Tensors, Tensors]:
    """With bf16 and with fp32 moments."""
    rounded, exact = (run(gradient, size, num_steps, moments, v, lr) for moments in (torch.bfloat16, torch.float32))
    return rounded, exact


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("v", [0.0, 1.0, 1.3])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_steady_random_gradients(mean: float, v: float) -> None:
    """500 steps, from the first and from where v is steady. The nearest would make v 10% too large, or more."""
    deviation = (v or 1.0) ** 0.5 / (1 + mean**2) ** 0.5

    def gradient(_: Tensor, nth: int) -> Tensor:
        return deviation * (torch.randn(2000, generator=torch.Generator().manual_seed(nth)) + mean)

    got, exact = both(gradient, 2000, 500, v)
    assert distance(got.param, exact.param) < STEP_ERROR
    assert distance(got.exp_avg, exact.exp_avg) < M_ERROR
    off = got.exp_avg_sq.float() / exact.exp_avg_sq - 1
    assert off.square().mean().sqrt() < V_ERROR
    assert abs(off.mean()) < V_BIAS


def test_gradients_that_become_smaller() -> None:
    """By half: v falls to half in 500 steps. Rounded to the nearest it would not fall, and weights be 10% off."""

    def gradient(_: Tensor, nth: int) -> Tensor:
        return 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(nth))

    got, exact = both(gradient, 2000, 500, 1.0)
    assert distance(got.param, exact.param) < STEP_ERROR
    assert abs((got.exp_avg_sq.float() / exact.exp_avg_sq).mean() - 1) < V_BIAS


def test_logistic_regression() -> None:
    """2,000 steps on batches of 32 of 400 rows; rounded to the nearest, weights would be 6% off."""
    generator = torch.Generator().manual_seed(1)
    rows, truth = torch.randn(400, 300, generator=generator), torch.randn(300, generator=generator)
    labels = (rows @ truth / 300**0.5 * 3 + torch.randn(400, generator=generator) > 0).float()

    def gradient(weights: Tensor, nth: int) -> Tensor:
        batch = torch.randint(0, 400, (32,), generator=torch.Generator().manual_seed(nth))
        x = rows[batch]
        return x.t() @ (torch.sigmoid(x @ weights) - labels[batch]) / 32 + 1e-3 * weights

    got, exact = both(gradient, 300, 2000, lr=3e-3)
    losses = [torch.nn.functional.binary_cross_entropy_with_logits(rows @ w, labels) for w in (got[0], exact[0])]
    assert losses[1] < 0.1
    assert losses[0] == pytest.approx(losses[1].item(), rel=STEP_ERROR)
    assert distance(got.param, exact.param) < STEP_ERROR
