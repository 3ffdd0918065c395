"""Compile every Triton kernel of the package ahead of time, without a GPU: do they fit sm_80, sm_90 and sm_100?

    python benchmarks/aot.py [--json FILE]

The package's functions are called on small tensors. A driver that merely names a GPU stands in for CUDA's, and each
launch ends with its compilation: what is compiled is what a GPU would be given, block sizes and warps included. Printed
are registers of a thread, its stack (bytes; where spilled registers go) and a program's shared memory (bytes). The exit
code is 1 where a kernel spills, asks for more shared memory than there is, multiplies matrices without tensor cores,
uses atomics (they add in any order), or was not launched at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel's module is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import selm_fast.ops
from benchmarks import machine

# Shared memory of a program at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = re.compile(r"\b(wgmma|mma|tcgen05)\.")  # in PTX
ATOMICS = re.compile(r"\b(atom|red)\.")  # in PTX; redux and mbarrier are other things
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one configuration for one architecture."""

    kernel: str
    configuration: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    floats: tuple[str, ...]  # what it computes with, as Triton's IR names it
    faults: tuple[str, ...]


@contextmanager
def compiling(arch: int, seen: list[tuple[JITFunction, Any]]) -> Iterator[None]:
    """Within it, launches compile for an architecture and end there; `seen` gathers kernels and what became of them."""
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((kernel, run(kernel, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # kernels are remembered by device: one for each architecture
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def inspect(kernel: JITFunction, configuration: str, arch: int, compiled: Any) -> Compiled:
    """What a compiled kernel takes of the device, and what is wrong with it."""
    registers, stack, local = resources(compiled.asm["cubin"], kernel.__name__)
    shared, ir, ptx = compiled.metadata.shared, compiled.asm["ttir"], compiled.asm["ptx"]
    faults = []
    if stack or local:
        faults.append(f"spills: {stack} bytes of stack and {local} of local memory a thread")
    if shared > SHARED_LIMITS[arch]:
        faults.append(f"asks for {shared} bytes of shared memory; a program may have {SHARED_LIMITS[arch]}")
    if "tt.dot" in ir and not TENSOR_CORES.search(ptx):
        faults.append("multiplies matrices without tensor cores")
    if ATOMICS.search(ptx):
        faults.append("uses atomics")
    floats = tuple(sorted(set(re.findall(r"\b(?:bf16|f16|f32|f64)\b", ir))))
    return Compiled(
        kernel.__name__, configuration, arch, registers, stack + local, shared, compiled.metadata.num_warps, floats,
        tuple(faults),
    )  # fmt: skip


def resources(cubin: bytes, function: str) -> tuple[int, int, int]:
    """Registers, stack and local memory (bytes) of a thread, as cuobjdump reads them from a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, registers, stack, local in RESOURCES.findall(text):
        if name == function:
            return int(registers), int(stack), int(local)
    raise RuntimeError(f"cuobjdump says nothing of {function}:\n{text}")


def cuobjdump() -> str:
    """The program that comes with triton, or the one of an installed CUDA toolkit."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"cuobjdump is neither at {bundled} nor on the PATH")
    return found


def never_launched(modules: Iterable[ModuleType], launched: set[JITFunction]) -> list[str]:
    """Kernels of the modules that were neither launched nor called by one that was."""
    known = {
        value: f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    reached = set(launched)
    while new := {helper for kernel in reached for helper in known if _names(kernel, helper)} - reached:
        reached |= new
    return sorted(name for kernel, name in known.items() if kernel not in reached)


def _names(kernel: JITFunction, helper: JITFunction) -> bool:
    return kernel.__globals__.get(helper.__name__) is helper and helper.__name__ in kernel.fn.__code__.co_names


def table(rows: list[Compiled]) -> str:
    """A line for each configuration of each kernel, in Markdown."""
    archs = sorted({row.arch for row in rows})
    lines = [
        "| kernel | configuration | warps | " + " | ".join(f"registers sm_{a}" for a in archs) + " | stack | shared |",
        "|---" * (5 + len(archs)) + "|",
    ]
    ordered = sorted(rows, key=lambda row: (row.kernel, row.configuration, row.arch))
    for (kernel, configuration), group in groupby(ordered, key=lambda row: (row.kernel, row.configuration)):
        same = list(group)
        cells = [str(row.registers) for row in same]
        worst = f"{max(row.stack for row in same)} | {max(row.shared for row in same)}"
        lines.append(f"| {kernel} | {configuration} | {same[0].warps} | {' | '.join(cells)} | {worst} |")
    return "\n".join(lines)


def main() -> int:
    """Compile, print the table, write the JSON, name what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument(
        "--launches", type=Path, default=Path(__file__).with_name("aot_launches.py"),
        help="a Python file whose launches() gives names and calls that launch kernels (default: the package's)",
    )  # fmt: skip
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMITS, default=list(SHARED_LIMITS))
    chosen = parser.parse_args()

    source = _load(chosen.launches)
    package = [import_module(f"selm_fast.ops.{m.name}") for m in pkgutil.iter_modules(selm_fast.ops.__path__)]
    rows: list[Compiled] = []
    launched: set[JITFunction] = set()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch in chosen.arch:
            for configuration, launch in source.launches():
                seen: list[tuple[JITFunction, Any]] = []
                with compiling(arch, seen):
                    launch()
                rows += [inspect(kernel, configuration, arch, compiled) for kernel, compiled in seen]
                launched |= {kernel for kernel, _ in seen}

    faults = [f"{row.kernel} ({row.configuration}, sm_{row.arch}) {fault}" for row in rows for fault in row.faults]
    modules = package if chosen.launches == parser.get_default("launches") else [source]
    faults += [
        f"{name} was never launched: {chosen.launches.name} lacks it" for name in never_launched(modules, launched)
    ]
    print(table(rows))
    if chosen.json:
        facts = {
            "commit": machine.commit(),
            "machine": machine.machine("cpu"),
            "versions": machine.versions() | {"triton": triton.__version__},
        }
        machine.write_json(chosen.json, facts | {"kernels": [asdict(row) for row in rows], "faults": faults})
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
