"""A run that is killed, wherever it is, goes on with the same command and ends with the bits of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from selm_fast.config import RunConfig
from selm_fast.iteration.paths import Paths

from ..training.harness import KILLED, Crash, in_child
from .harness import MakeRun, planned, run_inline
from .runs import (
    DEADLINE_S,
    RESUMABLE,
    answered,
    assert_same_results,
    die_at,
    disk_paths,
    parent_of,
    processes_in,
    record_answers,
    start_run,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("plain_report")
STAGES = (
    "iter-0/evaluate",
    *(f"iter-{n}/{name}" for n in (1, 2) for name in ("rollout", "rank", "cache", "train", "evaluate")),
)


class Attempts:
    """One run, attempted in children until it is done; each is checked to answer no prompt that has its answer."""

    def __init__(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
        self.config, self.root, self.log = config, Paths(config).root, log
        log.touch()
        record_answers(monkeypatch, log)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()

    def child(self, crash: Crash | None = None, dies_at: tuple[str, str] | None = None) -> int:
        """Go on in a child that a `Crash` ends, or `die_at` in a stage; -> its exit code."""

        def work() -> None:
            if crash is not None:
                crash.install()
            if dies_at is not None:
                die_at(dies_at[0], self.root / dies_at[1])
            run_inline(self.config)

        finished, before = set(answered(self.root)), len(self.asked())
        code = in_child(work)
        self.check_not_asked(finished, before)
        return code

    def finish(self) -> None:
        """Go on to the end in this process."""
        finished, before = set(answered(self.root)), len(self.asked())
        run_inline(self.config)
        self.check_not_asked(finished, before)

    def check_not_asked(self, finished: set[str], before: int) -> None:
        again = finished & set(self.asked()[before:])
        assert not again, f"answered already, and again: {sorted(again)}"

    def check_whole(self, whole: Paths) -> None:
        """The bits of a run that nobody interrupted, every prompt answered, once."""
        assert_same_results(whole.root, self.root)
        found = answered(self.root)
        assert sorted(found) == sorted(answered(whole.root))
        assert len(found) == len(set(found)) == 2 * 12 + 5 + 2 * 10  # policy and base; held out: greedy, and sampled
        assert set(self.asked()) == set(found)


@pytest.mark.slow
def test_a_run_that_is_left_alone_asks_every_prompt_once(
    make_run: MakeRun, whole: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = Attempts(make_run(**RESUMABLE), monkeypatch, tmp_path / "asked")
    attempts.finish()
    attempts.check_whole(whole)
    assert len(attempts.asked()) == len(set(attempts.asked()))


def test_killed_in_every_stage_at_its_first_write_and_at_its_manifest(
    make_run: MakeRun, whole: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = Attempts(make_run(**RESUMABLE), monkeypatch, tmp_path / "asked")
    assert tuple(planned(attempts.config)) == STAGES
    for title in STAGES:
        for kind in ("write", "rename", "fsync"):
            assert attempts.child(dies_at=(kind, title)) == KILLED
            done = (attempts.root / title / "manifest.json").exists()
            assert done == (kind == "fsync")
    attempts.finish()
    attempts.check_whole(whole)


@pytest.mark.slow
def test_killed_again_and_again(
    make_run: MakeRun, whole: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each attempt gets a few writes, fsyncs and renames further on than the one before."""
    attempts = Attempts(make_run(**RESUMABLE), monkeypatch, tmp_path / "asked")
    codes = []
    while not codes or codes[-1] == KILLED:
        codes.append(attempts.child(Crash(at=(17, 19, 23)[len(codes) % 3], torn=len(codes) % 2 == 0)))
        assert len(codes) < 100, "it does not get on"
    assert codes[-1] == 0
    assert len(codes) > 24
    attempts.check_whole(whole)


def place_of(path: str) -> str:
    """The stage that a file belongs to; run.json, markers of what was begun, model and report are the driver's."""
    parts = path.replace(".tmp-", "").split("/")
    title = "/".join(parts[:2])
    return title if title in STAGES else "driver"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["driver", *STAGES])
def test_killed_at_every_write_and_rename(
    place: str, make_run: MakeRun, whole: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted = make_run("counted", **RESUMABLE)
    with disk_paths(Paths(counted).root) as points:
        run_inline(counted)
    assert_same_results(whole.root, Paths(counted).root)
    here = [n for n, (kind, path) in enumerate(points, 1) if kind != "fsync" and place_of(path) == place]
    assert len(here) >= 4
    for at in here:
        with monkeypatch.context() as patch:
            attempts = Attempts(make_run("killed", **RESUMABLE), patch, tmp_path / f"asked-{at}")
            assert attempts.child(Crash(at, torn=True)) == KILLED
            attempts.finish()
            attempts.check_whole(whole)
        shutil.rmtree(attempts.root)


# A ranker that waits as long as there is a file.
HOLDING = """
import os, time
import the_ranker

def score(prompts, candidates):
    open(__file__ + ".reached", "w").close()
    while os.path.exists(__file__ + ".hold"):
        time.sleep(0.01)
    return the_ranker.score(prompts, candidates)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[RunConfig], subprocess.Popen[str]]]:
    """Starts the command; none is left behind by a test that fails."""
    started: list[subprocess.Popen[str]] = []

    def start(config: RunConfig) -> subprocess.Popen[str]:
        started.append(start_run(config, tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_three_real_kills(
    make_run: MakeRun, start: Callable[[RunConfig], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """SIGKILL to the command, to the process behind it, and to the one that trains: nothing outlives the command."""
    ranker = tmp_path / "holding.py"
    ranker.write_text(HOLDING, "utf-8")
    hold, reached = (ranker.with_name(f"holding.py.{name}") for name in ("hold", "reached"))
    settings = RESUMABLE | {"ranker": "python:holding:score", "epochs": 30, "checkpoint__keep": 2}
    alone = make_run("alone", **settings)
    run_inline(alone)
    config = make_run("killed", **settings)
    root = Paths(config).root

    hold.touch()
    for victim in ("command", "worker"):
        reached.unlink(missing_ok=True)
        process = start(config)
        # In iteration 0 already the ranker is asked.
        wait_until(reached.exists, "the ranker is not reached")
        members = find_members(process.pid, tmp_path)
        assert set(members) == {"command", "worker", "stage", "ranker"}
        os.kill(members[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == (-signal.SIGKILL if victim == "command" else 1), output
        if victim == "worker":
            assert "error: the process that starts the stages was killed by SIGKILL" in output
        wait_until(lambda: not processes_in(tmp_path), "processes of the run are still there")
    hold.unlink()

    process = start(config)
    wait_until((root / "iter-1/train/checkpoints/step-00000003").exists, "training does not come to step 3")
    os.kill(find_members(process.pid, tmp_path)["stage"], signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, output
    log = root / "iter-1/logs/train.log"
    assert "error: iter-1/train failed: its process was killed by SIGKILL" in output
    assert f"(log: {log})" in output
    wait_until(lambda: not processes_in(tmp_path), "processes of the run are still there")
    assert list((root / "iter-1/train/checkpoints").glob("step-*"))
    assert not (root / "iter-1/evaluate").exists()

    process = start(config)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert_same_results(Paths(alone).root, root)


def find_members(command: int, folder: Path) -> dict[str, int]:
    """The processes of a run by what they are."""
    everyone = processes_in(folder)

    def children(parent: int, what: str) -> Sequence[int]:
        return [pid for pid, line in everyone.items() if parent_of(pid) == parent and what in line]

    found = {"command": command}
    for name, parent, what in (
        ("worker", "command", "selm_fast.iteration.worker"),
        ("stage", "worker", "selm_fast.iteration.worker"),
        ("ranker", "stage", "scorer_worker"),
    ):
        if parent in found and (pids := children(found[parent], what)):
            (found[name],) = pids
    return found
