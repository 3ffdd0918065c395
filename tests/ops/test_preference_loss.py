"""`preference_loss` against the formula in plain Python numbers (fp64), and its exactness at step 0."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_fast.ops import Pairs, preference_loss

LN2 = math.log(2)


@dataclass
class Groups:
    """Log-probs of S sequences and, by group, the indices of chosen, rejected and explored (-1: none)."""

    policy: list[float]
    reference: list[float]
    groups: list[tuple[int, int, int]]


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def by_hand(data: Groups, beta: float, c: float = 0.0, s: float = 0.0, num_groups: int | None = None) -> dict[str, Any]:
    """Section 2's formulas: the loss, its derivative by every policy log-prob, and the metrics by group."""
    count = num_groups or len(data.groups)
    ratio = [p - r for p, r in zip(data.policy, data.reference, strict=True)]
    slopes = [0.0] * len(ratio)
    rows: list[dict[str, float]] = []
    for w, l, e in data.groups:  # noqa: E741
        delta = ratio[w] - ratio[l]
        # -logsigmoid(x) = log(1 + e^-x)
        preference = (1 - s) * softplus(-beta * delta) + s * softplus(beta * delta)
        exploration = c * ratio[e] if e >= 0 else 0.0
        slope = beta * (-(1 - s) * sigmoid(-beta * delta) + s * sigmoid(beta * delta)) / count
        slopes[w] += slope
        slopes[l] -= slope
        if e >= 0:
            slopes[e] += c / count
        rows.append(
            {
                "loss": preference + exploration,
                "loss/preference": preference,
                "loss/exploration": exploration,
                "rewards/chosen": beta * ratio[w],
                "rewards/rejected": beta * ratio[l],
                "rewards/explored": beta * ratio[e] if e >= 0 else math.nan,
                "rewards/accuracies": float(beta * ratio[w] > beta * ratio[l]),
                "rewards/margins": beta * ratio[w] - beta * ratio[l],
                "logps/chosen": data.policy[w],
                "logps/rejected": data.policy[l],
                "logps/explored": data.policy[e] if e >= 0 else math.nan,
            }
        )
    metrics = {name: [row[name] for row in rows] for name in rows[0]}
    return {"loss": math.fsum(row["loss"] for row in rows) / count, "slopes": slopes, "metrics": metrics}


def tensors(data: Groups) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    """The op's arguments; the policy's log-probs take a gradient."""
    chosen, rejected, explored = (torch.tensor(column) for column in zip(*data.groups, strict=True))
    policy = torch.tensor(data.policy, dtype=torch.float64, requires_grad=True)
    pairs = Pairs(chosen=chosen, rejected=rejected, explored=explored)
    return policy, torch.tensor(data.reference, dtype=torch.float64), pairs


@st.composite
def some_groups(draw: st.DrawFn, size: float = 800.0) -> Groups:
    """One to twelve groups of two or three sequences; the explored is its own, the chosen, the rejected or missing."""
    logp = st.floats(-size, 0.0, allow_subnormal=False)
    groups, sequences = [], 0
    for kind in draw(st.lists(st.sampled_from(["own", "chosen", "rejected", "none"]), min_size=1, max_size=12)):
        w, l = draw(st.permutations([sequences, sequences + 1]))  # noqa: E741
        groups.append((w, l, {"own": sequences + 2, "chosen": w, "rejected": l, "none": -1}[kind]))
        sequences += 3 if kind == "own" else 2
    values = st.lists(logp, min_size=sequences, max_size=sequences)
    return Groups(draw(values), draw(values), groups)


settings_of_the_loss = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.01, 0.1, 1.0, 3.0]),
        "c": st.sampled_from([0.0, 1e-5, 1e-3, 0.5]),
        "s": st.sampled_from([0.0, 0.1, 0.3, 0.49]),
        "num_groups": st.one_of(st.none(), st.integers(1, 64)),
    }
)


@given(data=some_groups(), chosen_settings=settings_of_the_loss)
@settings(max_examples=200, deadline=None)
def test_loss_gradient_and_metrics_are_those_of_the_formula(data: Groups, chosen_settings: dict[str, Any]) -> None:
    beta, c, s, num_groups = (chosen_settings[name] for name in ("beta", "c", "s", "num_groups"))
    policy, reference, pairs = tensors(data)
    loss, metrics = preference_loss(
        policy, reference, pairs, beta=beta, exploration_weight=c, label_smoothing=s, num_groups=num_groups
    )
    loss.backward()
    expected = by_hand(data, beta, c, s, num_groups)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12, abs=1e-12)
    assert policy.grad.tolist() == pytest.approx(expected["slopes"], rel=1e-10, abs=1e-15)
    assert metrics.keys() == expected["metrics"].keys()
    for name, values in expected["metrics"].items():
        assert not metrics[name].requires_grad
        assert metrics[name].dtype == torch.float64
        assert metrics[name].tolist() == pytest.approx(values, rel=1e-12, abs=1e-12, nan_ok=True), name


def test_signs_by_example() -> None:
    """Numbers small enough to check on paper: Delta = (2 - 1) - (-1 - 1) = 3, beta 0.5, c 0.25, ratio(explored) = 1."""
    data = Groups(policy=[2.0, -1.0], reference=[1.0, 1.0], groups=[(0, 1, 0)])
    policy, reference, pairs = tensors(data)
    loss, metrics = preference_loss(policy, reference, pairs, beta=0.5, exploration_weight=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)) + 0.25, rel=1e-14)
    pull = 0.5 / (1 + math.exp(1.5))
    assert policy.grad.tolist() == pytest.approx([-pull + 0.25, pull], rel=1e-13)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": math.log(1 + math.exp(-1.5)) + 0.25,
            "loss/preference": math.log(1 + math.exp(-1.5)),
            "loss/exploration": 0.25,
            "rewards/chosen": 0.5,
            "rewards/rejected": -1.0,
            "rewards/explored": 0.5,
            "rewards/accuracies": 1.0,
            "rewards/margins": 1.5,
            "logps/chosen": 2.0,
            "logps/rejected": -1.0,
            "logps/explored": 2.0,
        },
        rel=1e-14,
    )


def step_zero(count: int, seed: int) -> Groups:
    """Policy and reference agree; a third of the groups each have their own explored, an alias, or none."""
    generator = random.Random(seed)
    values = [generator.uniform(-900, 0) for _ in range(3 * count)]
    groups = [(3 * g, 3 * g + 1, generator.choice([3 * g + 2, 3 * g, 3 * g + 1, -1])) for g in range(count)]
    return Groups(values, values, groups)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("c", [0.0, 1e-3])
def test_the_loss_of_step_zero_is_ln_2_to_the_bit_for_every_number_of_groups(c: float, smoothing: float) -> None:
    for count in range(1, 301):
        policy, reference, pairs = tensors(step_zero(count, seed=count))
        loss, metrics = preference_loss(
            policy, reference, pairs, beta=0.1, exploration_weight=c, label_smoothing=smoothing
        )
        assert loss.item() == LN2, count
        assert (metrics["loss"] == LN2).all()
        assert (metrics["loss/preference"] == LN2).all()
        for name in ("loss/exploration", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert (metrics[name] == 0).all(), name
        assert not metrics["rewards/explored"].nan_to_num().any()


def test_step_zero_over_micro_batches_sums_to_ln_2_within_a_bit() -> None:
    """Whatever the cut: 300 numbers of groups, each cut at random into 2 to 9 micro-batches, summed exactly."""
    generator = random.Random(0)
    for count in range(2, 301):
        losses = []
        cuts = sorted(generator.sample(range(1, count), min(count - 1, generator.randint(1, 8))))
        for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
            policy, reference, pairs = tensors(step_zero(stop - start, seed=start))
            loss, _ = preference_loss(policy, reference, pairs, beta=0.1, exploration_weight=0.1, num_groups=count)
            losses.append(loss.item())
        assert abs(math.fsum(losses) - LN2) <= math.ulp(LN2), count


@given(data=some_groups(), cut=st.integers(0, 12), chosen_settings=settings_of_the_loss)
@settings(max_examples=60, deadline=None)
def test_micro_batches_add_up_to_the_step(data: Groups, cut: int, chosen_settings: dict[str, Any]) -> None:
    beta, c, s = (chosen_settings[name] for name in ("beta", "c", "s"))
    policy, reference, pairs = tensors(data)
    whole, _ = preference_loss(policy, reference, pairs, beta=beta, exploration_weight=c, label_smoothing=s)
    whole.backward()
    expected, policy.grad = policy.grad, None
    count, total = len(data.groups), 0.0
    for part in (slice(0, cut), slice(cut, None)):
        some = Pairs(chosen=pairs.chosen[part], rejected=pairs.rejected[part], explored=pairs.explored[part])
        loss, _ = preference_loss(
            policy, reference, some, beta=beta, exploration_weight=c, label_smoothing=s, num_groups=count
        )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-13, abs=1e-13)
    assert policy.grad.tolist() == pytest.approx(expected.tolist(), rel=1e-13, abs=1e-17)


def test_an_alias_equals_a_duplicated_sequence() -> None:
    alias = Groups([-3.0, -7.0], [-4.0, -5.0], [(0, 1, 1)])
    twice = Groups([-3.0, -7.0, -7.0], [-4.0, -5.0, -5.0], [(0, 1, 2)])
    gradients = []
    for data in (alias, twice):
        policy, reference, pairs = tensors(data)
        loss, _ = preference_loss(policy, reference, pairs, beta=0.3, exploration_weight=0.2)
        loss.backward()
        gradients.append((loss.item(), policy.grad.tolist()))
    (loss_alias, grad_alias), (loss_twice, grad_twice) = gradients
    assert loss_alias == loss_twice
    assert grad_alias == pytest.approx([grad_twice[0], grad_twice[1] + grad_twice[2]], rel=1e-14)


def test_without_an_explored_response_the_weight_has_no_effect() -> None:
    data = Groups([-3.0, -7.0, -2.0, -9.0], [-4.0, -5.0, -6.0, -1.0], [(0, 1, -1), (2, 3, -1)])
    results = []
    for c in (0.0, 5.0):
        policy, reference, pairs = tensors(data)
        loss, metrics = preference_loss(policy, reference, pairs, beta=0.3, exploration_weight=c)
        loss.backward()
        assert metrics["logps/explored"].isnan().all()
        assert metrics["rewards/explored"].isnan().all()
        results.append((loss.item(), policy.grad.tolist()))
    assert results[0] == results[1]


def test_the_reference_takes_no_gradient_and_fp32_log_probs_are_taken_as_they_are() -> None:
    data = Groups([-3.25, -7.5], [-4.0, -5.0], [(0, 1, 0)])
    policy, reference, pairs = tensors(data)
    low = policy.detach().float().requires_grad_()
    frozen = reference.float().requires_grad_()
    loss, _ = preference_loss(low, frozen, pairs, beta=0.3, exploration_weight=0.2)
    loss.backward()
    assert loss.dtype == torch.float64
    assert low.grad.dtype == torch.float32
    assert frozen.grad is None
    assert loss.item() == preference_loss(policy, reference, pairs, beta=0.3, exploration_weight=0.2)[0].item()


@pytest.mark.parametrize("delta", [30.0, 699.0, 700.5, 710.0, 1e4, 1e8])
@pytest.mark.parametrize("s", [0.0, 0.2])
def test_huge_margins_neither_overflow_nor_lose_the_gradient(delta: float, s: float) -> None:
    for sign in (1, -1):
        data = Groups([0.0, 0.0], [-sign * delta, 0.0], [(0, 1, -1)])
        policy, reference, pairs = tensors(data)
        loss, metrics = preference_loss(policy, reference, pairs, beta=1.0, label_smoothing=s)
        loss.backward()
        expected = by_hand(data, 1.0, s=s)
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-14, abs=1e-15)
        assert policy.grad.tolist() == pytest.approx(expected["slopes"], rel=1e-14, abs=1e-300)
        assert metrics["rewards/accuracies"].item() == (sign > 0)


def test_tiny_ratios_keep_their_digits() -> None:
    """Rewards of 1e-9, those of a first step at lr 5e-7: they show in loss and gradient."""
    data = Groups([-500.0 + 1e-7, -500.0], [-500.0, -500.0], [(0, 1, -1)])
    policy, reference, pairs = tensors(data)
    loss, metrics = preference_loss(policy, reference, pairs, beta=0.01)
    ratio = data.policy[0] + 500.0
    assert metrics["rewards/chosen"].item() == 0.01 * ratio
    assert LN2 - loss.item() == pytest.approx(0.01 * ratio / 2, rel=1e-6)


def test_equal_pairs_have_accuracy_zero() -> None:
    policy, reference, pairs = tensors(Groups([-1.0, -1.0], [-1.0, -1.0], [(0, 1, -1)]))
    assert preference_loss(policy, reference, pairs, beta=1.0)[1]["rewards/accuracies"].tolist() == [0.0]


def test_no_groups_give_a_loss_of_zero() -> None:
    none = torch.zeros(0, dtype=torch.long)
    policy = torch.zeros(0, requires_grad=True)
    pairs = Pairs(chosen=none, rejected=none, explored=none)
    for num_groups in (None, 4):
        loss, _ = preference_loss(policy, torch.zeros(0), pairs, beta=1.0, num_groups=num_groups)
        assert loss.item() == 0.0
        loss.backward()


ONE = Groups([-1.0, -2.0], [-1.0, -2.0], [(0, 1, -1)])


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        *(("beta must be finite and > 0", {"beta": beta}) for beta in (0.0, -1.0, math.nan, math.inf)),
        *(("label_smoothing must be in", {"label_smoothing": s}) for s in (-0.1, 0.5, 1.0, math.nan)),
        *(("exploration_weight must be finite", {"exploration_weight": c}) for c in (math.nan, math.inf)),
        *(("num_groups must be at least 1", {"num_groups": count}) for count in (0, -1)),
    ],
)
def test_settings_that_do_not_fit_are_refused(message: str, changed: dict[str, Any]) -> None:
    policy, reference, pairs = tensors(ONE)
    with pytest.raises(ValueError, match=message):
        preference_loss(policy, reference, pairs, **{"beta": 0.1, **changed})


def test_shapes_that_do_not_fit_are_refused() -> None:
    policy, reference, pairs = tensors(ONE)
    with pytest.raises(ValueError, match="must both be"):
        preference_loss(policy, reference[:1], pairs, beta=0.1)
    with pytest.raises(ValueError, match="must both be"):
        preference_loss(policy.unsqueeze(0), reference.unsqueeze(0), pairs, beta=0.1)
    with pytest.raises(ValueError, match="must all be"):
        preference_loss(
            policy,
            reference,
            Pairs(chosen=pairs.chosen, rejected=pairs.rejected, explored=pairs.explored[:0]),
            beta=0.1,
        )
