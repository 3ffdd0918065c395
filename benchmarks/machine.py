"""Where a measurement was made: the machine, the versions, the commit, and the file it is written to."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn")
PACKAGES = ("triton", "transformers", "llm-blender", *PEERS)
SOURCES = ("selm_fast/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "setup.py", "benchmarks/**/*.py")


def processor() -> str:
    """Model of the CPU, as the kernel names it."""
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on: processor, cores that this process may use, threads, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "cpu": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties()
        facts |= {
            "gpu": found.name,
            "gpu_memory_gib": round(found.total_memory / 2**30, 1),
            "multiprocessors": found.multi_processor_count,
            "compute_capability": f"{found.major}.{found.minor}",
        }
    return facts


def versions() -> dict[str, str | None]:
    """Python, CUDA, the package and every peer that is installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    init = (ROOT / "selm_fast" / "__init__.py").read_text("utf-8")
    match = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    return found | {"selm_fast": match.group(1) if match else None}


def commit() -> dict[str, Any]:
    """The commit, whether the tree differs from it, and a digest of the sources, which a copy without git has too.

    -> {"id": hex | None, "dirty": bool | None, "sources": sha256}. Results themselves do not make the tree dirty. Where
    there is no .git, SELM_FAST_COMMIT gives the id.
    """
    found: dict[str, Any] = {"id": None, "dirty": None, "sources": sources_digest(ROOT)}
    if not (ROOT / ".git").exists():
        found["id"] = os.environ.get("SELM_FAST_COMMIT") or None
    else:
        found["id"] = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        found["dirty"] = None if changes is None else bool(changes)
    return found


def _git(*arguments: str) -> str | None:
    """Output of a git command that changes nothing; None where it fails."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def sources_digest(root: Path) -> str:
    """sha256 over the names and contents of the files that decide what was measured."""
    digest = hashlib.sha256()
    for path in sorted(
        {path for pattern in SOURCES for path in root.glob(pattern) if path.suffix not in (".so", ".o")}
    ):
        if path.is_file():
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def result_path(stem: str, device: str) -> Path:
    """STEM_DEVICE.json in the folder of the results."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return results_folder() / f"{stem}_{slug}.json"


def described(device: str, command: str) -> dict[str, Any]:
    """What every result begins with: how, from which sources, where, with what, and when it was made."""
    now = datetime.now(UTC)
    return {
        "command": command,
        "date": now.date().isoformat(),
        "time": now.time().isoformat("seconds"),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
    }


def dated_path(result: Mapping[str, Any]) -> Path:
    """MACHINE_DATE_COMMIT.json in the folder of the results, from a result that begins as `described`."""
    facts, made = result["machine"], result["commit"]
    slug = re.sub(r"[^a-z0-9]+", "_", facts.get("gpu", facts["cpu"]).lower()).strip("_")
    made_from = (made["id"] or made["sources"])[:7]
    return results_folder() / f"{slug}_{result['date']}_{made_from}.json"


def results_folder() -> Path:
    """benchmarks/results, or $OUT where it is set."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"


def write_json(path: Path, value: Any) -> None:
    """Write a result, its texts portable; a number that is not finite becomes null: JSON has no other word for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_writable(value), indent=1, allow_nan=False) + "\n", "utf-8")


def portable(text: str) -> str:
    """A text without the places of this machine: python for the interpreter, paths relative to ROOT, the rest named."""
    places = {
        sys.executable: "python",
        str(ROOT): ".",
        os.environ.get("OUT", ""): "$OUT",
        tempfile.gettempdir(): "$TMPDIR",
        sys.prefix: "PREFIX",
        os.path.expanduser("~"): "~",
    }
    for place in sorted(places, key=len, reverse=True):  # one may lie in another
        if not Path(place).is_absolute() or place == "/":
            continue
        name, folder = places[place], re.escape(place.rstrip("/"))
        # As a whole path or as the beginning of one; -I and -L stand right before the paths that a compiler is given.
        begin, end = r"(?:(?<![\w./-])|(?<=-[IL]))", r"(?![\w-]|\.\w)"
        if name == ".":
            text = re.sub(rf"{begin}{folder}/(?=[\w.])", "", text)
        text = re.sub(rf"{begin}{folder}{end}", name, text)
    return text


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    if isinstance(value, str):
        return portable(value)
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
