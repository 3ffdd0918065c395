"""`benchmarks/aot.py`: every kernel compiles for every architecture and fits; kernels that do not are found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def _double(x):
    return x + x


@triton.jit
def fine_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(x_ptr + cols, _double(tl.load(x_ptr + cols)))


@triton.jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(x_ptr + cols, x - tl.max(x, 0))


@triton.jit
def atomic_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + cols % 2, tl.load(x_ptr + cols))


@triton.jit
def dot_kernel(x_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(STEPS):
        a = tl.load(x_ptr + (step * BLOCK + rows) * BLOCK + cols)
        b = tl.load(x_ptr + (step * BLOCK + cols) * BLOCK + rows)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(x_ptr + rows * BLOCK + cols, total.to(x_ptr.dtype.element_ty))


@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def launches():
    x, half = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    yield "fine", lambda: fine_kernel[(1,)](x, BLOCK=128)
    yield "spill", lambda: spilling_kernel[(1,)](x, BLOCK=16384, num_warps=1)
    yield "atomics", lambda: atomic_kernel[(1,)](x, BLOCK=128)
    yield "fine dot", lambda: dot_kernel[(1,)](half, 64, BLOCK=64, PRECISION="tf32")
    yield "large dot", lambda: dot_kernel[(1,)](half, 64, BLOCK=128, PRECISION="tf32", num_stages=8)
    yield "scalar dot", lambda: dot_kernel[(1,)](x, 4, BLOCK=16, PRECISION="ieee")
"""


def run_aot(folder: Path, *flags: str) -> tuple[int, str, str, dict[str, Any]]:
    """Exit code, what was printed on both channels, and the numbers."""
    numbers = folder / "aot.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--json", str(numbers), *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    return done.returncode, done.stdout, done.stderr, json.loads(numbers.read_text()) if numbers.exists() else {}


@pytest.mark.parametrize("archs", [(90,), pytest.param((80, 90, 100), marks=pytest.mark.slow)], ids=str)
def test_every_kernel_fits_every_architecture(tmp_path: Path, archs: tuple[int, ...]) -> None:
    code, printed, errors, numbers = run_aot(tmp_path, "--arch", *map(str, archs))
    assert code == 0, errors
    kernels = numbers["kernels"]
    assert {row["arch"] for row in kernels} == {*archs}
    for row in kernels:
        assert row["stack"] == 0 and 0 < row["registers"] <= 255, row
        assert f"| {row['kernel']} | {row['configuration']} |" in printed
    configurations = {(row["kernel"], row["configuration"]) for row in kernels}
    assert len(printed.strip().splitlines()) == len(configurations) + 2
    # Settings and constants that slipped to fp32 would show in the loss at step 0; fp64 would halt the row kernels.
    floats = {
        name: {f for row in kernels if row["kernel"] == name for f in row["floats"]} for name, _ in configurations
    }
    assert floats.pop("_group_losses_kernel") == {"f64"}
    assert floats.pop("_sequence_sum_kernel") == {"f32", "f64"}
    assert floats.pop("_adamw_kernel") == {"bf16", "f32", "f64"}  # fp64 for a program's two bias corrections
    assert len(floats) >= 6 and not any("f64" in kinds for kinds in floats.values())


def test_kernels_that_do_not_fit_are_found(tmp_path: Path) -> None:
    """Each fault once, and nothing of the kernels that are fine."""
    file = tmp_path / "some_launches.py"
    file.write_text(KERNELS)
    code, _, errors, numbers = run_aot(tmp_path, "--launches", str(file), "--arch", "90")
    assert code == 1
    faults = [
        r"spilling_kernel \(spill, sm_90\) spills: [1-9]\d* bytes of stack and 0 of local memory a thread",
        r"atomic_kernel \(atomics, sm_90\) uses atomics",
        r"dot_kernel \(large dot, sm_90\) asks for \d{6} bytes of shared memory; a program may have 232448",
        r"dot_kernel \(scalar dot, sm_90\) multiplies matrices without tensor cores",
        r"some_launches.forgotten_kernel was never launched: some_launches.py lacks it",
    ]
    assert re.fullmatch("\n".join(faults), errors.strip()), errors
    assert numbers["faults"] == errors.strip().splitlines()
