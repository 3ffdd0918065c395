"""Everything that only a GPU can show, in one command of under 8 minutes: build, `gpu` tests, compile report, speed.

    python benchmarks/gpu_test.py              # `make gpu-test`; results go to benchmarks/results/, or to $OUT

Uses the interpreter it is started with and installs nothing: the package itself may be missing from it, and so may the
packages of MAY_BE_MISSING. Tests that need one of these are left out, and said to be; those of the ops need none, and
some must have passed. A missed target of speed is told and fails nothing. In a copy without .git the environment
variable SELM_FAST_COMMIT gives the commit that the results name. Exit code: 0 when every part passed, 1 when one did
not, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402 - from the checkout, installed or not

LIMIT_S = 460.0
OPS = "tests/ops"
TAIL = 4000  # characters of a part's output that its result keeps
REASON_LINES = 2  # of a failed build: so many errors, and so many last lines
BENCH = ("--device", "cuda", "--shape", "8192,4096,128256", "--dtype", "bf16")
# What tests outside those of the ops may want; the absence of anything else is a failure.
MAY_BE_MISSING = {
    "pydantic", "pydantic_core", "rich", "ruamel", "hypothesis", "jinja2", "matplotlib", "datasets", "tensorboard",
    "trl", "xdist",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One step: a command with a time limit of its own."""

    name: str
    command: list[str]
    limit_s: float
    required: bool = True
    judge: Callable[[int, str], tuple[bool, str]] = lambda code, output: (code == 0, "")  # -> passed, in words


def parts(scratch: Path) -> list[Part]:
    """The steps in order; what matters most comes first, and what could also be done elsewhere last."""
    python = sys.executable
    build = ["env", "SELM_FAST_EXTENSION=1", python, "setup.py", "build_ext", "--inplace"]  # 1: a failure is told
    compiled = ["--json", str(machine.results_folder() / "aot.json")]
    bench = [python, "benchmarks/bench_ops.py", *BENCH]
    ops, *others = [of_tests(number, folder, scratch) for number, folder in enumerate(gpu_tests(ROOT))]
    return [
        Part(name="build of the C++ extension", command=build, limit_s=90, required=False, judge=judge_build),
        ops,
        Part(name="speed", command=bench, limit_s=170, judge=judge_speed),
        *others,
        Part(name="compile report", command=[python, "benchmarks/aot.py", *compiled], limit_s=120),
    ]


def gpu_tests(root: Path) -> list[str]:
    """Folders that hold tests marked `gpu`; OPS, which needs torch alone, comes first."""
    marked = {path.parent for path in (root / "tests").rglob("*.py") if "pytest.mark.gpu" in path.read_text("utf-8")}
    folders = [path.relative_to(root).as_posix() for path in marked]
    return sorted(folders, key=lambda folder: (folder != OPS, folder))


def of_tests(number: int, folder: str, scratch: Path) -> Part:
    """The tests of one folder, in a process of its own: a conftest that cannot be imported ends all of pytest."""
    report = scratch / f"tests-{number}.xml"
    options = ["-m", "gpu", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return Part(
        name=f"gpu tests in {folder}",
        command=[sys.executable, "-m", "pytest", *options, f"--junitxml={report}", folder],
        limit_s=170,
        judge=lambda code, output: judge_tests(code, output, report, must_run=folder == OPS),
    )


def judge_build(code: int, output: str) -> tuple[bool, str]:
    """Was it built? If not: the first errors of the compiler and the last lines."""
    if code == 0:
        return True, ""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines[:-REASON_LINES] if "error:" in line]
    return False, " | ".join([*errors[:REASON_LINES], *lines[-REASON_LINES:]])


def judge_speed(code: int, output: str) -> tuple[bool, str]:
    """Were all results right? And how many targets are met, and what was wrong, as the benchmark's last lines say."""
    said = [line for line in output.splitlines() if re.match(r"\d+ of \d+ targets met|WRONG: |error: ", line)]
    return code == 0, " | ".join(said)


def judge_tests(code: int, output: str, report: Path, *, must_run: bool) -> tuple[bool, str]:
    """Did the tests pass? From pytest's exit code, output and XML report; must_run: one at least must have passed.

    What cannot be imported or set up for want of a package that MAY_BE_MISSING is left out: it counts neither way.
    """
    if not report.is_file():
        missing = missing_package(output) if "ImportError while loading conftest" in output else None
        if missing is None:
            return False, f"pytest ended with {code} and wrote no report"
        return not must_run, f"left out: {missing} is not installed"
    found = {"passed": 0, "failed": 0, "skipped": 0}
    left_out = []
    for test in ElementTree.parse(report).iter("testcase"):
        wants = [missing_package(error.text or "") for error in test.findall("error")]
        if test.find("failure") is not None or None in wants:
            found["failed"] += 1
        elif wants:
            left_out.append(f"{test.get('name')} ({wants[0]} is not installed)")
        else:
            found["passed" if test.find("skipped") is None else "skipped"] += 1
    words = ", ".join(f"{number} {what}" for what, number in found.items())
    if left_out:
        words += f"; left out: {', '.join(left_out)}"
    # 1: something failed, be it a collection; 5: nothing was left to run. Anything else is trouble of pytest itself.
    ended_well = code == 0 or (code in (1, 5) and bool(left_out))
    some = found["passed"] > 0 or (bool(left_out) and not must_run)
    return ended_well and not found["failed"] and some, words


def missing_package(text: str) -> str | None:
    """The package whose absence stopped an import, if that is what happened and all such packages MAY_BE_MISSING."""
    names = re.findall(r"ModuleNotFoundError: No module named '(\w+)[\w.]*'", text)
    return names[-1] if names and set(names) <= MAY_BE_MISSING else None


def run(part: Part, log: Path, limit_s: float) -> dict[str, Any]:
    """Run one part, its output shown and kept, and end it with all its processes when its time is up."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    print(f"\n=== {part.name}: {shlex.join(part.command)}", flush=True)
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output = log.read_text("utf-8", "replace")
    print(output, flush=True)
    passed, why = (False, f"not done after {limit_s:.0f} s") if code is None else part.judge(code, output)
    return {
        "name": part.name,
        "command": shlex.join(part.command),
        "required": part.required,
        "passed": passed,
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "detail": why,
        "output_tail": machine.portable(output)[-TAIL:],
    }


def summary(results: list[dict[str, Any]]) -> str:
    """A line a part."""
    lines = []
    for result in results:
        verdict = "passed" if result["passed"] else "FAILED" if result["required"] else "failed (optional)"
        lines.append(f"{verdict:18} {result['seconds']:6.1f} s  {result['name']}  {result['detail']}".rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, write the results, say what passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    dry_run: bool = parser.parse_args(arguments).dry_run
    if not dry_run and not torch.cuda.is_available():
        print("gpu-test: torch sees no CUDA device here; nothing was run")
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as folder:
        scratch, results = Path(folder), []
        for number, part in enumerate(parts(scratch)):
            if dry_run:
                print(shlex.join(part.command))
                continue
            left_s = LIMIT_S - (time.monotonic() - began)
            results.append(run(part, scratch / f"{number}.log", min(part.limit_s, max(left_s, 1.0))))
    if dry_run:
        return 0
    passed = all(result["passed"] for result in results if result["required"])
    path = machine.result_path("gpu_test", "cuda")
    facts = {"commit": machine.commit(), "machine": machine.machine("cuda"), "versions": machine.versions()}
    seconds = round(time.monotonic() - began, 1)
    machine.write_json(path, facts | {"passed": passed, "seconds": seconds, "parts": results})
    print(f"\n{summary(results)}\n{'passed' if passed else 'FAILED'} in {seconds:.0f} s; written: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
