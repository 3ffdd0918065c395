"""`benchmarks/gpu_train.py` with a CPU in the place of the GPU, a tiny model, and everything else as it is."""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_train, report
from benchmarks.train import device_model, device_steps, device_tables
from selm_fast.training.loop import Trainer
from tests.training.ranks import in_ranks

CASES = gpu_train.cases()
SMALL = replace(CASES["tiny"], steps=2, repeated=3, twice=False)
CHECKS = [
    "step-0 loss is ln 2 and rewards are 0", "steps that were not finite", "loss on repeated groups falls",
    "two runs of 2 steps have the same bits",
]  # fmt: skip


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """As in the tests of training."""


def trained(folder: Path, case: Any = SMALL) -> dict[str, Any]:
    """A part, in a process of its own, which is a world of one."""
    return in_ranks(1, lambda _: device_steps.run(case, "cpu"), folder)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(tmp_path_factory.mktemp("part"), replace(SMALL, twice=True)) | {"wrong": []}


def test_the_command_trains_and_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_train.main(["--device", "cpu", "--shape", "tiny"]) == 0
    (path,) = tmp_path.glob("gpu_train_*.json")
    result = json.loads(path.read_text("utf-8"))
    assert {"command", "commit", "date", "machine", "time", "versions"} < result.keys()
    (one,) = result["gpu_train"]["parts"]
    assert [(check["check"], check["passed"]) for check in one["checks"]] == [(name, True) for name in CHECKS]
    assert one["speed"] and not one["wrong"]
    printed = capsys.readouterr().out
    assert "| tiny | " in printed and "ln 2 to the bit" in printed
    shown = report.page([], [], report.gpu_trainings(tmp_path))
    assert "steps of large models" in shown and "\n".join(device_tables.table(result["gpu_train"])).strip() in shown


def test_a_part_holds_rates_and_memory_beside_its_estimate(part: dict[str, Any]) -> None:
    assert part["losses"][0] == math.log(2) != part["losses"][1]
    assert part["repeated"][-1] < part["repeated"][0]
    speed = part["speed"]
    for name in ("groups_per_s", "tokens_per_s", "useful_flop_per_s", "computed_flop_per_s", "step_s"):
        assert speed[name]["median"] > 0
    assert speed["groups_per_s_with_reference"] < speed["groups_per_s"]["median"]
    assert speed["computed_flop_per_s"]["median"] > speed["useful_flop_per_s"]["median"]  # checkpointing is full
    for name in ("reference pass", "step"):
        held = part["memory"][name]
        assert held["ratio"] == held["allocated"] / held["estimated"] > 0
        assert held["planned"] > held["estimated"] == sum(held["parts"].values())
    assert part["memory"]["step"]["parts"]["moments"] == 4 * part["weights"]  # two, in bf16
    assert part["waits"] is None


def test_a_loss_that_is_not_ln_2_fails_and_no_speed_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is off by a bit's worth."""
    of = device_steps.device_model.reference_of

    def off(*given: Any) -> Any:
        found = of(*given)
        return replace(found, packs=[values * (1 + 1e-12) for values in found.packs])

    monkeypatch.setattr(device_model, "reference_of", off)
    found = trained(tmp_path)
    assert [check["passed"] for check in found["checks"]] == [False, True, True]
    assert found["speed"] is None
    assert found["memory"]["step"]["allocated"] > 0
    words = gpu_train.in_words(found["checks"][0])
    assert "0.693147" in words and "expected" in words
    lines = "\n".join(device_tables.table({"parts": [found | {"wrong": [words], "targets": []}]}))
    assert "WRONG, so that no speed is shown" in lines and "| tiny |" not in lines


def test_a_wrong_value_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    wrong = part | {"speed": None, "wrong": ["the loss: found 1, expected 2"]}
    monkeypatch.setattr(gpu_train, "in_process", lambda *_: wrong)
    assert gpu_train.main(["--device", "cpu", "--shape", "tiny"]) == 1


def test_a_part_that_does_not_end_well_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(gpu_train.HIDDEN, "tiny", 0.01)
    assert gpu_train.main(["--device", "cpu", "--shape", "tiny"]) == 1
    (path,) = tmp_path.glob("gpu_train_*.json")
    (one,) = json.loads(path.read_text("utf-8"))["gpu_train"]["parts"]
    assert one["wrong"] == ["not done after 0 s"] and one["speed"] is None


@pytest.mark.slow
def test_runs_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, seeds = device_model.draw, iter(range(9))
    monkeypatch.setattr(device_model, "draw", lambda found, seed, deviation: draw(
        found, seed=seed + next(seeds), deviation=deviation))  # fmt: skip
    check = trained(tmp_path, replace(SMALL, twice=True))["checks"][-1]
    assert not check["passed"] and check["measured"] > 0
    one = torch.tensor([math.nan, 0.0])
    assert device_steps.bits_equal(one, one.clone()) and not device_steps.bits_equal(one, -one)


def test_a_loss_that_does_not_fall_and_a_lost_step_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device_steps.falling([0.5, 0.4, 0.5])["passed"]
    step = Trainer._train_step

    def broken(self: Trainer) -> bool:
        if self.position.step == 1 and len(self.plans) == 1:
            next(iter(self.masters.masters.values())).data.fill_(math.nan)
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", broken)
    found = trained(tmp_path)
    assert [check["passed"] for check in found["checks"]] == [True, False, False]
    assert found["speed"] is None


def test_what_waits_for_the_device_is_collected_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with device_steps.synchronising() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert modes == ["warn", "default"]
    assert len(found) == 1 and "test_what_waits_for_the_device" in found[0]
    assert warnings.showwarning is not None


def test_micro_batches_shrink_until_they_fit_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["8b-selective"]
    groups = device_model.groups_of(replace(case, groups=8, steps=1), None, Path())
    monkeypatch.setattr(device_steps, "memory_bytes", lambda _: 139 * 2**30)
    config, told = device_steps.fitted(case, "cuda", groups)
    assert config is not None and config.batch.max_tokens < case.max_tokens
    assert told and told[0].startswith("micro-batches of 8192 tokens: of 16384 they are estimated to take")
    whole, told = device_steps.fitted(CASES["8b"], "cuda", groups)
    assert whole is not None and whole.batch.max_tokens == 16384 and told == []
    monkeypatch.setattr(device_steps, "memory_bytes", lambda _: 79 * 2**30)
    assert device_steps.fitted(case, "cuda", groups)[0] is None
    found = device_steps.run(replace(SMALL, shape="8b", max_length=1024, groups=1), "cpu")
    assert found["speed"] is None and "not run" in found["told"][-1]


def test_targets_are_those_of_an_h200(part: dict[str, Any]) -> None:
    assert device_tables.judge(part, "a processor") == []
    speed = part["speed"] | {"computed_flop_per_s": {"median": 0.56 * 790e12}}
    held = {name: found | {"ratio": 0.95} for name, found in part["memory"].items()}
    large = part | {"shape": {"name": "8b"}, "speed": speed, "waits": [], "memory": held}
    assert [one["met"] for one in device_tables.judge(large, "NVIDIA H200")] == [True] * 4
    poor = large | {"waits": ["a"], "memory": {name: found | {"ratio": 1.2} for name, found in held.items()}}
    assert [one["met"] for one in device_tables.judge(poor, "NVIDIA H200")] == [False, False, False, True]
    wrong = device_tables.judge(large | {"speed": None}, "NVIDIA H200")[-1]
    assert (wrong["met"], wrong["why"]) == (None, "not measured")


def test_real_rows_are_cut_as_training_cuts_them(tmp_path: Path) -> None:
    from benchmarks.train.workload import make_tokenizer

    data, scratch = tmp_path / "data", tmp_path / "scratch"
    scratch.mkdir()
    make_tokenizer(40).save_pretrained(data / "tokenizer")
    row = {"prompt": "w5 w6", "chosen": "w7 " * 60, "rejected": "w8", "reference_response": "w8"}
    (data / "selm_train.jsonl").write_text(f"{json.dumps(row)}\n" * 9, "utf-8")
    case = replace(SMALL, groups=2)
    groups = device_model.groups_of(case, data, scratch)
    assert len(groups) == 8 and {len(group.prompt + group.chosen) for group in groups} == {case.max_length}
    (scratch / "tokenizer").unlink()
    with pytest.raises(ValueError, match="--data has 9 rows; tiny takes 24"):
        device_model.groups_of(replace(case, groups=6), data, scratch)


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_train.main([]) == 2
    assert capsys.readouterr().out == "gpu-train: torch sees no CUDA device here; nothing was run\n"


def test_limits_leave_it_under_nine_minutes() -> None:
    assert gpu_train.LIMIT_S <= 525
    assert sum(gpu_train.LIMITS.values()) <= gpu_train.LIMIT_S
    assert set(gpu_train.LIMITS) | set(gpu_train.HIDDEN) == set(CASES)


def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.train.device_steps", None)  # as where an import in it fails
    assert gpu_train.main(["--device", "cpu", "--shape", "tiny"]) == 2
    assert "is not installed; expected its wheel in a folder given as --wheels" in capsys.readouterr().err
    assert gpu_train.main(["--device", "cpu", "--shape", "tiny", "--wheels", str(tmp_path)]) == 2
    assert "expected a folder of .whl files" in capsys.readouterr().err
