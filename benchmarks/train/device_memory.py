"""Peak memory of a run, beside what the memory model says of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks import measure
from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan
from selm_fast.roofline import GroupLengths, Settings, Shape, Work
from selm_fast.training.machine import choose_device
from selm_fast.training.room import Plan as RoomPlan
from selm_fast.training.room import head_mode, mean_group


def room_plan(config: Config, shape: Shape, groups: Sequence[TokenGroup], device: str) -> RoomPlan:
    """The run as `selm-fast estimate` sees it; FSDP is a world of one."""
    return RoomPlan(config, shape, mean_group(groups), 1, "cuda" if device == "cuda" else "cpu")


class Meter:
    """Peak memory by phase: of torch's allocator; on a CPU of the process, above what it held before the model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, dict[str, int | None]] = {}
        free(device)
        self._before = 0 if device.type == "cuda" else measure.resident_bytes() or 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure while the block runs."""
        free(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            measure.forget_peak()
        yield
        synchronise(self.device)
        if self.device.type == "cuda":
            allocated, reserved = (
                torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device),
            )  # fmt: skip
            self.peaks[name] = {"allocated": allocated, "reserved": reserved}
        else:
            peak = measure.peak_resident_bytes()
            self.peaks[name] = {"allocated": None if peak is None else peak - self._before, "reserved": None}


def beside_estimate(meter: Meter, room: RoomPlan, plan: Plan) -> dict[str, dict[str, Any]]:
    """Each phase's peak beside the memory model's: of tensors, for the largest micro-batch that there was.

    planned: what `selm-fast estimate` says of the phase, for a full micro-batch and with CUDA's context.
    """
    batches = [works_of(plan, members) for step in plan.steps for members in step]
    largest = max(batches, key=lambda work: work.tokens)
    model = replace(room.model, runtime=0.0)
    estimated = model.phases(largest, how(room.config, room.shape, largest))
    found = {}
    for name, peak in meter.peaks.items():
        # What the optimiser needs beside its state stands in no phase of its own that would be larger than a step.
        said, allocated = estimated[name].total, peak["allocated"]
        found[name] = {
            **peak, "estimated": said, "ratio": None if allocated is None else allocated / said,
            "planned": room.phases[name].total, "parts": estimated[name].parts, "tokens": largest.tokens,
        }  # fmt: skip
    return found


def works_of(plan: Plan, members: Sequence[int]) -> Work:
    """The work of a micro-batch."""
    groups = [plan.groups[nth] for nth in members]
    return Work.of([GroupLengths.of(g.prompt, (g.chosen, g.rejected, g.explored)) for g in groups])


def how(config: Config, shape: Shape, work: Work) -> Settings:
    """How a micro-batch is computed."""
    size = choose_device(config)[1].itemsize
    return Settings(
        checkpointing=config.model.activation_checkpointing, compute_bytes=size,
        head=head_mode(config, shape, work.head_rows, size),
    )  # fmt: skip


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Let go of models: FSDP's modules refer to each other in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
