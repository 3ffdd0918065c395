"""The memory model beside what training takes: real steps of two models, alone and sharded, by the trainer's own code.

Measured is what a process holds at its peak above what it held before the model was built (Python, libraries, and all
that a smaller run before it has left), and apart from that the peak of torch's allocator, which counts tensors alone.
Every configuration is within 15% of `selm_fast.memory`, both ways.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.train import device_model
from benchmarks.train.device_memory import Meter, beside_estimate
from benchmarks.train.device_steps import timed_step
from selm_fast.data.packing import Plan as PackPlan
from selm_fast.model.sharding import local
from selm_fast.ops import extension
from selm_fast.roofline import Shape
from selm_fast.training.loop import Trainer
from selm_fast.training.room import Plan, mean_group
from selm_fast.training.weights import load
from selm_fast.training.world import World, join
from tests.test_memory import peak_of_step
from tests.training.ranks import in_ranks

SHAPES = {
    "10M": {
        "vocab_size": 8192, "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 5,
        "num_attention_heads": 5, "num_key_value_heads": 5,
    },
    "40M": {
        "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "warm-up": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
WORLDS = {"alone": None, "one rank": 1, "two ranks": 2}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, glibc's malloc.h
CASE = device_model.Case(
    name="measured", shape="tiny", checkpointing="none", moments="float32", groups=6, steps=1, max_length=160
)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """What is freed leaves the process: its peak is of what lives, not of what malloc keeps."""
    library = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        library.mallopt(parameter, 65536)
    library.malloc_trim(0)
    yield


def trained(
    size: str, checkpointing: str, ranks: int | None, scratch: Path, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Peaks of a step beside the model's, by how they are measured; in each process of a world."""
    if ranks is None:
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]  # nobody has launched it
    with freed_at_once(), join(torch.device("cpu"), 120.0) as world:
        steps("warm-up", checkpointing, world, ranks, scratch, dtype)
        return steps(size, checkpointing, world, ranks, scratch, dtype)


def steps(
    size: str, checkpointing: str, world: World, ranks: int | None, scratch: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Train a model for three steps: a first, one that is measured from outside, one that is measured from inside."""
    shape = SHAPES[size]
    case = replace(CASE, checkpointing=checkpointing, max_tokens=512, groups=CASE.groups * world.size)
    path = scratch / size / "config.json"
    if world.first:
        LlamaConfig(**shape).save_pretrained(path.parent)
    world.meet("start")
    config = case.config("cpu")
    model = config.model.model_copy(update={"init": path})
    config = config.model_copy(update={"model": model, "dtype": str(dtype).removeprefix("torch.")})
    groups = groups_of(case, shape["vocab_size"])
    plan = device_model.plan_of(groups, config, world.size)
    plan = PackPlan(groups, plan.steps * 3, world.size)  # every step has the same micro-batches
    meter = Meter(world.device)
    loaded = load(config, None, world, dtype)
    masters: Any = loaded.masters
    reference = device_model.reference_of(loaded.policy, masters, plan, world, scratch / f"{size} cache")
    trainer = device_model.trainer_of(config, world, loaded.policy, masters, [plan], reference)
    timed_step(trainer)
    with meter.phase("step"):
        timed_step(trainer)
    room = Plan(config, Shape.from_config(shape), mean_group(groups), ranks, "cpu")
    mine = PackPlan(groups, (plan.steps[0][world.rank :: world.size],))
    found = beside_estimate(meter, room, mine)["step"]
    tensors = peak_of_step(lambda: timed_step(trainer), standing(trainer))
    assert trainer.position.step == 3
    return {"process": found["ratio"], "tensors": tensors / found["estimated"], "MiB": found["estimated"] / 2**20}


def standing(trainer: Trainer) -> list[torch.Tensor]:
    """What is there between two steps; the same memory may come twice."""
    found = (*trainer.policy.parameters(), *trainer.masters.masters.values(), *trainer.optimizer.tensors().values())
    return [local(tensor.detach()) for tensor in found]


def groups_of(case: device_model.Case, vocab: int) -> list[Any]:
    """Of one step."""
    rows = device_model.generate(case.groups, vocab, (32, 48, 48, 48), case.settings)
    return [device_model.TokenGroup(row.prompt, row.chosen, row.rejected, row.explored) for row in rows]


def assert_near(found: list[dict[str, float]]) -> None:
    for one in found:
        assert 0.85 < one["process"] < 1.15, found
        assert 0.85 < one["tensors"] < 1.15, found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", ["10M", "40M"])
def test_training_takes_what_the_model_says(
    size: str, world: str, checkpointing: str, tmp_path: Path, one_thread: None
) -> None:
    ranks = WORLDS[world]
    assert_near(in_ranks(ranks or 1, lambda _: trained(size, checkpointing, ranks, tmp_path), tmp_path / "answers"))


@pytest.mark.slow
@pytest.mark.parametrize("world", ["alone", "one rank"])
def test_so_it_does_in_bf16(world: str, tmp_path: Path, one_thread: None) -> None:
    """Not in two processes: gloo reduces a copy of what it is given, in a thread of its own, and where a gathered
    weight takes half as much that copy is a fifth of such a small step. NCCL makes none."""
    if not extension.mm_serves(torch.bfloat16):
        pytest.skip("without the extension the head's matmuls have copies of their own")
    ranks = WORLDS[world]
    answers = tmp_path / "answers"
    assert_near(in_ranks(1, lambda _: trained("10M", "none", ranks, tmp_path, torch.bfloat16), answers))
