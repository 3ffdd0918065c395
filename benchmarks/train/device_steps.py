"""What the steps of a large model come to on one device: right or wrong, how fast, and how much memory."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.train import device_model
from benchmarks.train.device_memory import Meter, beside_estimate, free, how, room_plan, synchronise, works_of
from benchmarks.train.device_model import Case
from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan
from selm_fast.model.sharding import local
from selm_fast.roofline import Settings, Shape, flops
from selm_fast.training.host_memory import reused_memory
from selm_fast.training.loop import Trainer
from selm_fast.training.machine import choose_device, matmul_flops, memory_bytes
from selm_fast.training.pending import StepLine
from selm_fast.training.world import World, join

LEAST_TOKENS = 4096  # of a micro-batch: what fits only below this is not run
LEARNS = 0.1  # learning rate of the repeated groups, times the root of the number of weights: the loss must move
ZEROS = ("loss/exploration", "rewards/chosen", "rewards/rejected", "rewards/explored", "rewards/margins")
PATIENCE_S = 300.0
WAITED = "called a synchronizing CUDA operation"  # c10/cuda/CUDAFunctions.cpp


@dataclass(frozen=True, slots=True)
class Job:
    """A case on a device, with its files' folder. data: real rows, as `device_model.groups_of` has it."""

    case: Case
    device: str
    data: Path | None
    scratch: Path


def run(case: Case, device: str, data: Path | None = None) -> dict[str, Any]:
    """Train a case -> a part of the result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as folder:
        job = Job(case, device, data, Path(folder))
        groups = device_model.groups_of(case, data, job.scratch)
        model = device_model.write_config(case.shape, job.scratch / "model")
        config, told = fitted(case, device, groups)
        found: dict[str, Any] = {
            "name": case.name, "shape": {"name": case.shape, **device_model.MODELS[case.shape]}, "told": told,
            "settings": settings_of(case, config), "rows": described(groups, data), "checks": [], "speed": None,
        }  # fmt: skip
        if config is not None:
            with reused_memory(torch.device(device)), join(torch.device(device), PATIENCE_S) as world:
                found |= trained(job, config, model, groups, world)
    return found | {"seconds": time.monotonic() - began}


def fitted(case: Case, device: str, groups: Sequence[TokenGroup]) -> tuple[Config | None, list[str]]:
    """The settings with which the case fits the device by the memory model, None where none do; what was changed."""
    config, told = case.config(device), list[str]()
    there = memory_bytes(torch.device(device))
    shape = Shape.from_config(device_model.MODELS[case.shape])
    while not (plan := room_plan(config, shape, groups, device)).fits(there):
        said = f"estimated to take {plan.total / 2**30:.1f} GiB of {there / 2**30:.1f}"
        tokens = config.batch.max_tokens // 2
        if tokens < LEAST_TOKENS:
            return None, [*told, f"not run: micro-batches of {2 * tokens} tokens are {said}"]
        told.append(f"micro-batches of {tokens} tokens: of {2 * tokens} they are {said}")
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"max_tokens": tokens})})
    return config, told


def trained(
    job: Job, config: Config, model: Path, groups: Sequence[TokenGroup], world: World
) -> dict[str, Any]:  # fmt: skip
    """Every measurement of a case."""
    case = job.case
    dtype = choose_device(config)[1]
    matmul = matmul_flops(world.device, dtype)
    meter, plan = Meter(world.device), device_model.plan_of(groups, config)
    policy, masters = device_model.load(config, model, world)
    with meter.phase("reference pass"):
        began = time.perf_counter()
        reference = device_model.reference_of(policy, masters, plan, world, job.scratch / "cache")
        reference_s = time.perf_counter() - began
    trainer = device_model.trainer_of(config, world, policy, masters, [plan], reference)
    shape = trainer.utilisation.shape
    assert shape is not None
    with meter.phase("step"):
        seconds = [timed_step(trainer) for _ in range(1 + case.steps)]
    lines = looked_at(trainer)
    waits = waiting(trainer)
    repeated = losses_of_repeated(trainer, case)
    memory = beside_estimate(meter, room_plan(config, shape, groups, job.device), plan)
    del policy, masters, trainer, reference
    free(world.device)
    checks = [exact(lines[0]), finite(lines), falling(repeated)]
    if case.twice:
        checks.append(same_bits(job, config, model, groups[: 2 * case.groups], world))
    speed = None
    if all(check["passed"] for check in checks):
        speed = speeds(plan, shape, config, seconds, reference_s) | {"matmul_flop_per_s": matmul}
    return {
        "dtype": str(dtype).removeprefix("torch."), "weights": shape.weights, "checks": checks, "speed": speed,
        "memory": memory, "waits": waits, "losses": [line.metrics["loss"] for line in lines], "repeated": repeated,
        "grad_norms": [line.metrics["grad_norm"] for line in lines],
    }  # fmt: skip


def timed_step(trainer: Trainer) -> float:
    """Seconds of the next step, until the device has done it."""
    synchronise(trainer.world.device)
    began = time.perf_counter()
    with trainer.world.watched("step"):
        trainer._train_step()
    synchronise(trainer.world.device)
    trainer.position.step += 1
    return time.perf_counter() - began


def looked_at(trainer: Trainer) -> list[StepLine]:
    """The metrics of the steps since the last look."""
    return trainer._pending.take(trainer.world, 0.0)[0]


def waiting(trainer: Trainer) -> list[str] | None:
    """Where the next step waits for the device, innermost lines of Python first; None: no device to wait for."""
    if trainer.world.device.type != "cuda":
        return None
    synchronise(trainer.world.device)
    with synchronising() as found:
        trainer._train_step()
    trainer.position.step += 1
    looked_at(trainer)
    return found


@contextmanager
def synchronising() -> Iterator[list[str]]:
    """Collect what waits for the device while the block runs: all of it, where mode "error" would show the first."""
    found: list[str] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if WAITED in str(message):  # switching the mode on warns, too
            stack = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
            found.append(" < ".join(f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in stack[:-7:-1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def losses_of_repeated(trainer: Trainer, case: Case) -> list[float]:
    """Losses of steps on one micro-batch's groups, again and again, with a learning rate that random weights feel."""
    shape, plan = trainer.utilisation.shape, trainer.plans[0]
    assert shape is not None
    few = Plan(plan.groups, (plan.steps[0][:1],), plan.ranks)
    optim = trainer.config.optim.model_copy(update={"lr": LEARNS / math.sqrt(shape.weights)})
    config = trainer.config.model_copy(update={"optim": optim})
    again = device_model.trainer_of(
        config, trainer.world, trainer.policy, trainer.masters, [few] * case.repeated, trainer.reference,
        trainer.optimizer,
    )  # fmt: skip
    for _ in range(case.repeated):
        timed_step(again)
    return [line.metrics["loss"] for line in looked_at(again)]


def same_bits(
    job: Job, config: Config, model: Path, groups: Sequence[TokenGroup], world: World
) -> dict[str, Any]:  # fmt: skip
    """Do two runs of two steps come to the same metrics, weights and moments?"""
    plan, results = device_model.plan_of(groups, config), []
    for nth in range(2):
        policy, masters = device_model.load(config, model, world)
        reference = device_model.reference_of(policy, masters, plan, world, job.scratch / f"again-{nth}")
        trainer = device_model.trainer_of(config, world, policy, masters, [plan], reference)
        for _ in plan.steps:
            timed_step(trainer)
        metrics = [line.metrics for line in looked_at(trainer)]
        state = {**masters.masters, **trainer.optimizer.tensors()}
        results.append((metrics, {name: local(tensor.detach()).clone() for name, tensor in state.items()}))
        del policy, masters, trainer, reference, state
        free(world.device)
    (metrics, one), (metrics_again, other) = results
    differing = [name for name, tensor in one.items() if not bits_equal(tensor, other[name])]
    if repr(metrics) != repr(metrics_again):  # by their digits: NaN is itself
        differing.append("metrics")
    return check("two runs of 2 steps have the same bits", len(differing), 0, not differing, differing[:5])


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compared as integers: a NaN equals itself, and the two zeros differ."""
    kind = torch.int16 if one.element_size() == 2 else torch.int32
    return torch.equal(one.view(kind), other.view(kind))


def exact(line: StepLine) -> dict[str, Any]:
    """Is the first loss ln 2, to the bit, and every reward 0?"""
    off = [name for name in ZEROS if line.metrics[name] != 0.0]
    loss = line.metrics["loss"]
    return check("step-0 loss is ln 2 and rewards are 0", loss, math.log(2), loss == math.log(2) and not off, off)


def finite(lines: Sequence[StepLine]) -> dict[str, Any]:
    """Was every step applied?"""
    bad = [str(line.record.step) for line in lines if line.is_bad]
    return check("steps that were not finite", len(bad), 0, not bad, bad)


def falling(losses: Sequence[float]) -> dict[str, Any]:
    """Does the loss fall on repeated groups?"""
    return check("loss on repeated groups falls", losses[-1], losses[0], losses[-1] < losses[0])


def check(what: str, measured: float, expected: float, passed: bool, detail: Sequence[str] = ()) -> dict[str, Any]:
    """A value that must be right."""
    return {"check": what, "measured": measured, "expected": expected, "passed": passed, "detail": list(detail)}


def speeds(
    plan: Plan, shape: Shape, config: Config, seconds: Sequence[float], reference_s: float
) -> dict[str, Any]:  # fmt: skip
    """Rates of the steps after the first, each by its own work, and FLOP/s: useful, and all that is computed."""
    groups, tokens, useful, computed = [], [], [], []
    for step in range(1, len(seconds)):
        batches = [works_of(plan, members) for members in plan.steps[step]]
        groups.append(plan.num_groups(step))
        tokens.append(plan.num_tokens(step))
        useful.append(sum(flops(shape, work, Settings(reference=True)).reference * 3 for work in batches))
        computed.append(sum(flops(shape, work, how(config, shape, work)).total for work in batches))
    counted = seconds[1:]

    def rate(amounts: Sequence[float]) -> dict[str, float]:
        return measure.summary([amount / s for amount, s in zip(amounts, counted, strict=True)])

    of_a_group = reference_s / len(plan.groups)
    per_s = rate(groups)
    return {
        "first_step_s": seconds[0],
        "step_s": measure.summary(list(counted)),
        "micro_batches": statistics.fmean(len(members) for members in plan.steps),
        "groups_per_s": per_s,
        "groups_per_s_with_reference": 1 / (1 / per_s["median"] + of_a_group),
        "tokens_per_s": rate(tokens),
        "useful_flop_per_s": rate(useful),
        "computed_flop_per_s": rate(computed),
        "reference_s": reference_s,
        "reference_groups_per_s": 1 / of_a_group,
    }


def settings_of(case: Case, config: Config | None) -> dict[str, Any]:
    """What was set."""
    return {
        "groups": case.groups, "steps": case.steps, "checkpointing": case.checkpointing, "moments": case.moments,
        "max_tokens": config.batch.max_tokens if config else None, "max_length": case.max_length,
    }  # fmt: skip


def described(groups: Sequence[TokenGroup], data: Path | None) -> dict[str, Any]:
    """Where the rows come from, and how long they are."""
    tokens = [group.num_tokens() for group in groups]
    source = "generated" if data is None else f"{data.name}/selm_train.jsonl"
    return {"source": source, "count": len(groups), "mean_tokens": statistics.fmean(tokens), "most": max(tokens)}
