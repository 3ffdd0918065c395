"""What a training step costs as one size changes and the others stay; beside it the slope of the FLOP model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack
from selm_fast.model import Policy
from selm_fast.ops.head import keeps
from selm_fast.roofline import HeadMode, Settings, Shape, Work, flops

BETA, EXPLORATION = 0.1, 0.01
REFERENCE_LOGP = -9.0  # nats a token: about what random weights give
# The exponent of a step's cost by its groups: 1 is linear, what is paid once a step makes it less. Over the sixteenfold
# range this much more is 15% of the cost.
MOST_EXPONENT = 1.05
# Of loss and gradient norm, packed against group by group: sums in another order, and bf16 rows through other tiles.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MODELS: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "cuda": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step: its groups, the tokens of prompts and responses, the share of explored responses that are the chosen
    one, and the vocabulary."""

    groups: int
    prompt: int
    response: int
    aliased: float
    vocab: int

    def rows(self) -> list[TokenGroup]:
        """The groups, of random ids and equal lengths."""
        rng = random.Random(0)
        every = [nth for nth in range(self.groups) if _starts_a_unit(nth, self.aliased)]

        def ids(length: int) -> list[int]:
            return [rng.randrange(self.vocab) for _ in range(length)]

        found = []
        for nth in range(self.groups):
            chosen, rejected = ids(self.response), ids(self.response)
            explored = list(chosen) if nth in every else ids(self.response)
            found.append(TokenGroup(ids(self.prompt), chosen, rejected, explored, nth))
        return found


def _starts_a_unit(nth: int, share: float) -> bool:
    """True for so large a share of the numbers, evenly spread."""
    return math.floor((nth + 1) * share) > math.floor(nth * share)


BASE = {
    "cpu": Point(groups=8, prompt=48, response=72, aliased=0.5, vocab=4096),
    "cuda": Point(groups=16, prompt=224, response=352, aliased=0.5, vocab=65536),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A size that changes. at: x -> point.  kind: "log-log", whose slope is an exponent, or "linear", whose slope is
    the change of the cost, in units of the least, from the first x to the last."""

    what: str
    xs: Sequence[float]
    quick: Sequence[float]
    at: Callable[[Point, float], Point]
    kind: str


def _with_share(base: Point, share: float) -> Point:
    prompt = round(share * (base.prompt + base.response))
    return replace(base, prompt=prompt, response=base.prompt + base.response - prompt)


SWEEPS = {
    "groups": Sweep(
        what="groups of a step, times the base",
        xs=(0.25, 0.5, 1, 2, 4),
        quick=(0.25, 1, 4),
        at=lambda base, x: replace(base, groups=round(base.groups * x)),
        kind="log-log",
    ),
    "length": Sweep(
        what="tokens of prompt and response, times the base",
        xs=(0.5, 1, 2, 4),
        quick=(0.5, 1),
        at=lambda base, x: replace(base, prompt=round(base.prompt * x), response=round(base.response * x)),
        kind="log-log",
    ),
    "prompt": Sweep(
        what="prompt's share of prompt and response",
        xs=(0.1, 0.3, 0.5, 0.7, 0.9),
        quick=(0.1, 0.5, 0.9),
        at=_with_share,
        kind="linear",
    ),
    "aliases": Sweep(
        what="share of explored responses that are the chosen one",
        xs=(0, 0.25, 0.5, 0.75, 1),
        quick=(0, 0.5, 1),
        at=lambda base, x: replace(base, aliased=x),
        kind="linear",
    ),
    "vocabulary": Sweep(
        what="vocabulary, times the base",
        xs=(0.25, 0.5, 1, 2, 4),
        quick=(0.25, 1),
        at=lambda base, x: replace(base, vocab=round(base.vocab * x)),
        kind="linear",
    ),
}


@dataclass(slots=True)
class Step:
    """A point made ready: a policy, its packed batch, and what the FLOP model says of it."""

    point: Point
    policy: Policy
    batch: PackedBatch
    rows: list[TokenGroup]
    flops: float

    def run(self) -> tuple[float, float]:
        """Loss and gradient norm of the packed step, gradients dropped."""
        return self._run([self.batch])

    def one_by_one(self) -> tuple[float, float]:
        """The same from each group on its own."""
        device = self.policy.head.weight.device
        return self._run([pack([row])[0].to(device) for row in self.rows])

    def __call__(self) -> None:
        """What is timed."""
        self._backward([self.batch])
        self.policy.zero_grad()

    def _run(self, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        loss = self._backward(batches)
        gradients = [weight.grad for weight in self.policy.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.policy.zero_grad()
        return loss.item(), norm.item()

    def _backward(self, batches: Sequence[PackedBatch]) -> torch.Tensor:
        losses = []
        for batch in batches:
            reference = REFERENCE_LOGP * batch.cu_responses.diff().double()
            loss, _ = self.policy(
                batch, reference, beta=BETA, exploration_weight=EXPLORATION, num_groups=self.point.groups
            )
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def make_step(point: Point, device: str, sizes: dict[str, Any]) -> Step:
    """A policy of random weights and a packed batch on a device."""
    dtype = DTYPES[device]
    config = LlamaConfig(**sizes, vocab_size=point.vocab, max_position_embeddings=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    policy = Policy(model.to(device, dtype))
    rows = point.rows()
    batch = pack(rows)[0]
    head: HeadMode = "keep" if keeps("auto", batch.targets.shape[0], policy.head.weight) else "recompute"
    work = Work.of_branches(
        batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist(), head_rows=batch.targets.shape[0], groups=point.groups
    )
    needed = flops(Shape.from_config(config.to_dict()), work, Settings(head=head, compute_bytes=dtype.itemsize))
    return Step(point, policy, batch.to(device), rows, needed.total)


def problem(step: Step) -> str | None:
    """How the packed step differs from its groups one by one, or None."""
    tolerance = TOLERANCE[step.policy.head.weight.dtype]
    for name, packed, alone in zip(("loss", "gradient norm"), step.run(), step.one_by_one(), strict=True):
        if not abs(packed - alone) <= tolerance * abs(alone):
            return f"{name} of the packed step is {packed:.8g}, group by group {alone:.8g}"
    return None


def slope(xs: Sequence[float], costs: Sequence[float], kind: str) -> float:
    """Least squares: the exponent of cost by x, or the change of cost over the range of x, in units of the least."""
    if kind == "log-log":
        return float(np.polyfit(np.log(xs), np.log(costs), 1)[0])
    return float(np.polyfit(xs, np.array(costs) / min(costs), 1)[0]) * (max(xs) - min(xs))


def run_sweep(name: str, device: str, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Check every point, then time them in turns -> a row for each, and the slopes; no time where one is wrong."""
    sweep = SWEEPS[name]
    xs = list(sweep.quick if quick else sweep.xs)
    steps = {str(x): make_step(sweep.at(BASE[device], x), device, MODELS[device]) for x in xs}
    problems = [f"{name} {x}: {found}" for x, step in steps.items() if (found := problem(step)) is not None]
    result: dict[str, Any] = {
        "sweep": name, "what": sweep.what, "kind": sweep.kind, "problems": problems, "points": [], "slopes": {},
    }  # fmt: skip
    if problems:
        return result
    samples = measure.interleaved(steps, repeats, device)
    for x, (key, step) in zip(xs, steps.items(), strict=True):
        taken = samples[key]
        point = {field: getattr(step.point, field) for field in Point.__slots__}
        result["points"].append(
            {
                "x": x,
                **point,
                "tokens": step.batch.tokens.shape[0],
                "gflop": step.flops / 1e9,
                "ms": measure.summary(taken.ms),
                "wall_ms": measure.summary(taken.wall_ms),
            }
        )
    medians = {
        "time": [point["ms"]["median"] for point in result["points"]],
        "wall": [point["wall_ms"]["median"] for point in result["points"]],
        "flops": [point["gflop"] for point in result["points"]],
    }
    result["slopes"] = {what: slope(xs, costs, sweep.kind) for what, costs in medians.items()}
    if name == "groups":
        what = "exponent of a step's time by its groups"
        result["targets"] = [measure.target(what, result["slopes"]["time"], MOST_EXPONENT)]
    return result
