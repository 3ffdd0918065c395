"""Metrics of a run: a JSON line a step, always; TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selm_fast.errors import Refused
from selm_fast.training.storage import disk_errors

_STATUS = Path("/proc/self/status")  # Linux has it

# Metrics that differ between two runs of the same command.
TIMINGS = ("tokens_per_second", "groups_per_second", "mfu", "memory_gib", "seconds")


def mean(parts: Iterable[Tensor]) -> Tensor:
    """Mean over the groups of a step, NaN left out: () fp64, from (G_i,) fp64 of its micro-batches; NaN where all are.

    Taken around the first value, so that equal values have exactly that mean.
    """
    values = torch.cat(list(parts))
    there = ~values.isnan()
    first = values[there.to(torch.uint8).argmax()]
    return first + torch.where(there, values - first, 0.0).sum() / there.sum()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss begins, in a command that a larger process starts, with what that process held; VmHWM with nothing.
    rows = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    own = [int(row.split()[1]) for row in rows if row.startswith("VmHWM")]  # some sandboxes have no such row
    return (own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def summary_writer() -> Any:
    """TensorBoard's writer class. Raises Refused where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Refused(
            "log.tensorboard is set and tensorboard is not installed: pip install 'selm_fast[tensorboard]'"
        ) from error
    return SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl` and, if asked, TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool, step: int = 0, length: int = 0) -> None:
        """step: where the run goes on.  length: bytes of the file up to there; what is after it is run again."""
        self._writer: Any = None
        if tensorboard:
            self._writer = summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("ab")
        self._file.truncate(min(length, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Add a line: `step` and its metrics. What is not finite becomes null, which JSON has.

        Raises RunFailed on a full disk.
        """
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        with disk_errors(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()  # others read along
        if self._writer is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, line["step"])

    def sync(self) -> int:
        """Make every line durable; -> the length of the file in bytes. Raises RunFailed on a full disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close. Raises RunFailed on a full disk."""
        with disk_errors(self._path):
            self._file.close()
        if self._writer is not None:
            self._writer.close()
