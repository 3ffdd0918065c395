"""Runs the grid and shows what it came to; a stopped one goes on where it was.

python -m benchmarks.exploration                    # under 20 minutes on two cores; then the page and the tables
python -m benchmarks.exploration --quick --out x    # a small grid in a minute, to see that all of it works
python -m benchmarks.exploration --render           # only page and tables, from the results that are there
python -m benchmarks.exploration --check            # writes nothing; exit code 1 where a table is not up to date
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.exploration import document, page, results
from benchmarks.exploration.grid import DEFAULT, QUICK
from benchmarks.exploration.work import Work
from selm_fast.errors import Refused
from selm_fast.training.progress import Display

# The sources that decide what a run comes to; others show it, or do not run.
_HERE = ("environment", "tiny_llama", "methods", "control", "experiment")
DECIDING = (
    *(f"benchmarks/exploration/{name}.py" for name in _HERE),
    *(f"selm_fast/{name}/*.py" for name in ("config", "ops", "data", "model", "training")),
    "selm_fast/batch.py",
    "selm_fast/iteration/candidates.py",
    "csrc/*",
)


def sources() -> str:
    """Digest of everything that decides what a run comes to: sources, versions, processor."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in DECIDING for path in machine.ROOT.glob(pattern)):
        digest.update(path.relative_to(machine.ROOT).as_posix().encode() + path.read_bytes())
    facts = machine.machine("cpu")
    digest.update(repr((machine.versions(), facts["cpu"], facts["cpu_capability"])).encode())
    return digest.hexdigest()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exploration", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small grid, which shows nothing but that it runs")
    parser.add_argument("--render", action="store_true", help="run nothing; the page and tables from --out")
    parser.add_argument("--check", action="store_true", help="write nothing; are the tables those of --out?")
    parser.add_argument("--out", type=Path, help=f"the results file (default: {results.DEFAULT_PATH})")
    parser.add_argument(
        "--page", type=Path, default=Path("runs/exploration.html"), help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/exploration"), help="finished runs are kept here (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: %(default)s, the cores)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; expected 1 or more")
    args.out = args.out or results.DEFAULT_PATH
    args.committed = args.out.resolve() == results.DEFAULT_PATH.resolve()
    if args.quick and args.committed:
        parser.error(f"--quick needs another --out than {results.DEFAULT_PATH}, which is of the whole grid")
    if args.check and args.render:
        parser.error("--check writes nothing, and --render does: give one of them")
    if (args.render or args.check) and not args.out.is_file():
        parser.error(f"{args.out} is not there: run without --render and --check to make it")
    return args


def main(given: list[str]) -> int:
    """Run, render -> exit code."""
    args = parse(given)
    if args.check:
        stale = document.stale(results.read(args.out))
        for name in stale:
            print(f"{name} is not what {args.out} says: python -m benchmarks.exploration --render")
        return 1 if stale else 0
    if not args.render:
        torch.set_num_threads(1)
        display = Display()
        began = time.monotonic()
        grid = QUICK if args.quick else DEFAULT
        # Before the runs: the tree may change under them.
        result = machine.described("cpu", shlex.join(["python", "-m", "benchmarks.exploration", *given]))
        work = Work(args.work, grid, sources(), workers=args.workers, display=display)
        begun_before = bool(work.done)
        found = results.make(grid, work)
        seconds = time.monotonic() - began
        result |= {"workers": args.workers, "seconds": _seconds(args.out, found, None if begun_before else seconds)}
        results.write(args.out, result | {"exploration": found})
        display.say(f"{len(found['runs'])} runs in {args.out}, after {seconds:.0f} s")
    result = results.read(args.out)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page.render(result), "utf-8")
    print(args.page)
    if args.committed:
        document.write(result)
    return 0


def _seconds(out: Path, found: Mapping[str, Any], seconds: float | None) -> int | None:
    """How long all the runs took in one go: now, or when the file that is there was made of the same runs."""
    if seconds is not None:
        return round(seconds)
    before = results.read(out) if out.is_file() else None
    if before is None or len(before["exploration"]["runs"]) != len(found["runs"]):
        return None
    same = all(
        old["held_out"]["reward"] == new["held_out"]["reward"]
        for old, new in zip(before["exploration"]["runs"], found["runs"], strict=True)
    )
    return before["seconds"] if same else None  # type: ignore[no-any-return]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        sys.exit(75)  # as every command that has saved what it has
    except (Refused, ValueError) as error:
        sys.exit(f"error: {error}")
