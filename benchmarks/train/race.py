"""The race: a process a contestant, a parity gate before it, and a step for each in turn, round after round."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.train import field as entrants
from benchmarks.train import preload, worker
from benchmarks.train.contestant import Contestant, Job, batches, batches_by_length
from benchmarks.train.workload import PARITY_ALPHA, Workload, parity_rows

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of losses and gradient norms, relative
PATIENCE_S = 900.0  # for one answer


@dataclass
class Runner:
    """A contestant's process and what it has said.

    steps: {wall_s, cpu_s, kernel_s, loss, grad_norm} of every step, warm-up among them.
    """

    contestant: Contestant
    job: Job
    process: BaseProcess
    connection: Connection
    parity: dict[str, float] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    breakdown: dict[str, float] | None = None
    peak_bytes: int | None = None
    failed: str | None = None

    @property
    def counted(self) -> list[dict[str, Any]]:
        """The steps after the warm-up."""
        return self.steps[self.contestant.warm_up :]

    def counted_rows(self, groups: int) -> list[Any]:
        """Their rows."""
        return list(self.job.rows[self.contestant.warm_up * groups : len(self.steps) * groups])

    def next_rows(self, groups: int) -> list[Any]:
        """Those of the step after the counted ones, which is profiled."""
        return list(self.job.rows[len(self.steps) * groups : (len(self.steps) + 1) * groups])

    def say(self, word: str) -> None:
        """Give it its turn."""
        self.connection.send(word)

    def hear(self) -> dict[str, Any] | None:
        """Its answer; None where it failed, and `failed` says how."""
        kind, values = "failed", {"why": f"it said nothing for {PATIENCE_S:.0f} s"}
        try:
            if self.connection.poll(PATIENCE_S):
                kind, values = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            values = {"why": f"its process ended with {self.process.exitcode} (out of memory?)"}
        if kind == "failed":
            self.failed = values["why"]
            print(values.get("traceback", ""), file=sys.stderr)
            self.end()
            return None
        return values

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def steps_of(name: str, rounds: int) -> int:
    """Steps of a contestant after its warm-up."""
    profiled, sprints = name in entrants.PROFILED, name in entrants.SPRINTERS
    return rounds + (rounds * entrants.SPRINT if sprints else 0) + (1 if profiled else 0)


def start(contestant: Contestant, workload: Workload, rounds: int, threads: int) -> Runner:
    """Start a contestant's process; it goes on to the parity gate by itself."""
    rows, groups, steps = workload.rows(), workload.settings.groups, steps_of(contestant.name, rounds)
    if contestant.sorted_by_length:
        chosen = batches_by_length(rows, groups, steps, contestant.exploring)
    else:
        chosen = batches(rows, groups, steps)
    # The first steps are not counted: they shall be quick.
    chosen = [*parity_rows(rows, contestant.warm_up * groups), *chosen]
    job = Job(workload=workload, rows=chosen, reference=None, scratch=Path())
    exploring = replace(workload, settings=replace(workload.settings, alpha=PARITY_ALPHA))
    gate = Job(workload=exploring, rows=parity_rows(rows, groups), reference=workload.reference, scratch=Path())
    context = get_context("forkserver")
    context.set_forkserver_preload([preload.__name__])
    os.environ[preload.VARIABLE] = os.pathsep.join(sys.path)
    here, there = context.Pipe()
    process = context.Process(target=worker.main, args=(there, contestant, gate, job, threads), daemon=True)
    process.start()
    there.close()
    return Runner(contestant, job, process, here)


def enter(
    entries: Sequence[Contestant], workload: Workload, rounds: int, threads: int, say: Callable[[str], Any] = print
) -> list[Runner]:
    """Start all, as many at a time as there are cores, and hear their losses at the parity gate."""
    at_once = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    runners: list[Runner] = []
    waiting: list[Runner] = []
    for entry in entries:
        waiting.append(start(entry, workload, rounds, threads))
        runners.append(waiting[-1])
        if len(waiting) == at_once:
            _hear_parity(waiting.pop(0), say)
    for runner in waiting:
        _hear_parity(runner, say)
    return runners


def _hear_parity(runner: Runner, say: Callable[[str], Any]) -> None:
    runner.parity = runner.hear() or {}
    loss = runner.parity.get("loss")
    say(f"  at the gate: {runner.contestant.name}: {runner.failed or f'loss {loss:.6f}'}")


def disagreements(runners: Iterable[Runner], yardstick: dict[str, str], dtype: str) -> list[str]:
    """Who differs from the yardstick of its method in loss or gradient norm, or failed, in words."""
    found = []
    runners = list(runners)
    known = {runner.contestant.name: runner.parity for runner in runners}
    for runner in runners:
        entry = runner.contestant
        if runner.failed is not None:
            found.append(f"{entry.name}: {runner.failed}")
            continue
        exact = known.get(yardstick[entry.method])
        if not exact:
            found.append(f"{entry.name}: {yardstick[entry.method]}, its yardstick, is not there")
            continue
        for what in ("loss", "grad_norm"):
            apart = abs(runner.parity[what] - exact[what]) / abs(exact[what])
            if not apart <= TOLERANCE[dtype]:
                found.append(
                    f"{entry.name}: {what} is {runner.parity[what]:.7g}, that of {yardstick[entry.method]} "
                    f"{exact[what]:.7g}: {apart:.1e} apart, at most {TOLERANCE[dtype]:g} allowed"
                )
    return found


def run(
    runners: Sequence[Runner],
    rounds: int,
    say: Callable[[str], Any] = print,
    between: Callable[[], Any] = lambda: None,
    seconds: float = math.inf,
) -> int:
    """Set every contestant up, one after another; then the warm-up, and a step each in turn, round after round.

    After that the sprinters have more rounds, among themselves, and some a step more, under a profiler.
    between: called after every round.  seconds: a round that would end later, were it as long as the longest so far, is
    left out, but for the first that counts.  -> counted rounds.
    """
    for runner in runners:
        if runner.failed is None:
            runner.say(worker.GO)
            runner.setup = runner.hear() or {}
        say(f"  set up: {runner.contestant.name}{f': {runner.failed}' if runner.failed else ''}")
    started, longest, counted = time.monotonic(), 0.0, 0
    for turn in range(rounds + 1):
        began = time.monotonic()
        if turn > 1 and began - started + longest > seconds:
            say(f"  no round {turn}: {began - started:.0f} s are over, and it would take more than {longest:.0f}")
            break
        warm_up = [runner for runner in runners for _ in range(runner.contestant.warm_up)]
        _take_turns(runners if turn > 0 else warm_up, turn)
        counted, longest = turn, max(longest, time.monotonic() - began)
        say(f"  round {turn} of {rounds}: {time.monotonic() - began:.0f} s")
        between()
    sprinters = [runner for runner in runners if runner.contestant.name in entrants.SPRINTERS]
    for turn in range(rounds * entrants.SPRINT):
        _take_turns(sprinters, turn)
    for runner in runners:
        if runner.failed is None and runner.contestant.name in entrants.PROFILED:
            runner.say(worker.PROFILE)
            runner.breakdown = (runner.hear() or {}).get("breakdown")
        if runner.failed is None:
            runner.say(worker.STOP)
            runner.peak_bytes = (runner.hear() or {}).get("peak_bytes")
        runner.end()
    return counted


def _take_turns(runners: Sequence[Runner], turn: int) -> None:
    first = turn % max(1, len(runners))
    for runner in [*runners[first:], *runners[:first]]:
        if runner.failed is None:
            runner.say(worker.GO)
            runner.steps += filter(None, [runner.hear()])
