"""What this machine has, what of it is too old or broken, and whether it can train."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from selm_fast.cli.finding import Finding, one_line

# The floors of pyproject.toml (a test compares them): the package may be run from a tree that was never installed.
REQUIRED = {
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "tokenizers": "",
    "safetensors": "0.8.0",
    "numpy": "2.0.0",
    "pydantic": "2.9.0",
    "rich": "13.7.0",
    "ruamel.yaml": "0.18.6",
    "Jinja2": "3.1.0",
    "matplotlib": "3.9.0",
}
OPTIONAL = {
    "datasets": "5.0.0",
    "pyarrow": "",
    "tensorboard": "2.20.0",
    "triton": "3.6.0",
    "flash_attn": "",
    "trl": "1.16.0",
}
PYTHON_FLOOR = "3.11"
GIB = 2**30


def doctor() -> int:
    """Prints what was found; 0 when this machine can train, 1 when something stands in the way."""
    findings = [*_versions(), *_processor(), *_torch()]
    _print(findings)
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        print(f"this machine cannot train: {'; '.join(f'{p.name}: {p.remark or p.found}' for p in problems)}")
        return 1
    print("this machine can train")
    return 0


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield _versioned("python", python, PYTHON_FLOOR, "problem")
    for packages, missing in ((REQUIRED, "problem"), (OPTIONAL, "ok")):
        for name, floor in packages.items():
            try:
                found = version(name)
            except PackageNotFoundError:
                remark = "required" if missing == "problem" else "optional"
                yield Finding("versions", name, "not installed", "problem" if missing == "problem" else "ok", remark)
                continue
            yield _versioned(name, found, floor, "problem" if missing == "problem" else "note")


def _versioned(name: str, found: str, floor: str, too_old: Literal["note", "problem"]) -> Finding:
    if _numbers(found) < _numbers(floor):
        return Finding("versions", name, found, too_old, f"{floor} or newer is needed")
    return Finding("versions", name, found, "ok", f"at least {floor}" if floor else "")


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version, without local and pre-release parts: 2.13.0+cpu is (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _processor() -> Iterator[Finding]:
    yield Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "processor", f"{_processor_name()}, {usable} of {os.cpu_count()} cores usable")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page / GIB
        free = os.sysconf("SC_AVPHYS_PAGES") * page / GIB if "SC_AVPHYS_PAGES" in os.sysconf_names else total
        yield Finding("machine", "memory", f"{total:.1f} GiB, {free:.1f} GiB unused")


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError for a missing library, among others
        yield Finding("devices", "torch", "cannot be imported", "problem", one_line(error))
        return
    yield Finding("devices", "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    driver = _driver()
    if not torch.cuda.is_available():
        if driver:
            remark = f"driver {driver} is there, but this torch ({torch.version.cuda or 'built for CPU'}) cannot use it"
            yield Finding("devices", "gpu", "not usable", "note", remark)
        else:
            yield Finding("devices", "gpu", "none", "note", "training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        yield _gpu(index, driver)
    from selm_fast.cli import tryouts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from tryouts.collectives(torch.cuda.device_count())
    yield from _backends(device)


def _gpu(index: int, driver: str) -> Finding:
    import torch

    try:
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(16, 16, device=f"cuda:{index}", dtype=torch.bfloat16)
        right = bool((ones @ ones == 16).all())
    except RuntimeError as error:
        return Finding("devices", f"cuda:{index}", "does not compute", "problem", one_line(error))
    found = (
        f"{device.name}, capability {device.major}.{device.minor}, "
        f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB unused, CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
    )
    if not right:
        return Finding("devices", f"cuda:{index}", found, "problem", "a bfloat16 product comes out wrong")
    if device.major < 8:
        return Finding("devices", f"cuda:{index}", found, "note", "no bfloat16 in hardware: --dtype float32 is faster")
    return Finding("devices", f"cuda:{index}", found)


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()


def _backends(device: str) -> Iterator[Finding]:
    try:
        from selm_fast.cli import tryouts
        from selm_fast.ops import backends, extension

        chosen = backends(device)
        built, status = extension.available(), extension.status()
    except Exception as error:
        yield Finding("back ends", "selm_fast.ops", "cannot be used", "problem", one_line(error))
        return
    for op, backend in chosen.items():
        yield Finding("back ends", op, backend)
    if built:
        yield Finding("back ends", "extension csrc", "loaded", "ok", status)
    else:
        remark = f"{status}; its absence costs speed, and exactness in bf16"
        yield Finding("back ends", "extension csrc", "absent", "note", remark)
    yield from tryouts.attention(device)


def _print(findings: list[Finding]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    if not sys.stdout.isatty() or any(f.name == "rich" and f.state == "problem" for f in findings):
        for finding in findings:
            print("\t".join((finding.topic, finding.name, finding.found, finding.state, finding.remark)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table("", "name", "found", "state", "remark")
    topic = ""
    for finding in findings:
        if finding.topic != topic and topic:
            table.add_section()
        state = Text(finding.state, style=styles[finding.state])
        shown = finding.topic if finding.topic != topic else ""
        table.add_row(shown, finding.name, Text(finding.found), state, Text(finding.remark))
        topic = finding.topic
    Console().print(table)
