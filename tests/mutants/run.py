"""Breaks the kernels one by one and shows that a test turns red each time: `make mutants`.

Every mutant of `of_*.py` is applied to a copy of the working tree, and its tests are run there; a mutant whose
tests stay green is a hole in the tests. Exit code 1 where one survives.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900  # for the tests of one mutant


def copy_tree(target: Path) -> None:
    """The files that git knows or would add, and the built extension."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "selm_fast").glob("_C-*.so")]
    for name in [*filter(None, listed.stdout.split("\0")), *built]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a mutant's tests; the copy comes before an installed package."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"SELM_FAST_EXTENSION": "1"}  # an extension that does not load is no reason to skip
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, returncode=1, stdout="it never ends")  # red, too


def build(tree: Path) -> bool:
    """Build the extension again; a mutant that does not compile is no mutant."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"SELM_FAST_EXTENSION": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode == 0


def survives(mutant: Mutant, tree: Path) -> str:
    """Apply, test, restore -> "" when a test turned red, or what went wrong."""
    path = tree / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        return f"its text occurs {original.count(mutant.old)} times"
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc/") and not build(tree):
            return "it does not compile"
        outcome = run_tests(tree, mutant.tests)
    finally:
        path.write_text(original)
    if outcome.returncode == 0:
        return "no test turned red"
    return "" if outcome.returncode == 1 else f"pytest could not run: {outcome.stdout[-500:]}"


def main() -> int:
    """Run all mutants, or those whose file or text contains an argument."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="mutants whose file or text contains this")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.file + mutant.old + mutant.new]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        untouched = sorted({mutant.tests for mutant in chosen})
        for tests in untouched:
            if (outcome := run_tests(tree, tests)).returncode:
                print(f"{outcome.stdout[-2000:]}\nwithout any mutant, {tests} is red already", file=sys.stderr)
                return 1
        for nth, mutant in enumerate(chosen, 1):  # those of csrc/ are last: their builds replace the extension
            start = time.monotonic()
            problem = survives(mutant, tree)
            survivors += bool(problem)
            print(
                f"{nth}/{len(chosen)} {'SURVIVED' if problem else 'killed'} ({time.monotonic() - start:.0f} s) "
                f"{mutant.file}: {mutant.why}{': ' + problem if problem else ''}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
