"""Stages in processes of their own: sharing work, stopped by signals, failing, and started from a script."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from selm_fast.cli.main import main
from selm_fast.config import RunConfig
from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration import launch, worker
from selm_fast.iteration import run as run_module
from selm_fast.iteration.candidates import NOT_SCORED
from selm_fast.iteration.job import Job
from selm_fast.iteration.launch import Processes
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import PARALLEL
from selm_fast.iteration.run import drive, run
from selm_fast.training import storage
from selm_fast.training.progress import Display
from selm_fast.training.signals import StopFlag

from ..training.harness import KILLED, REPOSITORY, in_child, start_child, write_recipe
from . import harness
from .harness import RANKER, MakeRun, planned, run_inline
from .runs import RESUMABLE, assert_same_results, contents, die_at, exit_code, processes_in, states, wait_until

pytestmark = pytest.mark.usefixtures("plain_report")


@pytest.fixture(autouse=True)
def like_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is started computes on one thread, finds this package, and works in a folder that tells it from others."""
    for name, value in {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",  # a module that is written again within a second is read again
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def others_here() -> dict[int, str]:
    """The processes that a test has started and that are still there."""
    return {pid: line for pid, line in processes_in(Path.cwd()).items() if pid != os.getpid()}


def keys_of(folder: Path) -> list[bytes]:
    """The sequences whose reference log-probs are in the shards of a cache."""
    shards = [safetensors.torch.load(path.read_bytes()) for path in sorted(folder.rglob("shard-*.safetensors"))]
    return [row.numpy().tobytes() for shard in shards for row in shard["keys"]]


def test_two_processes_share_the_work_and_the_result_is_that_of_one(
    make_run: MakeRun, whole: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(**RESUMABLE)
    root = Paths(config).root
    named: dict[tuple[str, int], list[str]] = {}
    cached: dict[tuple[str, int], list[bytes]] = {}
    do_part, rename = harness.do_part, storage._rename

    def noted(job: Job) -> None:
        names = named[job.stage.title, job.index] = []

        def noted_rename(source: Path, target: Path) -> None:
            names.append(target.name)
            rename(source, target)

        storage._rename = noted_rename
        try:
            do_part(job)
        finally:
            storage._rename = rename
        if job.stage.name == "cache":
            cached[job.stage.title, job.index] = keys_of(job.folder / "parts" / str(job.index))

    monkeypatch.setattr(harness, "do_part", noted)
    run_inline(config, processes=2)
    assert_same_results(whole.root, root)
    parallel = {title for title, stage in planned(config).items() if stage.name in PARALLEL}
    assert {title for title, index in named if index == 1} == parallel
    for number in (1, 2):
        folder = root / f"iter-{number}"
        first, second = (named[f"iter-{number}/rollout", index] for index in (0, 1))
        assert first and second
        assert sorted(first + second) == sorted(path.name for path in (folder / "rollout").glob("*.jsonl"))
        first, second = (named[f"iter-{number}/rank", index] for index in (0, 1))
        # 6 prompts of the portion and 5 held out, 2 in a chunk
        assert first == ["rows-00000", "rows-00002", "held_out-00001"]
        assert second == ["rows-00001", "held_out-00000", "held_out-00002"]
        keys = [cached[f"iter-{number}/cache", index] for index in (0, 1)]
        assert all(keys)
        assert sorted(keys[0] + keys[1]) == sorted(keys_of(whole.root / f"iter-{number}/cache"))
        assert len(set(keys[0] + keys[1])) == len(keys[0] + keys[1])
        for name in PARALLEL:
            assert json.loads((folder / name / "manifest.json").read_text())["processes"] == 2


def test_a_run_goes_on_with_another_number_of_processes(make_run: MakeRun, whole: Paths) -> None:
    config = make_run(**RESUMABLE)
    root = Paths(config).root

    def killed(kind: str, title: str, processes: int) -> None:
        def work() -> None:
            die_at(kind, root / title)
            run_inline(config, processes=processes)

        assert in_child(work) == KILLED

    killed("rename", "iter-1/rollout", 2)
    killed("write", "iter-1/rank", 3)
    killed("rename", "iter-1/rank", 2)
    killed("write", "iter-1/cache/parts/1", 3)
    killed("write", "iter-2/cache/parts/1", 2)
    run_inline(config)
    assert_same_results(whole.root, root)


def test_a_process_for_each_gpu_is_the_default(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker says how many there are once it has imported torch, which takes longer than one look at its pipe."""
    event = '{"event": "ready", "gpus": 3}'
    ready = f"import sys, time; time.sleep(0.3); print({event!r}, flush=True); sys.stdin.read()"
    monkeypatch.setattr(launch, "_WORKER", (sys.executable, "-c", ready))
    for overrides, rollouts, ranks in (
        ({"device": "auto"}, 3, 3),
        ({"device": "auto", "processes": 2}, 2, 2),
        ({"device": "auto", "processes": 7}, 7, 3),
        ({"device": "cpu"}, 1, 1),
        ({"device": "cpu", "processes": 2}, 2, 1),
    ):
        config = make_run(**overrides)
        with launched(config, tmp_path) as (launcher, _):
            stages = planned(config)
            assert launcher.parts(stages["iter-1/train"]) == ranks
            assert launcher.parts(stages["iter-1/rollout"]) == rollouts


@pytest.mark.parametrize(
    ("visible", "gpus", "taken"),
    [
        (None, 3, ["0", "1", "2", "0"]),  # as CUDA numbers them, whatever the files in /dev are called
        ("2,3", 2, ["2", "3", "2", "3"]),
        ("MIG-a,MIG-b", 2, ["MIG-a", "MIG-b", "MIG-a", "MIG-b"]),
        ("1,7,9", 2, ["1", "7", "1", "7"]),
        ("", 0, ["", "", "", ""]),  # hidden on purpose
        (None, 0, [None, None, None, None]),
    ],
)
def test_each_process_takes_a_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, taken: list[str | None]
) -> None:
    found = []
    for index in range(4):
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
            if visible is None:
                patch.delenv("CUDA_VISIBLE_DEVICES")
            worker._take_gpu(index, gpus)
            found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert found == taken


def test_gpus_are_counted_in_a_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML cannot tell how many there are, counting them makes CUDA unusable in forks."""
    asked = []

    def count() -> int:
        asked.append(True)
        return 3

    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert worker._gpus() == 3
    assert not asked  # not here
    monkeypatch.setattr(torch.cuda, "device_count", lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert worker._gpus() == 0


def test_an_event_goes_through_a_pipe_in_one_piece_however_long_its_text_is() -> None:
    reader, writer = os.pipe()
    for text in ("short", "\N{SNOWMAN}\n" * 5000):
        worker._emit(writer, {"event": "say", "index": 0, "text": text})
        data = os.read(reader, 1_000_000)
        assert len(data) <= select.PIPE_BUF  # or other processes' events may come in between
        event = json.loads(data)
        assert data.endswith(b"\n") and text.startswith(event["text"])
        assert len(event["text"]) >= min(len(text), 500)
    os.close(reader)
    os.close(writer)


NOTING = """
import os
inner = score

def score(prompts, candidates):
    with open(__file__ + ".parents", "a") as log:
        log.write(f"{os.getppid()}\\n")
    return inner(prompts, candidates)
"""
SCRIPT = """
import json
from pathlib import Path
from selm_fast import RunConfig, run
from selm_fast.iteration import launch

# Two GPUs that are not there: what trains together does so on the CPU.
two = "from selm_fast.iteration import worker; worker._gpus = lambda: 2; worker.main()"
launch._WORKER = (launch._WORKER[0], "-c", two)
result = run(RunConfig.model_validate_json(Path("settings.json").read_text()))
print(json.dumps([str(result.model_dir), str(result.report), sorted(result.iterations)]))
"""


def test_a_script_runs_a_recipe_on_two_gpus(make_run: MakeRun, whole: Paths, tmp_path: Path) -> None:
    """No `if __name__ == "__main__"`; the ranker lies beside the script, which is somewhere else.

    Training takes both, and the cache is made for it: the first step is exact, as in one process.
    """
    scripts, here = tmp_path / "scripts", tmp_path / "here"
    scripts.mkdir()
    here.mkdir()
    (scripts / "script.py").write_text(SCRIPT, "utf-8")
    (tmp_path / "the_ranker.py").unlink()
    (scripts / "the_ranker.py").write_text(RANKER + NOTING, "utf-8")
    config = make_run(**RESUMABLE, device="auto", iterations=1, portions=2)
    (here / "settings.json").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), "utf-8")
    done = subprocess.run(
        [sys.executable, str(scripts / "script.py")], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    root = Paths(config).root
    for name in ("iter-0/evaluate/policy-00000.jsonl", "iter-1/rank/rows.jsonl", "iter-1/rank/held_out.jsonl"):
        if torch.cuda.is_available():
            break  # what one GPU answers is not what a CPU does
        assert (root / name).read_bytes() == (whole.root / name).read_bytes()
    assert json.loads(done.stdout.splitlines()[-1]) == [str(root / "model"), str(root / "report.html"), [0, 1]]
    assert "<html" in (root / "report.html").read_text("utf-8")
    # Each stage that scores has a process of its own: two evaluations, and two processes for the ranking.
    assert len(set((scripts / "the_ranker.py.parents").read_text().split())) == 2 + 2
    for stage in ("cache", "train"):
        assert json.loads((root / f"iter-1/{stage}/manifest.json").read_text())["processes"] == 2
    kept = {path.name for path in (root / "iter-1/train/masters").glob("weights-*")}
    assert kept == {"weights-00000-00001.safetensors", "weights-00001-00001.safetensors"}
    lines = [json.loads(line) for line in (root / "iter-1/train/metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == math.log(2)
    assert "another plan" not in (root / "iter-1/logs/train.log").read_text()


# A worker whose stages wait, where a test wants them to, until they have heard a signal.
WAITING = """
import os, signal, time
from pathlib import Path
from selm_fast.iteration import generate, rank, worker
from selm_fast.training import loop

where, folder = os.environ["TEST_WAIT"], Path(os.environ["TEST_FOLDER"])
answer, train_step, score = generate.Generator.answer, loop.Trainer._train_step, rank._scores
work, quiet = worker._work, worker._quiet_transformers
now = {}

def wait():
    (folder / f"reached-{now['index']}").write_text(str(os.getpid()))
    hear_signal()
    if now["index"] == 1:  # until the other process has stopped, and longer: it is asked to stop a second time then
        other = int((folder / "reached-0").read_text())
        while os.path.exists(f"/proc/{other}"):
            time.sleep(0.01)
        time.sleep(0.3)

def hear_signal():
    end = time.monotonic() + 300
    while getattr(signal.getsignal(signal.SIGTERM), "__self__", None) is not None:  # a StopFlag's own, until it is set
        assert time.monotonic() < end
        time.sleep(0.01)

def waiting_answer(self, prompts, **sampling):
    now["answers"] = now.get("answers", 0) + 1
    if where == "rollout" == now["stage"] and now["answers"] == 2 - now["index"]:
        wait()
    return answer(self, prompts, **sampling)

def waiting_step(self):
    if where == "train" and self.position.step == 0:
        wait()
    return train_step(self)

def failing_score(*given):
    if where == "rank" and now["index"] == 0:
        raise RuntimeError("the first one fails")
    if where == "rank":
        hear_signal()
    return score(*given)

def noted_work(request, index, events):
    now.update(index=index, stage=request["stage"]["stage"])
    return work(request, index, events)

def signalled():
    if where == "before it listens":
        os.kill(os.getpid(), signal.SIGTERM)
    quiet()

generate.Generator.answer, loop.Trainer._train_step = waiting_answer, waiting_step
worker._work, worker._quiet_transformers, rank._scores = noted_work, signalled, failing_score
worker.main()
"""


@pytest.fixture
def start_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[RunConfig, str], int]]:
    """Starts the command in a child, its stages waiting somewhere; -> its process id; what it says goes to `output`."""
    started = []

    def start(config: RunConfig, where: str) -> int:
        monkeypatch.setattr(launch, "_WORKER", (sys.executable, "-c", WAITING))
        monkeypatch.setenv("TEST_WAIT", where)
        monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
        recipe = write_recipe(config, tmp_path / "recipe.yaml")

        def work() -> int:
            with (tmp_path / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
                return main(["run", str(recipe)])

        started.append(start_child(work))
        return started[-1]

    yield start
    for pid in started:
        with suppress(ChildProcessError):  # it was waited for
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("where", "number"),
    [("rollout", signal.SIGTERM), pytest.param("train", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_stops_a_run_with_everything_saved(
    where: str, number: signal.Signals, start_waiting: Callable[[RunConfig, str], int], make_run: MakeRun,
    whole: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    config = make_run(**RESUMABLE, processes=2)
    root = Paths(config).root
    parts = (0, 1) if where == "rollout" else (0,)
    driver = start_waiting(config, where)
    wait_until(lambda: all((tmp_path / f"reached-{index}").exists() for index in parts), f"{where} is not reached")

    monkeypatch.setattr(run_module, "_LOCK_S", 0.2)
    before = states(config)
    with pytest.raises(Refused, match=f"another process is at work in {root}: wait for it"):
        run(config)
    assert states(config) == before

    os.kill(driver, number)
    assert exit_code(driver) == 75, (tmp_path / "output").read_text()
    wait_until(lambda: not others_here(), "processes of the run are still there")
    told = {"rollout": "stopped in iter-1/rollout; ", "train": "stopped after step 1 of 2; "}[where]
    assert f"stopped: {told}" in (tmp_path / "output").read_text()
    assert states(config)[f"iter-1/{where}"] == "begun"
    saved = contents(root / "iter-1" / where)
    if where == "rollout":
        # The first process was stopped in its second shard, the other in its first: both were finished and written.
        shards = {"policy-00000.jsonl", "policy-00001.jsonl", "policy-00002.jsonl"}
        assert shards == {Path(path).name for path in saved}
    else:
        assert [path.name for path in (root / "iter-1/train/checkpoints").iterdir()] == ["step-00000001"]
    run_inline(config, until=where)
    assert_same_results(whole.root, root, f"iter-1/{where}")
    if where == "rollout":
        assert saved.items() <= contents(root / "iter-1" / where).items()


@pytest.mark.slow
def test_a_signal_that_comes_before_a_stage_listens_is_heard(
    start_waiting: Callable[[RunConfig, str], int], make_run: MakeRun, tmp_path: Path
) -> None:
    driver = start_waiting(make_run(**RESUMABLE), "before it listens")
    assert exit_code(driver) == 75, (tmp_path / "output").read_text()
    assert "stopped: stopped in iter-0/evaluate" in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_when_one_process_fails_the_others_are_asked_to_stop(
    start_waiting: Callable[[RunConfig, str], int], make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(**RESUMABLE, processes=2)
    driver = start_waiting(config, "rank")
    assert exit_code(driver) == 1, (tmp_path / "output").read_text()
    assert "error: iter-1/rank failed: RuntimeError: the first one fails (log: " in (tmp_path / "output").read_text()
    log = Paths(config).root / "iter-1/logs/rank.log"
    assert "Stopped: stopped in iter-1/rank; what is ranked is saved" in log.read_text("utf-8")


@contextmanager
def launched(config: RunConfig, folder: Path) -> Iterator[tuple[Processes, Callable[..., Any]]]:
    """The launcher of a run, and what drives a run through it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    display = Display(quiet=True)
    with StopFlag() as stop, Processes(Paths(config), display, stop, lock=lock) as launcher:

        def go(until: str | None = None) -> None:
            drive(launcher._paths, launcher, display, stop, until=until, redo=False)

        yield launcher, go
    os.close(lock)


RAISES_IN_ONE = """
import os
inner = score

def score(prompts, candidates):
    try:
        os.close(os.open(__file__ + ".raises", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return inner(prompts, candidates)
    raise ValueError("broken")
"""
KILLS_THE_STAGE = """
import os, signal

def score(prompts, candidates):
    os.kill(os.getppid(), signal.SIGKILL)
"""
GIVES_NAN = """
def score(prompts, candidates):
    return [[float("nan")] * len(texts) for texts in candidates]
"""
PREPARES = """
import shutil
from pathlib import Path

def prepare(folder, seed):
    shutil.copytree({model!r}, folder / "model")
    shutil.copyfile({train!r}, folder / "train.jsonl")
    shutil.copyfile({eval!r}, folder / "eval.jsonl")
"""


def test_a_stage_that_fails_stops_the_run_which_goes_on_once_the_cause_is_gone(
    make_run: MakeRun, whole: Paths, tmp_path: Path
) -> None:
    config = make_run(**RESUMABLE, processes=2)
    root = Paths(config).root
    run_inline(config, until="rollout")
    answers = contents(root / "iter-1/rollout")
    log = root / "iter-1/logs/rank.log"
    ranker, preparation = tmp_path / "the_ranker.py", tmp_path / "preparing.py"
    with launched(config, tmp_path) as (launcher, go):
        for source, kind, reason, in_log in (
            (GIVES_NAN, RunFailed, "none of 6 prompts gave a pair to train on:\n        6  " + NOT_SCORED, NOT_SCORED),
            ("", Refused, "the_ranker.py) has no 'score'", "has no 'score'"),
            (RANKER + RAISES_IN_ONE, RunFailed, "ranker python:the_ranker:score raised an error", "ValueError: broken"),
            (
                KILLS_THE_STAGE,
                RunFailed,
                "its process was killed by SIGKILL (the kernel does that where memory runs out)",
                "",
            ),
        ):
            ranker.write_text(source, "utf-8")
            with pytest.raises(kind) as caught:
                go()
            message = str(caught.value)
            assert message.startswith("iter-1/rank" + (" failed: " if kind is RunFailed else ": "))
            assert reason in message
            assert f"(log: {log})" in message
            assert in_log in log.read_text("utf-8")
            assert states(config)["iter-1/rank"] == "begun"
            assert not (root / "iter-1/cache").exists()
            assert not (root / "iter-1/started/cache.json").exists()

        # The same worker serves another run: one that prepares its model and rows first.
        nothing = dict.fromkeys(("model__path", "data__train", "data__eval"))
        prepared = make_run("prepared", **RESUMABLE, prepare="python:preparing:prepare", **nothing)
        launcher._paths = Paths(prepared)
        log = Paths(prepared).root / "iter-0/logs/prepare.log"
        for source, reason in (
            (None, "python:preparing:prepare cannot be loaded: No module named 'preparing'"),
            ("x = 1", "python:preparing:prepare cannot be loaded: module 'preparing' has no attribute 'prepare'"),
            ("def prepare(folder, seed):\n    1 / 0", "ZeroDivisionError: division by zero"),
            ("def prepare(folder, seed):\n    pass", "did not write model and train.jsonl and eval.jsonl into "),
        ):
            if source is not None:
                preparation.write_text(source, "utf-8")
            with pytest.raises(RunFailed) as caught:
                go()
            assert str(caught.value).startswith("prepare failed: ")
            assert reason in str(caught.value)
            assert f"(log: {log})" in str(caught.value)
            assert not (Paths(prepared).root / "iter-0/evaluate").exists()
        preparation.write_text(PREPARES.format(model=config.model.path, train=config.data.train, eval=config.data.eval))
        ranker.write_text(RANKER, "utf-8")
        go("rollout")
    assert not others_here()
    assert sorted(path.read_bytes() for path in (Paths(prepared).root / "iter-1/rollout").glob("*-*.jsonl")) == sorted(
        path.read_bytes() for path in (root / "iter-1/rollout").glob("*-*.jsonl")
    )
    assert contents(root / "iter-1/rollout") == answers
    run_inline(config, until="rank")
    assert_same_results(whole.root, root, "iter-1/rank")
