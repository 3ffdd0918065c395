"""The grid: what is tuned on what, what is run once, and a stopped run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import machine
from benchmarks.exploration import __main__ as command
from benchmarks.exploration import results, work
from benchmarks.exploration.environment import make_environment
from benchmarks.exploration.experiment import run
from benchmarks.exploration.grid import DEFAULT, DEFAULT_WORLD, QUICK, ZERO_REWARD, Grid, Job, Tuned, World
from benchmarks.exploration.work import Work, rounded
from selm_fast.errors import RunFailed
from selm_fast.training.progress import Display

from .conftest import SETTINGS, TRAINING

TINY = Grid(
    worlds={
        DEFAULT_WORLD: World(about="small", settings=SETTINGS, training=replace(TRAINING, iterations=1)),
        ZERO_REWARD: World(
            about="coins", settings=replace(SETTINGS, zero_reward=True), training=replace(TRAINING, iterations=1)
        ),
    },
    tuning_seeds=(100,),
    seeds=(0, 1),
    lrs=(1e-3, 4e-3),
    tuning_alphas={"dpo": (0.0,), "selm": (0.1,), "xpo": (0.01,)},
    ablation=(0.1,),
    few=(0.1,),
    base_steps=30,
)


def worker(folder: Path, grid: Grid = TINY, sources: str = "a", workers: int = 1) -> Work:
    return Work(folder, grid, sources, workers=workers, display=Display(quiet=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("work")
    return folder, results.make(TINY, worker(folder))


def test_no_seed_is_for_tuning_and_for_reporting() -> None:
    for grid in (DEFAULT, QUICK):
        assert not set(grid.tuning_seeds) & set(grid.seeds)
        assert {job.seed for job in grid.tuning()} == set(grid.tuning_seeds)
    assert len(DEFAULT.seeds) >= 20
    with pytest.raises(ValueError, match=r"seeds \[303\] are for tuning and for reporting"):
        replace(DEFAULT, tuning_seeds=(303, 50))


def test_every_reported_run_is_there_once_on_every_seed_at_settings_the_tuning_gave() -> None:
    tuned = {"dpo": Tuned(0.0, 2e-3), "selm": Tuned(0.3, 4e-3), "xpo": Tuned(1e-2, 1e-3)}
    jobs = DEFAULT.reported(tuned)
    assert max(Counter(jobs).values()) == 1
    kinds = Counter((job.world, job.method, job.alpha, job.lr) for job in jobs)
    assert set(kinds.values()) == {len(DEFAULT.seeds)}
    assert {(DEFAULT_WORLD, method, at.alpha, at.lr) for method, at in tuned.items()} <= kinds.keys()
    assert {lr for world, method, _, lr in kinds if (world, method) == (DEFAULT_WORLD, "dpo")} == set(DEFAULT.lrs)
    assert {lr for world, method, _, lr in kinds if method != "xpo" and world != DEFAULT_WORLD} == {2e-3}
    assert {world for world, *_ in kinds} == set(DEFAULT.worlds)
    assert {method for _, method, *_ in kinds} == {
        "dpo", "selm", "selm sampled", "selm exact", "selm wrong sign", "xpo",
    }  # fmt: skip


def test_the_best_on_the_tuning_seeds_is_chosen_whatever_the_others_say() -> None:
    grid = replace(QUICK, tuning_alphas={"dpo": (0.0,), "selm": (0.1, 0.3)})
    rewards = {job: 0.1 for job in grid.tuning()}
    for seed, reward in zip(grid.tuning_seeds, (0.9, -0.2), strict=True):
        rewards[Job(DEFAULT_WORLD, "selm", 0.3, 1e-3, seed)] = reward
        rewards[Job(DEFAULT_WORLD, "dpo", 0.0, 4e-3, seed)] = 0.11
    first, second = grid.tuning_seeds
    rewards |= {Job(DEFAULT_WORLD, "dpo", 0.0, 1e-3, first): 0.5, Job(DEFAULT_WORLD, "dpo", 0.0, 1e-3, second): -0.5}
    rewards |= {Job(DEFAULT_WORLD, "selm", 0.1, 4e-3, seed): 99.0 for seed in grid.seeds}
    assert grid.choose(rewards) == {"dpo": Tuned(0.0, 4e-3), "selm": Tuned(0.3, 1e-3)}


@pytest.mark.slow
def test_processes_come_to_what_one_comes_to(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert results.make(TINY, worker(tmp_path, workers=2)) == made[1]


def test_a_line_is_what_its_run_comes_to(made: tuple[Path, dict[str, Any]]) -> None:
    folder, found = made
    job = Job(DEFAULT_WORLD, "selm", 0.1, found["tuned"]["dpo"]["lr"], 1)
    (line,) = [row for row in found["runs"] if Job(**{name: row[name] for name in Job.__slots__}) == job]
    environment = make_environment(SETTINGS, 1)
    weights = work.load_file(work.base_path(worker(folder).bases, *TINY.bases([job])[0]))
    outcome = run(
        "selm", environment, weights, alpha=0.1, lr=job.lr, seed=1, training=TINY.worlds[DEFAULT_WORLD].training
    )
    assert line["train"] == rounded(outcome.train)
    assert line["held_out"] == rounded(outcome.held_out)


def test_figures_over_seeds_are_of_all_seeds(made: tuple[Path, dict[str, Any]]) -> None:
    folder, found = made
    done, lr = worker(folder).done, found["tuned"]["dpo"]["lr"]
    (line,) = found["implicit"]
    for role in ("chosen", "rejected"):
        differences = [
            np.array(done[Job(DEFAULT_WORLD, "selm", 0.1, lr, seed)]["implicit"][role])
            - np.array(done[Job(DEFAULT_WORLD, "dpo", 0.0, lr, seed)]["implicit"][role])
            for seed in TINY.seeds
        ]
        assert line[role]["means"] == rounded([float(each.mean()) for each in differences])
        everything = np.sort(np.concatenate(differences))
        assert line[role]["sorted"][:: results.POINTS - 1] == rounded(everything[[0, -1]].tolist())
        assert line[role]["sorted"][results.POINTS // 2] == pytest.approx(np.median(everything), rel=1e-4)
    for tried in found["tuning"]:
        job = Job(**{name: tried[name] for name in Job.__slots__})
        assert tried["reward"] == done[job]["held_out"]["reward"][-1]
    for counted in found["histograms"]:
        kind = counted["method"], counted["alpha"], counted["lr"]
        of_seeds = [done[Job(DEFAULT_WORLD, *kind, seed)]["histograms"] for seed in TINY.seeds]
        assert counted["counts"] == np.sum(of_seeds, 0).tolist()
    # The optimum without any tilt is the base model, and one that is all tilt takes the best response.
    first, *_, last = found["best_policies"]
    rewards = [done[Job(DEFAULT_WORLD, "dpo", 0.0, lr, seed)]["held_out"]["reward"][0] for seed in TINY.seeds]
    assert first["kl"] == pytest.approx(0, abs=1e-12)
    assert first["reward"] == pytest.approx(np.mean(rewards), rel=1e-4)
    assert last["kl"] > 1
    assert 0.7 < last["reward"] < 1


def test_a_stopped_grid_goes_on_and_comes_to_the_same(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = made
    (runs,) = folder.glob("*/runs.jsonl")
    lines = runs.read_bytes().splitlines(keepends=True)
    began = worker(tmp_path)
    began.path.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote a line
    for path in runs.parent.glob("bases/*"):
        (began.bases / path.name).write_bytes(path.read_bytes())
    whole = began.path.read_bytes()
    began.path.write_bytes(b"".join(lines[:-1]) + lines[-1].rstrip())  # killed before it ended a line
    assert len(worker(tmp_path).done) == len(lines) - 1
    began.path.write_bytes(whole)
    again = worker(tmp_path)
    assert len(again.done) == len(lines) - 2
    done = []
    monkeypatch.setattr(Work, "_spread", lambda self, name, function, arguments, **_: (
        done.append(each) or function(each) for each in arguments
    ))  # fmt: skip
    assert results.make(TINY, again) == found
    assert len(done) == 2
    assert sorted(again.path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


@pytest.mark.slow
def test_ctrl_c_ends_a_grid_at_once_and_keeps_what_is_done(tmp_path: Path) -> None:
    """Of its parent alone, in the middle of a run: no worker may take a signal for its own and hang."""
    code = (
        "import time, _thread, threading\n"
        "from pathlib import Path\n"
        "from benchmarks.exploration import work\n"
        "from tests.exploration import test_work\n"
        "def main():\n"
        f"    made = test_work.worker(Path({str(tmp_path)!r}), workers=2)\n"
        "    def interrupt():\n"
        "        while not made.done: time.sleep(.01)\n"
        "        _thread.interrupt_main()\n"
        "    threading.Thread(target=interrupt, daemon=True).start()\n"
        "    jobs = [test_work.Job('default', 'selm', .1, 1e-4 * n, 100) for n in range(1, 99)]\n"
        "    made.do('runs', jobs)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    script = tmp_path / "stopped.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(machine.ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "KeyboardInterrupt" in ended.stderr
    assert 1 <= len(worker(tmp_path).done) < 50


def test_a_run_that_fails_is_named(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    job = Job(DEFAULT_WORLD, "selm", 0.1, -1.0, 100)
    with pytest.raises(RunFailed, match=r"Job\(world='default', .*, lr=-1.0, seed=100\): 1 validation"):
        worker(folder).do("runs", [job])


def test_other_sources_or_another_grid_use_nothing_of_what_is_there(made: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = made
    assert worker(folder).done
    assert not worker(folder, sources="b").done
    assert not worker(folder, replace(TINY, base_steps=31)).done


def test_a_results_file_holds_what_was_made_a_run_a_line(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, found = made
    path = tmp_path / "found.json"
    results.write(path, {"exploration": found})
    assert results.read(path)["exploration"] == json.loads(json.dumps(found, default=list))
    text = path.read_text("utf-8")
    assert text.count('\n   {"world"') == len(found["runs"]) + len(found["tuning"])
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a results file"):
        results.read(path)


def test_the_time_of_the_runs_is_kept_when_the_same_ones_are_read_again(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, found = made
    path = tmp_path / "found.json"
    assert command._seconds(path, found, 12.4) == 12
    assert command._seconds(path, found, None) is None
    results.write(path, {"seconds": 77, "exploration": found})
    assert command._seconds(path, found, None) == 77
    assert command._seconds(path, found | {"runs": found["runs"][:-1]}, None) is None
    assert command._seconds(path, found | {"runs": found["runs"][::-1]}, None) is None


def test_what_cannot_be_done_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--quick"], "--quick needs another --out than benchmarks/results/exploration.json"),
        (["--quick", "--out", str(results.DEFAULT_PATH.resolve())], "--quick needs another --out"),
        (["--check", "--render"], "give one of them"),
        (["--workers", "0"], "--workers is 0"),
        (["--check", "--out", str(tmp_path / "none.json")], "none.json is not there"),
        (["--rendr"], "unrecognized arguments: --rendr"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_grid_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "quick.json", tmp_path / "quick.html"
    arguments = ["--quick", "--out", str(out), "--page", str(page), "--work", str(tmp_path / "work")]
    assert command.main([*arguments, "--workers", "2"]) == 0
    assert len(results.read(out)["exploration"]["runs"]) == len(QUICK.seeds) * 12
    assert "Does it explore?" in page.read_text("utf-8")
    assert str(out) in capsys.readouterr().out
