"""Freed memory stays with the process while training on a CPU, and only then."""

from __future__ import annotations

import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from selm_fast.training.host_memory import reused_memory

MIB = 2**20


def resident_mib() -> float:
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def freed_inside_and_after(device: str) -> tuple[float, float]:
    """MiB that a tensor of 256 MiB leaves with the process once it is freed: in the block, and after it."""
    torch.zeros(MIB).add_(1)
    before = resident_mib()
    with reused_memory(torch.device(device)):
        tensor = torch.ones(64 * MIB)
        assert resident_mib() - before > 250
        del tensor
        inside = resident_mib() - before
    return inside, resident_mib() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_what_is_freed_is_kept_for_the_next_step_and_given_back_in_the_end(device: str, kept: bool) -> None:
    """In a process of its own, whose memory nobody else has a part in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        inside, after = pool.submit(freed_inside_and_after, device).result()
    assert (inside > 250) if kept else (inside < 50)
    assert after < 50


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_it_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> None:
            calls.append((parameter, value))

        def malloc_trim(self, pad: int) -> None:
            calls.append((0, pad))

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    with pytest.raises(KeyError), reused_memory(torch.device("cpu")):
        raise KeyError
    assert calls == [(-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-4, 65536), (-1, 2**17), (-2, 0), (0, 0)]
