"""The two ops that are timed beside others: their inputs, how a contestant is run, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.exact import Exact, Inputs, Shape, make_inputs, relative_error, scalar_error
from benchmarks.judge import Checked, Contestant, Run, hold
from benchmarks.measure import extra_bytes
from benchmarks.peers import BACKWARD, NO_GRAD, Entrant, Forward, Mode, eager_forward, gather
from selm_fast.ops import Pairs, fused_preference_loss, linear_logprob, preference_loss, sequence_sum

SETTINGS: dict[str, Any] = {"beta": 0.1, "exploration_weight": 1e-3, "label_smoothing": 0.1}
GROUPS = 32  # many, and so short ones: how well the losses of a few come out is a matter of luck


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op with its contestants, of which the first, torch eager, is the yardstick of every error."""

    name: str
    inputs: Inputs
    entrants: list[Entrant]
    missing: dict[str, str]
    upstream: Tensor  # of the output
    exact_output: Tensor
    token_upstream: Tensor  # (N,): derivative of what is differentiated by each log-prob


def linear_logprob_case(inputs: Inputs, logps: Tensor, only: str | None = None) -> Case:
    """Log-probs of all tokens, each with an upstream gradient of its own; logps: (N,) fp64, exact; only: one peer."""
    entrants, missing = gather(only)
    return Case(
        name="linear_logprob",
        inputs=inputs,
        entrants=entrants,
        missing=missing,
        upstream=inputs.upstream,
        exact_output=logps,
        token_upstream=inputs.upstream.double(),
    )


def preference_case(inputs: Inputs, logps: Tensor, only: str | None = None) -> Case:
    """The loss of groups of three responses, by one autograd node and by three ops; logps: (N,) fp64, exact.

    The output is the loss and, behind it, that of each group, which takes no gradient.
    """
    device, logps = inputs.hidden.device, logps.cpu()  # what is exact comes from no kernel that is timed
    offsets, groups = _layout(logps.shape[0])
    noise = torch.randn(offsets.shape[0] - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    reference = sequence_sum(logps, offsets) + 5.0 * noise
    leaf = logps.clone().requires_grad_()
    loss, metrics = preference_loss(sequence_sum(leaf, offsets), reference, groups, **SETTINGS)
    (token_upstream,) = torch.autograd.grad(loss, leaf)
    exact_output = _joined(loss.detach(), metrics).to(device)
    upstream = torch.zeros_like(exact_output)
    upstream[0] = 1.0
    cu_responses, pairs, reference_logps = offsets.to(device), groups.to(device), reference.to(device)

    def by_parts(head: Forward) -> Forward:
        def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            policy_logps = sequence_sum(head(hidden, weight, targets), cu_responses)
            return _joined(*preference_loss(policy_logps, reference_logps, pairs, **SETTINGS))

        return forward

    def fused(mode: Mode) -> Forward:
        def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            arguments = (hidden, weight, targets, cu_responses, pairs, reference_logps)
            return _joined(*fused_preference_loss(*arguments, **SETTINGS, mode=mode))

        return forward

    def entrant(name: str, forward: Forward, matmuls: int, *, ours: bool = True) -> Entrant:
        return Entrant(name=name, forward=forward, matmuls=matmuls, ours=ours, kinds=(BACKWARD,))

    entrants = [entrant("torch eager head", by_parts(eager_forward), 3, ours=False)]
    modes: tuple[tuple[Mode, int], ...] = (("keep", 3), ("recompute", 4))
    for mode, matmuls in modes:
        head = partial(linear_logprob, mode=mode)
        entrants.append(entrant(f"selm_fast {mode}, three ops", by_parts(head), matmuls))
        entrants.append(entrant(f"selm_fast {mode}, fused", fused(mode), matmuls))

    return Case(
        name="fused_preference_loss",
        inputs=inputs,
        entrants=entrants,
        missing={},
        upstream=upstream,
        exact_output=exact_output,
        token_upstream=token_upstream.to(device),
    )


def _joined(loss: Tensor, metrics: dict[str, Tensor]) -> Tensor:
    return torch.cat([loss.unsqueeze(0), metrics["loss"]])


def _layout(num_tokens: int) -> tuple[Tensor, Pairs]:
    """Three responses a group, uneven in length; in two groups of three the explored response is the chosen one."""
    groups = min(GROUPS, num_tokens // 3)
    sequences = 3 * groups
    shares = 0.5 + torch.rand(sequences, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * num_tokens).round().long()
    first = 3 * torch.arange(groups)
    explored = torch.where(torch.arange(groups) % 3 == 0, first + 2, first)
    return torch.cat([ends.new_zeros(1), ends]).int(), Pairs(chosen=first, rejected=first + 1, explored=explored)


def runner(case: Case, entrant: Entrant, kind: str) -> Run:
    """A call that computes the output, and with gradients those of hidden and weight behind it."""
    inputs = case.inputs
    if kind == NO_GRAD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (entrant.forward(inputs.hidden, inputs.weight, inputs.targets),)

        return forward
    hidden, weight = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight))

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = entrant.forward(hidden, weight, inputs.targets)
        upstream = case.upstream.to(out.dtype) if out.dim() else None
        return (out.detach(), *torch.autograd.grad(out, (hidden, weight), upstream))

    return forward_and_backward


def errors(case: Case, entrant: Entrant, exact: Exact, outputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error of the output and of each gradient, against float64."""
    expected, g = case.exact_output, case.token_upstream
    if entrant.per_token:
        if outputs[0].shape != expected.shape:
            raise ValueError(f"its output is {tuple(outputs[0].shape)}; expected {tuple(expected.shape)}")
        found = {"output": relative_error(outputs[0], expected)}
    else:
        g = torch.ones_like(g)
        found = {"output": scalar_error(outputs[0], expected.sum(), g, exact.logps)}
    if len(outputs) > 1:
        gradients = exact.gradients(g)
        for name, got in exact.sampled(outputs[1], outputs[2]).items():
            found[name] = relative_error(got, gradients[name])
    return found


def shown(rows: Tensor, vocab: Tensor, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What is held against float64: the output, and of the gradients these rows."""
    gradients = {name: got[at] for name, got, at in zip(("hidden", "weight"), outputs[1:], (rows, vocab), strict=False)}
    return {"output": outputs[0]} | gradients


CASES: dict[str, Callable[..., Case]] = {
    "linear_logprob": linear_logprob_case,
    "fused_preference_loss": preference_case,
}


def check(case: Case, exact: Exact, dtype: str) -> Iterator[Checked]:
    """Run every contestant once and compare.

    Raises NoYardstick where torch eager cannot run.
    """
    (num_tokens, size), vocab = case.inputs.hidden.shape, case.inputs.weight.shape[0]
    shape = Shape(num_tokens, size, vocab)
    torchs: dict[str, float] = {}
    for entrant in case.entrants:
        for kind in entrant.kinds:
            call = runner(case, entrant, kind)
            matmuls = 1 if kind == NO_GRAD else entrant.matmuls
            flops, moved = necessary(shape, matmuls, kind, case.inputs.hidden.itemsize)
            yield hold(
                Contestant(
                    op=case.name,
                    name=entrant.name,
                    kind=kind,
                    ours=entrant.ours,
                    per_token=entrant.per_token,
                    matmuls=matmuls,
                    flops=flops,
                    moved=moved,
                    call=call,
                    shown=partial(shown, exact.rows, exact.vocab),
                ),
                partial(errors, case, entrant, exact),
                torchs,
                dtype,
                is_yardstick=entrant is case.entrants[0],
            )


def necessary(shape: Shape, matmuls: int, kind: str, itemsize: int) -> tuple[float, float]:
    """FLOP of the contestant's matmuls; bytes of hidden and weight, read once or twice, and of their gradients."""
    operands = (shape.N + shape.V) * shape.D * itemsize
    return matmuls * 2.0 * shape.N * shape.D * shape.V, operands * (1.0 if kind == NO_GRAD else 3.0)


def extra_bytes_alone(shape: Shape, dtype: str, threads: int, case: str, name: str, kind: str) -> int | None:
    """Peak memory (bytes) of one contestant's run above inputs and outputs, for a CPU process that does nothing else.

    A small run comes first: loading libraries and starting threads is not what is asked for.
    """
    torch.set_num_threads(threads)
    for measured in (Shape(64, 64, 256), shape):
        inputs = make_inputs(measured, dtype, "cpu")
        made = CASES[case](inputs, torch.full((measured.N,), -10.0, dtype=torch.float64), name)
        entrant = next(entrant for entrant in made.entrants if entrant.name == name)
        extra = extra_bytes(runner(made, entrant, kind), "cpu")
    return extra
