"""Doing the runs: over processes, each result on the disk as soon as it is there, what is there not done again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from benchmarks.exploration.environment import Settings, make_environment
from benchmarks.exploration.experiment import run
from benchmarks.exploration.grid import Grid, Job, base_settings
from benchmarks.exploration.tiny_llama import make_base
from selm_fast.errors import RunFailed
from selm_fast.training.progress import Display

DIGITS = 5  # significant ones, of a figure in a result
T = TypeVar("T")


class Work:
    """A folder of finished runs (runs.jsonl) and base models, of one grid and one state of the sources.

    What another grid or other sources have left there is put aside, never mixed in.
    """

    def __init__(self, folder: Path, grid: Grid, sources: str, *, workers: int, display: Display) -> None:
        """sources: digest of everything that decides what a run comes to.  workers: processes of one thread each."""
        self.grid, self.workers, self.display = grid, workers, display
        made_by = hashlib.sha256(json.dumps([sources, grid.to_json()], default=list).encode()).hexdigest()[:16]
        self.folder = folder / made_by
        self.bases = self.folder / "bases"
        self.bases.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "runs.jsonl"
        self.done = self._read()

    def _read(self) -> dict[Job, dict[str, Any]]:
        """By job, what its run came to. A line that was cut by a kill is dropped, and done again."""
        found: dict[Job, dict[str, Any]] = {}
        whole = b""
        there = self.path.read_bytes() if self.path.exists() else b""
        for line in there.splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            found[Job(**record["job"])] = record["outcome"]
            whole += line
        if whole != there:
            self.path.write_bytes(whole)
        return found

    def do(self, name: str, jobs: Sequence[Job]) -> dict[Job, dict[str, Any]]:
        """The outcomes of these jobs, those that are not there yet being run."""
        left = [job for job in jobs if job not in self.done]
        bases = [pair for pair in self.grid.bases(left) if not base_path(self.bases, *pair).exists()]
        steps = self.grid.base_steps
        for _ in self._spread(f"base models for {name}", _make_base, [(self.bases, *pair, steps) for pair in bases]):
            pass
        arguments = [(self.bases, job, self.grid.worlds[job.world]) for job in left]
        already = len(jobs) - len(left)
        with self.path.open("ab") as file:
            for job, outcome in self._spread(name, _run_job, arguments, already=already):
                file.write(json.dumps({"job": asdict(job), "outcome": outcome}, separators=(",", ":")).encode() + b"\n")
                file.flush()
                self.done[job] = outcome
        return {job: self.done[job] for job in jobs}

    def _spread(
        self, name: str, function: Callable[[Any], T], arguments: list[Any], *, already: int = 0
    ) -> Iterator[T]:
        if not arguments:
            return
        with (
            self.display.phase(name, already + len(arguments), "runs", done=already) as phase,
            self._processes(len(arguments)) as spread,
        ):
            for result in spread(function, arguments):
                yield result
                phase.advance()

    @contextmanager
    def _processes(self, wanted: int) -> Iterator[Callable[..., Iterator[Any]]]:
        """What maps a function over arguments, in any order: over processes, or here where one is enough."""
        if self.workers == 1:
            yield map
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once for all processes
        with context.Pool(min(self.workers, wanted), _begin) as pool:
            yield pool.imap_unordered


def _begin() -> None:
    """One thread a process: the matmuls are smaller than what it takes to share one out. Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def base_path(folder: Path, settings: Settings, seed: int) -> Path:
    """Where the base model of a world's settings and a seed is kept."""
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]
    return folder / f"{digest}-{seed}.safetensors"


def _make_base(arguments: tuple[Path, Settings, int, int]) -> None:
    folder, settings, seed, steps = arguments
    path = base_path(folder, settings, seed)
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(make_base(make_environment(settings, seed), seed, steps=steps).state_dict(), temporary)
    temporary.rename(path)


def _run_job(arguments: tuple[Path, Job, Any]) -> tuple[Job, dict[str, Any]]:
    folder, job, world = arguments
    weights = load_file(base_path(folder, base_settings(world.settings), job.seed))
    try:
        outcome = run(
            job.method, make_environment(world.settings, job.seed), weights,
            alpha=job.alpha, lr=job.lr, seed=job.seed, training=world.training,
        )  # fmt: skip
    except Exception as error:
        raise RunFailed(f"{job}: {error}") from error
    return job, rounded({name: getattr(outcome, name) for name in outcome.__slots__ if name != "weights"})


def rounded(value: Any) -> Any:
    """Every float of a nested value to DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
