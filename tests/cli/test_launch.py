"""`--nproc`: the command in several processes, how it ends, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selm_fast.cli import launch as launch_module
from selm_fast.cli.launch import _children, _pass_on
from selm_fast.cli.main import main
from selm_fast.config import Config
from selm_fast.errors import Refused, RunFailed

from ..training.harness import (
    REPOSITORY,
    assert_same_run,
    make_rows,
    newest_checkpoint,
    override,
    tensors_of,
    write_model,
    write_recipe,
    write_rows,
)

LAUNCHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "selm_fast", "train"]
NPROC = ["-m", "selm_fast", "train", "--nproc", "2"]


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Path]:
    """A recipe of a tiny run in `tmp_path / name`."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", make_rows(12))

    def make(name: str, **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "output_dir": tmp_path / name, "device": "cpu", "beta": 0.1, "alpha": 0.01,
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "max_prompt_length": 40},
            "batch": {"groups": 4, "max_tokens": 120}, "optim": {"lr": 1e-3}, "timeout_s": 60,
            "cache": {"dir": tmp_path / f"cache-{name}"},
        }  # fmt: skip
        return write_recipe(Config.model_validate(override(settings, changes)), tmp_path / f"{name}.yaml")

    return make


def start(how: Sequence[str], recipe: Path) -> subprocess.Popen[str]:
    """Python with these arguments and a recipe, as a command; output and errors apart."""
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *how, str(recipe)],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_launcher_and_nproc_give_the_same_bits(recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    for name, how in (("nproc", NPROC), ("launcher", LAUNCHER)):
        process = start(how, recipe_of(name))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.count("trained on 12 groups") == 1  # one speaks
        assert "Traceback" not in err
    assert_same_run(tmp_path / "nproc", tmp_path / "launcher")
    assert tensors_of(tmp_path / "nproc" / "model")


def start_until_a_step(recipe: Path) -> subprocess.Popen[str]:
    process = start(NPROC, recipe)
    assert process.stdout is not None
    assert any(line.startswith("step 3/") for line in process.stdout), process.communicate()
    return process


def training_processes(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's children, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != launcher:
                continue
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found.update(dict.fromkeys(ranks, int(path.name)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_hazard_30_a_signal_to_the_command_saves_and_exits_75(
    recipe_of: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    recipe = recipe_of("stopped", epochs=200, optim__schedule="constant", optim__lr=1e-6)
    process = start_until_a_step(recipe)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.count("run the same command to go on") == 1
    assert "Traceback" not in err
    step = int(newest_checkpoint(tmp_path / "stopped").name.removeprefix("step-"))
    assert 3 <= step < 600
    process = start(NPROC, recipe)
    assert process.stdout is not None
    assert any(f"resuming after step {step} of 600" in line for line in process.stdout)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_hazard_33_a_killed_process_ends_the_command_with_its_name(recipe_of: Callable[..., Path], rank: int) -> None:
    process = start_until_a_step(recipe_of("killed", epochs=500))
    pids = training_processes(process.pid)
    assert sorted(pids) == [0, 1]
    os.kill(pids[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: rank {rank} " in err
    assert "Run the same command to go on from the last checkpoint" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.slow
def test_a_refusal_is_told_once_and_exits_2(recipe_of: Callable[..., Path]) -> None:
    recipe = recipe_of("refused", model__path="/nowhere/at/all")
    process = start(NPROC, recipe)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("error:") == 1, err
    assert "/nowhere/at/all" in err
    assert "Traceback" not in out + err


# The same without starting anything.


class Child:
    """Takes the place of torch's launcher: what it was asked to start, and how that ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: tuple[int, int, int]) -> None:
        """failures: rank, exit code, and when."""
        self.started: list[tuple[Any, ...]] = []
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher import api

        def launched(settings: Any, program: str) -> Callable[..., None]:
            def go(*arguments: str) -> None:
                self.started.append((settings.nproc_per_node, program, *arguments))
                self.handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
                if failures:
                    found = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, code, at in failures}
                    error = ChildFailedError.__new__(ChildFailedError)
                    error.failures = found  # type: ignore[assignment]
                    raise error

            return go

        monkeypatch.setattr(api, "elastic_launch", launched)
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_command_is_started_as_it_was_given_without_nproc(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(monkeypatch)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    recipe = str(recipe_of("run"))
    assert main(["train", recipe, "--nproc", "3", "--optim.lr", "1e-4"]) == 0
    assert child.started == [(3, sys.executable, "-m", "selm_fast", "train", recipe, "--optim.lr=1e-4")]
    assert child.handlers == [_pass_on] * 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


SIGTERM = -int(signal.SIGTERM)


@pytest.mark.parametrize(
    ("failures", "code"),
    [([(1, 2, 5), (0, 2, 6)], 2), ([(0, 75, 5), (1, 75, 5)], 75), ([(0, SIGTERM, 4), (1, 2, 5)], 2)],
)
def test_all_end_as_the_first_one_did(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, failures: list[Any], code: int
) -> None:
    Child(monkeypatch, *failures)
    assert main(["train", str(recipe_of("run")), "--nproc", "2"]) == code


def test_any_other_ending_is_a_failure_with_its_rank(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one that the launcher ended, whichever is looked at first."""
    Child(monkeypatch, (0, SIGTERM, 1), (1, -9, 2), (2, 1, 3))
    assert main(["train", str(recipe_of("run")), "--nproc", "3"]) == 1
    assert "error: rank 1 " in capsys.readouterr().err


def refuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_hazard_25_what_cannot_be_started_is_refused(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Child(monkeypatch)
    recipe = str(recipe_of("run"))
    for nproc in ("0", "-1", "two"):
        refuse([recipe, "--nproc", nproc], "nproc", capsys)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refuse([recipe, "--nproc", "2", "--device", "cuda"], "no usable NVIDIA GPU: set device to cpu", capsys)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "auto"):
        refuse([recipe, "--nproc", "3", "--device", device], "this machine has 2 GPUs: give at most 2", capsys)
    monkeypatch.setenv("RANK", "0")
    refuse([recipe, "--nproc", "2"], "one of a launcher's processes already", capsys)
    assert not child.started
    monkeypatch.delenv("RANK")
    for arguments in (["--nproc", "2", "--device", "cuda"], ["--nproc", "3"]):
        assert main(["train", recipe, *arguments]) == 0
    assert [started[0] for started in child.started] == [2, 3]


def test_of_several_processes_one_tells_a_refusal_and_each_its_own_failure(
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, told in (("0", ["error: no"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)

        def refuses(config: Config) -> None:
            raise Refused("no")

        monkeypatch.setattr("selm_fast.training.run_train.train", refuses)
        assert main(["train", str(recipe_of("run"))]) == 2
        assert capsys.readouterr().err.splitlines() == told

    def fails(config: Config) -> None:
        raise RunFailed("rank 0 ended")

    monkeypatch.setattr("selm_fast.training.run_train.train", fails)
    assert main(["train", str(recipe_of("run"))]) == 1
    assert capsys.readouterr().err.splitlines() == ["error (rank 1): rank 0 ended"]


def test_a_signal_is_passed_on_to_every_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    assert {child.pid for child in children} <= set(_children())
    monkeypatch.setattr(launch_module, "_children", lambda: [child.pid for child in children] + [2**22 + 1])
    _pass_on(signal.SIGINT, None)  # one that has ended in the meantime is no error
    assert [child.wait(10) for child in children] == [SIGTERM] * 2
