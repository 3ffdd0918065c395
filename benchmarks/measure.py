"""Times, memory and peak rates: contestants take turns, so that a slow moment of the machine falls on all of them."""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_T = TypeVar("_T")

# Side of the square matmuls and size of the copy that the peak rates are taken from: long enough to fill the device.
PEAK_SIDE = {"cpu": 3072, "cuda": 8192}
PEAK_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
AHEAD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Samples:
    """What one contestant took, ms, a sample a round. `ms`: CUDA events, or CPU time of the process; `wall_ms`: CUDA
    events too, or the clock on the wall."""

    ms: list[float]
    wall_ms: list[float]


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Samples]:
    """Run every function once a round, each round beginning with another one, after a round that is not counted."""
    names = list(functions)
    ahead = torch.empty(AHEAD_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)
    samples = {name: Samples([], []) for name in names}
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ms, wall_ms = timed(functions[name], device, ahead)
            if turn >= 0:
                samples[name].ms.append(ms)
                samples[name].wall_ms.append(wall_ms)
    return samples


def timed(function: Callable[[], object], device: str, ahead: Tensor) -> tuple[float, float]:
    """One run -> (ms, wall ms), as in `Samples`. On CUDA `ahead` is written first: it empties the L2 cache, and keeps
    the device busy while the host comes to the first kernel, as in training."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        ahead.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end)
        return ms, ms
    wall, busy = time.perf_counter(), time.process_time()
    function()
    return (time.process_time() - busy) * 1e3, (time.perf_counter() - wall) * 1e3


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def ratio(values: list[float], base: list[float]) -> float:
    """Median over the rounds of the ratio within a round: slow rounds are slow for both."""
    return statistics.median(value / unit for value, unit in zip(values, base, strict=True))


def target(name: str, measured: float, bound: float) -> dict[str, Any]:
    """A figure beside what it may be at most."""
    return {"target": name, "measured": measured, "bound": bound, "met": measured <= bound}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What the device can do: FLOP/s of a large matmul by dtype, bytes/s of a large copy (read + written)."""

    matmul: dict[str, float]
    copy: float


Work = tuple[Callable[[], object], float]


def peak_functions(device: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Work]:
    """The work that shows the peak rates: name -> (function, FLOP or bytes of a call)."""
    work = {f"peak matmul {name}": _square_matmul(device, dtype) for name, dtype in dtypes.items()}
    source = torch.randn(PEAK_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return work | {"peak copy": (lambda: target.copy_(source), 2.0 * PEAK_COPY_BYTES[device])}


def _square_matmul(device: str, dtype: torch.dtype) -> Work:
    side = PEAK_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3


def peaks(work: Mapping[str, tuple[float, Samples]]) -> Peaks:
    """Rates from the amounts of `peak_functions` and the wall time that each took."""
    rates = {name: amount / statistics.median(taken.wall_ms) * 1e3 for name, (amount, taken) in work.items()}
    matmul = {name.removeprefix("peak matmul "): rate for name, rate in rates.items() if name != "peak copy"}
    return Peaks(matmul=matmul, copy=rates["peak copy"])


def roofline_ms(flops: float, moved: float, peaks: Peaks, dtype: str) -> float:
    """The least time (ms) for so many FLOP and bytes: the slower of the two at its peak rate."""
    return max(flops / peaks.matmul[dtype], moved / peaks.copy) * 1e3


def nbytes(values: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor))


def extra_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Peak memory (bytes) of a call above what stood before it and what it returns; None where it cannot be read.

    On CUDA of torch's allocator; elsewhere of the process, so that scratch memory of libraries counts too.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - nbytes(kept))
    resident = resident_bytes() if forget_peak() else None
    kept = function()
    peak = peak_resident_bytes()
    return None if resident is None or peak is None else max(0, peak - resident - nbytes(kept))


def forget_peak() -> bool:
    """Let the peak of the process be its present size. (getrusage's peak has that of the parent process in it.)"""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes() -> int | None:
    """Memory of this process, bytes; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """Its peak since the last `forget_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def in_fresh_process(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call an importable function in a process of its own, whose memory holds nothing but what it makes."""
    with _freed_at_once(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """In new processes glibc gives blocks from 64 KiB up back when they are freed: peaks are then of live memory."""
    names = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
