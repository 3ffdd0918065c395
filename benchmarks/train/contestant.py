"""What a contestant is, and the gate that it comes to after every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.train.workload import Row, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: every row once, in order, `workload.settings.groups` a step.

    reference: weights of the reference; None: the model before its first step.  scratch: a folder for its files.
    """

    workload: Workload
    rows: Sequence[Row]
    reference: Path | None
    scratch: Path


class Gate(Protocol):
    """Where a contestant reports, and waits for its next turn."""

    def reference_pass(self) -> AbstractContextManager[None]:
        """What runs inside is a pass over all rows for reference log-probs: timed, and counted in."""

    def ready(self) -> None:
        """All is set up; the first step comes next."""

    def step(self, loss: float, grad_norm: float) -> None:
        """An optimiser step is done: its loss, and its gradient norm before clipping."""


Runner = Callable[[Job, Gate], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A way to train.

    module, function, options: the `Runner`, by name, so that a process loads its own peer only; options are its
    keyword arguments.  method: whose loss.  ours: whether this package computes it, in whole or in part.
    """

    name: str
    what: str
    module: str
    function: str
    method: str  # "selm" | "dpo"
    ours: bool
    options: dict[str, Any] = field(default_factory=dict)
    sorted_by_length: bool = False
    warm_up: int = 1  # first steps that are not counted
    keeps_freed: bool = False  # does it keep freed memory from step to step? Others' is given back while they wait

    @property
    def exploring(self) -> bool:
        """Does it read the explored response?"""
        return self.method == "selm"


def batches(rows: Sequence[Row], groups: int, rounds: int) -> list[Row]:
    """The rows of `rounds` steps, in each one row of every class of lengths: so few steps, and each, stand for all.

    The classes are `groups` equal parts of the rows by their useful tokens; the order within a class is that of the
    rows, and so the first steps are the same however many there are.
    """
    by_length = sorted(range(len(rows)), key=lambda nth: rows[nth].useful_tokens(True))
    size = len(rows) // groups
    classes = [sorted(by_length[nth * size : (nth + 1) * size]) for nth in range(groups)]
    return [rows[members[step]] for step in range(rounds) for members in classes]


def batches_by_length(rows: Sequence[Row], groups: int, rounds: int, exploring: bool) -> list[Row]:
    """The rows of `rounds` steps where rows are sorted by length first: batches from evenly spaced places.

    What a whole epoch sorted by length would cost a group, from a few of its steps.
    """
    longest_first = sorted(rows, key=lambda row: len(row.prompt) + max(map(len, row.distinct(exploring))), reverse=True)
    found: list[Row] = []
    for nth in range(rounds):
        start = round((len(rows) - groups) * (nth + 0.5) / rounds)
        found += longest_first[start : start + groups]
    return found


class Stopwatch:
    """Seconds on the wall, of CPU time of this process, and of that in the kernel, since the last lap."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> tuple[float, float, float]:
        """(wall, CPU, kernel) since the last lap."""
        now = self._now()
        wall, cpu, kernel = (later - earlier for later, earlier in zip(now, self._last, strict=True))
        self._last = now
        return wall, cpu, kernel

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
