"""A contestant in a process of its own: the parity gate, then its run, a step whenever the parent says so."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import platform
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import measure
from benchmarks.train import profile
from benchmarks.train.contestant import Contestant, Job, Runner, Stopwatch

GO, PROFILE, STOP = "go", "profile", "stop"


def main(connection: Connection, contestant: Contestant, parity: Job, job: Job, threads: int) -> None:
    """Run one contestant; everything is said over the connection as (kind, values).

    "parity" {loss, grad_norm}; then, at a word of the parent's each: "ready" {seconds, reference_seconds};
    "step" {wall_s, cpu_s, kernel_s, loss, grad_norm}, or with "profile" {breakdown} beside; at last "done"
    {peak_bytes}. "failed" {why} at any point.
    """
    torch.set_num_threads(1)  # as many are at the gate at a time as there are cores
    _be_quiet()
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        runner: Runner = getattr(importlib.import_module(contestant.module), contestant.function)

        def run(job: Job, gate: Any) -> None:
            runner(replace(job, scratch=Path(tempfile.mkdtemp(dir=scratch))), gate, **contestant.options)

        first = Once()
        run(parity, first)
        connection.send(("parity", first.found))
        torch.set_num_threads(threads)
        turns = Turns(connection, job, gives_back=not contestant.keeps_freed)
        if turns.wait() != STOP:
            base = turns.begin()
            with suppress(Stopped):
                run(job, turns)
            connection.send(("done", {"peak_bytes": turns.peak_above(base)}))
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        connection.send(("failed", {"why": why, "traceback": traceback.format_exc()}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        connection.close()


class Stopped(BaseException):
    """Ends a run that has taken all its turns, whatever handlers it has of its own."""


class Once:
    """The gate of a run of one step: it takes the figures down."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Not timed here."""
        yield

    def ready(self) -> None:
        """Nothing to wait for."""

    def step(self, loss: float, grad_norm: float) -> None:
        """The one step."""
        self.found = {"loss": loss, "grad_norm": grad_norm}


class Turns:
    """The gate of a run that is timed, and waits for its turn after every step."""

    def __init__(self, connection: Connection, job: Job, *, gives_back: bool) -> None:
        self.connection, self.device, self.gives_back = connection, job.workload.device, gives_back
        self.weights = sum(file.stat().st_size for file in job.workload.model.glob("*.safetensors"))
        self.reference_s = 0.0
        self.watch = Stopwatch()
        self.profiler: Any = None

    def wait(self) -> str:
        """The parent's next word."""
        word: str = self.connection.recv()
        return word

    def begin(self) -> int | None:
        """Start the clock of the set-up -> bytes that the process holds before it, the model's weights counted in.

        None where they cannot be read.
        """
        gc.collect()
        before: int | None = None
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            _give_freed_memory_back()  # what the parity gate left behind
            before = measure.resident_bytes() if measure.forget_peak() else None
        self.watch = Stopwatch()
        return None if before is None else before + self.weights

    def peak_above(self, base: int | None) -> int | None:
        """Peak memory of the run (bytes) above the loaded model; None where it cannot be read."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else measure.peak_resident_bytes()
        return None if peak is None or base is None else peak - base

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Times it."""
        watch = Stopwatch()
        yield
        self._synchronize()
        self.reference_s += watch.lap()[0]

    def ready(self) -> None:
        """Say how long it took to come here, and wait."""
        self._synchronize()
        wall, _, _ = self.watch.lap()
        self.connection.send(("ready", {"setup_s": wall - self.reference_s, "reference_s": self.reference_s}))
        self._next()

    def step(self, loss: float, grad_norm: float) -> None:
        """Say what the step took, and wait."""
        self._synchronize()
        wall, cpu, kernel = self.watch.lap()
        found: dict[str, Any] = {
            "wall_s": wall, "cpu_s": cpu, "kernel_s": kernel, "loss": loss, "grad_norm": grad_norm
        }  # fmt: skip
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            found["breakdown"] = profile.breakdown(self.profiler, self.device)
            self.profiler = None
        self.connection.send(("step", found))
        self._next()

    def _next(self) -> None:
        if self.gives_back:  # or the idle ones would hold all of a machine's memory
            _give_freed_memory_back()
        word = self.wait()
        if word == STOP:
            raise Stopped
        if word == PROFILE:
            self.profiler = profile.start(self.device)
        self.watch = Stopwatch()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _give_freed_memory_back() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _be_quiet() -> None:
    """For this whole process."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        return
    disable_progress_bar()
