"""The Triton loss kernel against `preference_loss`, which holds the formula; everything in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from selm_fast.ops import Pairs, preference_loss
from tests.ops.triton_cases import DEVICE, anywhere, poisoned_memory

loss_triton = pytest.importorskip("selm_fast.ops.preference_loss_triton")
sums_triton = pytest.importorskip("selm_fast.ops.sequence_sum_triton")

pytestmark = anywhere

SETTINGS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "exploration_weight": 0.0, "label_smoothing": 0.0},
    "selm": {"beta": 0.01, "exploration_weight": 1e-5, "label_smoothing": 0.0},
    "smoothed": {"beta": 0.3, "exploration_weight": -0.7, "label_smoothing": 0.1},
}
# Two computations in fp64 that round in different places: some units in the last place.
CLOSE = {"rtol": 4e-15, "atol": 1e-15}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """A kernel that reads what nobody wrote shows it."""
    with poisoned_memory():
        yield


def make(num_groups: int, spread: float = 20.0) -> tuple[Tensor, Tensor, Pairs]:
    """Groups of three sequences in a random order of groups, with every alias, and one sequence that nobody uses."""
    generator = torch.Generator().manual_seed(num_groups)
    policy, reference = (
        -300 + spread * torch.randn(3 * num_groups + 1, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    first = 3 * torch.randperm(num_groups, generator=generator)
    kind = torch.arange(num_groups) % 5
    chosen, rejected = first, torch.where(kind == 4, first, first + 1)  # even one answer in both roles
    explored = torch.stack([first + 2, torch.full_like(first, -1), chosen, rejected, chosen])[kind, range(num_groups)]
    pairs = Pairs(chosen=chosen, rejected=rejected, explored=explored)
    return policy.to(DEVICE), reference.to(DEVICE), pairs.to(DEVICE)


def by_triton(policy: Tensor, reference: Tensor, pairs: Pairs, **settings: float) -> tuple[Tensor, Tensor, Tensor]:
    roles = {"chosen": pairs.chosen, "rejected": pairs.rejected, "explored": pairs.explored}
    return loss_triton.group_losses(policy, reference, **roles, **settings)  # type: ignore[no-any-return]


def by_torch(
    policy: Tensor, reference: Tensor, pairs: Pairs, *, divisor: int, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    loss, metrics = preference_loss(policy, reference, pairs, **settings, num_groups=divisor)
    (slopes,) = torch.autograd.grad(loss, policy)
    return loss.detach(), torch.stack(list(metrics.values())), slopes


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_groups", [1, 2, 5, 127, 128, 129, 300])
def test_equals_the_formula(num_groups: int, settings: str) -> None:
    for divisor in (num_groups, 7):
        inputs = make(num_groups)
        got = by_triton(*inputs, **SETTINGS[settings], divisor=divisor)
        expected = by_torch(*inputs, **SETTINGS[settings], divisor=divisor)
        assert got[1].shape == (loss_triton.NUM_METRICS, num_groups)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == torch.float64
            torch.testing.assert_close(mine, theirs, **CLOSE, equal_nan=True)


@pytest.mark.parametrize("spread", [1e-9, 1e4, 1e9])
def test_margins_near_and_far_from_zero(spread: float) -> None:
    inputs = make(50, spread)
    got = by_triton(*inputs, **SETTINGS["smoothed"], divisor=50)
    expected = by_torch(*inputs, **SETTINGS["smoothed"], divisor=50)
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.isfinite().any()
        torch.testing.assert_close(mine, theirs, rtol=4e-15, atol=1e-15 * max(spread, 1), equal_nan=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_step_0_is_exactly_log_2(label_smoothing: float) -> None:
    policy, _, pairs = make(300)
    settings = {"beta": 0.1, "exploration_weight": 0.3, "label_smoothing": label_smoothing}
    for count in (*range(1, 20), *range(20, 301, 9), 128, 129, 256, 257, 300):
        roles = {"chosen": pairs.chosen[:count], "rejected": pairs.rejected[:count], "explored": pairs.explored[:count]}
        loss, metrics, _ = loss_triton.group_losses(policy, policy, **roles, **settings, divisor=count)
        assert loss.item() == math.log(2), count
    assert metrics[:2].eq(math.log(2)).all()
    assert metrics[2:5].eq(0).all() and metrics[6:8].eq(0).all()


def test_a_group_of_infinite_margin_costs_nothing_or_everything() -> None:
    policy = torch.tensor([0.0, -torch.inf, -torch.inf, 0.0], dtype=torch.float64, device=DEVICE)
    reference = torch.zeros_like(policy)
    chosen, none = torch.tensor([0, 2], device=DEVICE), torch.tensor([-1, -1], device=DEVICE)
    settings = {"beta": 0.1, "exploration_weight": 0.5, "label_smoothing": 0.0, "divisor": 1}
    _, metrics, slopes = loss_triton.group_losses(policy, reference, chosen, chosen + 1, none, **settings)
    assert metrics[0].tolist() == [0.0, math.inf]
    assert slopes.tolist() == [0.0, 0.0, -0.1, 0.1]


def test_nan_reaches_the_loss() -> None:
    for role in range(3):
        policy, reference, _ = make(2)
        policy[role] = torch.nan
        one = torch.zeros(1, dtype=torch.long, device=DEVICE)
        loss, _, _ = loss_triton.group_losses(
            policy, reference, one, one + 1, one + 2, **SETTINGS["smoothed"], divisor=1
        )
        assert loss.isnan()


def test_sequences_without_a_role_have_slope_0() -> None:
    policy, reference, _ = make(4)
    two = torch.tensor([3, 9], device=DEVICE)
    _, _, slopes = loss_triton.group_losses(
        policy, reference, two, two + 1, torch.full_like(two, -1), **SETTINGS["smoothed"], divisor=2
    )
    assert slopes.nonzero().flatten().tolist() == [3, 4, 9, 10]


def test_no_groups() -> None:
    policy, reference, pairs = make(0)
    loss, metrics, slopes = by_triton(policy, reference, pairs, **SETTINGS["smoothed"], divisor=1)
    assert loss.item() == 0 and metrics.shape == (11, 0) and slopes.tolist() == [0.0]


def test_the_same_bits_from_run_to_run() -> None:
    first, second = (by_triton(*make(200), **SETTINGS["smoothed"], divisor=200) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.int64), b.view(torch.int64))


class Launches(TorchDispatchMode):
    """Counts what would run on a device: kernels of Triton, and torch's operations other than views and allocations."""

    FREE = ("empty", "new_empty", "empty_like", "detach", "alias", "view", "slice", "select", "as_strided")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *kernels: Any) -> None:
        super().__init__()
        self.names: list[str] = []
        for kernel_type in {type(kernel) for kernel in kernels}:
            monkeypatch.setattr(kernel_type, "run", self._counted(kernel_type.run))

    def _counted(self, run: Any) -> Any:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.__name__)
            with _disable_current_modes():  # the interpreter itself is made of operations
                return run(kernel, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_three_launches_from_token_logps_to_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    _, reference, pairs = make(100)
    lengths = torch.arange(reference.shape[0], device=DEVICE)
    cu_responses = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    token_logps = torch.full((int(lengths.sum()),), -1.0, device=DEVICE)
    with Launches(monkeypatch, loss_triton._group_losses_kernel, sums_triton._sequence_sum_kernel) as launches:
        policy = sums_triton.sequence_sums(token_logps, cu_responses)
        by_triton(policy, reference, pairs, **SETTINGS["smoothed"], divisor=100)
    assert launches.names == ["_sequence_sum_kernel", "zeros_like", "_group_losses_kernel"]
