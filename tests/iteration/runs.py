"""What tests of whole runs share: comparing what two of them left, ending them at a point, watching their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selm_fast.config import RunConfig
from selm_fast.iteration import evaluate as evaluate_module
from selm_fast.iteration import rollout as rollout_module
from selm_fast.iteration.generate import Generator
from selm_fast.iteration.job import Job
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import plan_stages
from selm_fast.iteration.sources import identities
from selm_fast.iteration.status import look
from selm_fast.training import storage

from ..training.harness import KILLED, REPOSITORY, leftovers, read_metrics, write_recipe
from .harness import lines

# Sampled responses show whose seed they were drawn with; a checkpoint at every step is a place to go on from.
RESUMABLE: dict[str, Any] = {
    "rollout__responses": 2,
    "rollout__temperature": 1.0,
    "rollout__explored": "base",
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
}
DEADLINE_S = 300.0  # of what takes seconds on a machine that has nothing else to do
Results = dict[str, Any]
CopyOfWhole = Callable[..., RunConfig]


def results(root: Path) -> Results:
    """What a run made, by path: bytes of responses, rows, weights and figures; metrics and manifests without timings.

    Reference log-probs are left out: the shards of a cache depend on the number of processes; the loss shows them.
    """
    found: Results = {}
    for pattern in (
        "iter-*/rollout/*.jsonl", "iter-*/rank/*.jsonl", "iter-*/evaluate/*.jsonl", "iter-*/evaluate/metrics.json",
        "iter-*/train/model/*.safetensors", "iter-*/train/masters/*.safetensors", "model/*.safetensors",
    ):  # fmt: skip
        for path in root.glob(pattern):
            found[str(path.relative_to(root))] = path.read_bytes()
    for path in root.glob("iter-*/train"):
        found[str(path.relative_to(root) / "metrics.jsonl")] = read_metrics(path)
    for path in root.glob("iter-*/*/manifest.json"):
        manifest = json.loads(path.read_text("utf-8"))
        kept = {name: manifest[name] for name in ("stage", "iteration", "key", "settings", "inputs")}
        counts = {k: v for k, v in manifest["counts"].items() if k not in ("groups_per_second", "memory_gib")}
        found[str(path.relative_to(root))] = kept | ({"counts": counts} if path.parent.name != "cache" else {})
    return found


def assert_same_results(one: Path, other: Path, part: str = "") -> None:
    """Two runs made the same to the bit, or a stage of them, and nothing half done lies about in the second."""
    first, second = (
        {name: found[name] for name in found if name.startswith(part)} for found in map(results, (one, other))
    )
    if not first or first.keys() != second.keys():
        raise AssertionError(f"only in one of two: {sorted(first.keys() ^ second.keys())}")
    different = sorted(name for name in first if first[name] != second[name])
    if different:
        raise AssertionError(f"{len(different)} of {len(first)} differ: {different}")
    lying_about = [*leftovers(other), *other.glob("**/scratch"), *other.glob("**/parts"), *other.glob("**/checkpoints")]
    if lying_about:
        raise AssertionError(f"not cleared away: {lying_about}")


def titles(root: Path, pattern: str = "*/manifest.json") -> list[str]:
    """The stages that have a manifest."""
    return sorted(str(path.parent.relative_to(root)) for path in root.glob(f"iter-{pattern}"))


def states(config: RunConfig) -> dict[str, str]:
    """The state of every stage by title."""
    paths = Paths(config)
    return {status.stage.title: status.state for status in look(paths, plan_stages(config, identities(paths, {})[0]))}


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change, and bytes, of every file of a folder."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def asked(job: Job, stem: str, ids: Sequence[int]) -> str:
    """How a prompt that was answered is written down: stage, pass, ids."""
    return f"{job.stage.title}/{stem} {list(ids)}"


def record_answers(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Write down every prompt before it is answered, so that a kill does not take it along."""
    answer_prompts, answer = rollout_module.answer_prompts, Generator.answer
    now: list[tuple[Job, str]] = []

    def named(job: Job, *args: Any, stem: str, **settings: Any) -> None:
        now[:] = [(job, stem)]
        answer_prompts(job, *args, stem=stem, **settings)

    def recorded(self: Generator, prompts: Sequence[Sequence[int]], **sampling: Any) -> Any:
        with log.open("a") as file:
            file.writelines(asked(*now[0], ids) + "\n" for ids in prompts)
        return answer(self, prompts, **sampling)

    monkeypatch.setattr(rollout_module, "answer_prompts", named)
    monkeypatch.setattr(evaluate_module, "answer_prompts", named)
    monkeypatch.setattr(Generator, "answer", recorded)


def answered(root: Path) -> list[str]:
    """The prompts that stand in finished shards, as `asked` names them."""
    return [
        f"{path.parent.relative_to(root)}/{path.name.partition('-')[0]} {line['prompt_ids']}"
        for path in sorted(root.glob("iter-*/*/[a-z]*-[0-9]*.jsonl"))
        for line in lines(path)
    ]


@contextmanager
def disk_paths(root: Path) -> Iterator[list[tuple[str, str]]]:
    """Kind and path of all points that a `Crash` could end a process at, in order, while the block runs."""
    points: list[tuple[str, str]] = []
    before = storage._write, storage._fsync, storage._rename

    def of(fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root)

    def write(fd: int, data: memoryview) -> int:
        points.append(("write", of(fd)))
        return before[0](fd, data)

    def fsync(fd: int) -> None:
        points.append(("fsync", of(fd)))
        before[1](fd)

    def rename(source: Path, target: Path) -> None:
        points.append(("rename", os.path.relpath(target, root)))
        before[2](source, target)

    storage._write, storage._fsync, storage._rename = write, fsync, rename
    try:
        yield points
    finally:
        storage._write, storage._fsync, storage._rename = before


def die_at(kind: str, folder: Path) -> None:
    """From here on, the process ends at the first write of a file below `folder`, half of it written, or

    at its manifest: before the rename that makes the stage done ("rename"), or just after it ("fsync").
    """
    write, fsync, rename = storage._write, storage._fsync, storage._rename
    final = folder / storage.MANIFEST

    def dying_write(fd: int, data: memoryview) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if kind == "write" and (folder in path.parents or storage.temporary_of(folder) in path.parents):
            write(fd, data[: len(data) // 2])
            os._exit(KILLED)
        return write(fd, data)

    def dying_rename(source: Path, target: Path) -> None:
        if kind == "rename" and target == final:
            os._exit(KILLED)
        rename(source, target)

    def dying_fsync(fd: int) -> None:
        if kind == "fsync" and final.exists() and os.readlink(f"/proc/self/fd/{fd}") == str(folder):
            os._exit(KILLED)
        fsync(fd)

    storage._write, storage._fsync, storage._rename = dying_write, dying_fsync, dying_rename


def start_run(config: RunConfig, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `python -m selm_fast run` in `folder`; standard output and error come as one pipe."""
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "selm_fast", "run", str(write_recipe(config, folder / "recipe.yaml")), *arguments],
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )


def processes_in(folder: Path) -> dict[int, str]:
    """Command lines of the processes that work in a folder, by process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder.resolve()):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is another's
            continue
    return found


def parent_of(pid: int) -> int:
    """Process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def exit_code(child: int) -> int:
    """Exit code of a forked process, as `wait_for`; raises AssertionError where it does not end."""

    def ended() -> tuple[int] | None:
        pid, status = os.waitpid(child, os.WNOHANG)
        return (os.waitstatus_to_exitcode(status),) if pid else None

    (code,) = wait_until(ended, "the process does not end")
    return int(code)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition; -> its first value that is true. Raises AssertionError after `DEADLINE_S`."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{what} within {DEADLINE_S:.0f} s")
        time.sleep(0.005)
    return value
