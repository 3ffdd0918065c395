"""What is right and what is not: every contestant against float64, beside torch's own errors, and to the bit again."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from benchmarks import cases, exact, judge
from benchmarks.exact import Shape
from benchmarks.judge import unrepeated
from benchmarks.peers import BACKWARD, Entrant, eager_forward

SHAPE = Shape(48, 16, 130)
GRADIENTS = ("hidden", "weight of targets", "weight of others")


@pytest.fixture(autouse=True)
def small(one_thread: None) -> None:
    """Nothing here pays for a second thread."""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda logps: logps * math.nan, "error of output is nan"),
        (lambda logps: logps + 1e-3, "error of output"),
        (lambda logps: logps.detach() - logps + logps.detach(), "error of hidden"),
        (lambda logps: logps[:-1], r"its output is \(47,\); expected \(48,\)"),
        (lambda logps: logps.tolist(), "it cannot run: AttributeError"),
    ],
    ids=["nan", "a shift", "a sign", "a shape", "an exception"],
)
def test_every_way_of_being_wrong_is_seen(change: Any, complaint: str) -> None:
    """And the other way round: torch eager itself, as a peer, has nothing to complain about."""
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    case.entrants[1:] = [
        Entrant(name="right", forward=eager_forward, matmuls=3, ours=True),
        Entrant(name="wrong", forward=lambda h, w, t: change(eager_forward(h, w, t)), matmuls=3),
    ]
    *right, wrong, wrong_backward = cases.check(case, reference, "fp32")
    assert [checked.problems for checked in right] == [[]] * 4
    assert any(re.search(complaint, problem) for problem in wrong.problems + wrong_backward.problems)


@pytest.mark.parametrize("what", GRADIENTS)
def test_each_gradient_is_compared(what: str) -> None:
    """An error of a thousandth, in one of them alone."""

    class Marred(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(hidden, weight, target)
            return eager_forward(hidden, weight, target)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            hidden, weight, target = (saved.detach() for saved in ctx.saved_tensors)
            with torch.enable_grad():
                leaves = hidden.requires_grad_(), weight.requires_grad_()
                d_hidden, d_weight = torch.autograd.grad(eager_forward(*leaves, target), leaves, grad)
            is_target = torch.zeros(weight.shape[0], 1, dtype=torch.bool).index_fill_(0, target, True)
            marred = {"hidden": [], "weight of targets": is_target, "weight of others": ~is_target}[what]
            if what == "hidden":
                return d_hidden * 1.001, d_weight, None
            return d_hidden, torch.where(marred, d_weight * 1.001, d_weight), None

    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    case.entrants[1:] = [Entrant(name="marred", forward=Marred.apply, matmuls=3, kinds=(BACKWARD,))]
    *_, checked = cases.check(case, reference, "fp32")
    (problem,) = checked.problems
    assert problem.startswith(f"error of {what} is 0.001,")


def test_a_sum_over_tokens_is_held_against_upstream_gradients_of_one() -> None:
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)

    def summed(factor: float) -> Any:
        return lambda hidden, weight, target: factor * eager_forward(hidden, weight, target).sum()

    case.entrants[1:] = [
        Entrant(name=f"sum times {factor}", forward=summed(factor), matmuls=3, per_token=False, kinds=(BACKWARD,))
        for factor in (1.0, 1.001)
    ]
    *_, right, wrong = cases.check(case, reference, "fp32")
    assert right.problems == []
    assert len(wrong.problems) == 4


def test_exact_gradients_are_those_of_autograd_in_float64() -> None:
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    hidden, weight = (t.double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logps = eager_forward(hidden, weight, inputs.targets)
    # eager_forward takes its softmax in fp32: here in fp64.
    logps = torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    torch.testing.assert_close(reference.logps, logps, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(logps, (hidden, weight), inputs.upstream.double())
    found = reference.gradients(inputs.upstream)
    for name, value in reference.sampled(*gradients).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)
    assert set(found) == set(GRADIENTS)


def test_exact_sees_the_whole_vocabulary_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    whole = exact.exact(inputs)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 8 * SHAPE.N * 37)  # 37 columns a block, and a ragged end
    blocks = exact.exact(inputs)
    torch.testing.assert_close(blocks.logps, whole.logps, rtol=1e-13, atol=0)
    torch.testing.assert_close(blocks.d_logits_weight, whole.d_logits_weight, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_yardstick_that_errs_itself_judges_nothing(dtype: str) -> None:
    """What is compared with twice a gross error passes: an upstream gradient that is another one, say."""
    inputs = exact.make_inputs(SHAPE, dtype, "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    case = dataclasses.replace(case, upstream=1.2 * case.upstream)
    with pytest.raises(judge.NoYardstick, match=r"errs itself: .*'hidden': 0\.[12]"):
        list(cases.check(case, reference, dtype))


class Drifting:
    """Right at first; from its second run on the last bit of one value is another one."""

    def __init__(self, what: str) -> None:
        self.what, self.runs = what, 0

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.runs == 1:
            return eager_forward(hidden, weight, targets)
        logps = eager_forward(hidden, weight, targets)
        if self.what == "output":
            marred = logps.detach().clone()
            marred[-1] = marred[-1].nextafter(torch.zeros(()))
            return logps + (marred - logps.detach())
        if self.what == "nothing":
            return logps
        leaf = {"hidden": hidden, "weight": weight}[self.what]
        return eager_forward(*(_nudged(t) if t is leaf else t for t in (hidden, weight)), targets)


def _nudged(leaf: torch.Tensor) -> torch.Tensor:
    """The same values, with a gradient whose every value is one bit larger."""
    out = leaf.clone()
    out.register_hook(lambda grad: grad.nextafter(torch.full_like(grad, math.inf)))
    return out


@pytest.mark.parametrize("what", ["nothing", "output", "hidden", "weight"])
def test_ours_must_give_the_same_bits_again(what: str) -> None:
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    case.entrants[1:] = [Entrant(name="ours", forward=Drifting(what), matmuls=3, ours=True, kinds=(BACKWARD,))]
    *_, checked = cases.check(case, reference, "fp32")
    assert checked.problems == []
    found = unrepeated(checked)
    expected = f"{what} has other bits after the timed rounds than when it was checked"
    assert found == ([] if what == "nothing" else [expected])


def test_of_peers_nothing_is_kept_and_a_second_run_that_raises_is_told() -> None:
    inputs = exact.make_inputs(SHAPE, "fp32", "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    case.entrants[1:] = [Entrant(name="ours", forward=eager_forward, matmuls=3, ours=True, kinds=(BACKWARD,))]
    *yardsticks, ours = cases.check(case, reference, "fp32")
    assert [checked.results for checked in yardsticks] == [{}, {}]
    assert {name: t.shape for name, t in ours.results.items()} == {
        "output": (48,),
        "hidden": (48, 16),
        "weight": (130, 16),
    }
    assert unrepeated(ours) == []

    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of luck")

    contestant = dataclasses.replace(ours.contestant, call=broken)
    assert unrepeated(dataclasses.replace(ours, contestant=contestant)) == ["it cannot run: RuntimeError: out of luck"]
