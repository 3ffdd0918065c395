"""`benchmarks/bench_scaling.py` on tiny sizes: what it writes, and that nothing that is wrong has its time shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_scaling, measure, scaling_data, scaling_steps, scaling_sweeps
from benchmarks.scaling_sweeps import Point, make_step, slope
from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack
from selm_fast.roofline import GroupLengths, Settings, Shape, Work, flops

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
BASE = Point(groups=8, prompt=6, response=8, aliased=0.5, vocab=64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setitem(scaling_sweeps.MODELS, "cpu", SIZES)
    monkeypatch.setitem(scaling_sweeps.BASE, "cpu", BASE)
    monkeypatch.setattr(scaling_data, "PAPER_ROWS", 300)
    monkeypatch.setattr(scaling_data, "QUICK_ROWS", 600)
    monkeypatch.setattr(scaling_sweeps, "MOST_EXPONENT", 1e9)
    monkeypatch.setattr(scaling_data, "MOST_TIME_A_ROW", 1e9)
    monkeypatch.setattr(scaling_data, "MOST_OF_A_STEP", 1e9)
    monkeypatch.setitem(scaling_data.SAMPLE_ROWS, True, 32)


def bench(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the benchmark -> exit code and what it wrote."""
    out = folder / "results.json"
    code = bench_scaling.main(["--quick", "--repeats", "2", "--json", str(out), *flags])
    return code, json.loads(out.read_text("utf-8"))


def test_sweeps_say_what_was_measured_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(scaling_sweeps.SWEEPS)
    code, results = bench(tmp_path, "--only", ",".join(names))
    assert code == 0
    assert set(results) == {
        "command", "date", "time", "commit", "machine", "versions", "device", "quick", "repeats", "parts"
    }  # fmt: skip
    assert results["machine"]["threads"] == 1
    assert list(results["parts"]) == names
    for name, part in results["parts"].items():
        assert part["problems"] == []
        assert [point["x"] for point in part["points"]] == list(scaling_sweeps.SWEEPS[name].quick)
        assert set(part["slopes"]) == {"time", "wall", "flops"}
        for point in part["points"]:
            assert point["ms"]["low"] <= point["ms"]["median"] <= point["ms"]["high"]
            assert point["gflop"] > 0
    printed = capsys.readouterr().out
    assert printed.count("Slope (exponent)") == 2
    assert printed.count("Slope (change over the range") == 3
    assert "all targets met" in printed


def test_each_sweep_changes_its_own_size_alone() -> None:
    sizes = {
        "groups": {"groups"},
        "length": {"prompt", "response"},
        "prompt": {"prompt", "response"},
        "aliases": {"aliased"},
        "vocabulary": {"vocab"},
    }
    for name, sweep in scaling_sweeps.SWEEPS.items():
        assert set(sweep.quick) <= set(sweep.xs)
        points = [sweep.at(BASE, x) for x in sweep.xs]
        changed = {field for field in Point.__slots__ if len({getattr(point, field) for point in points}) > 1}
        assert changed == sizes[name]
    lengths = [scaling_sweeps.SWEEPS["prompt"].at(BASE, x) for x in (0.1, 0.9)]
    assert {point.prompt + point.response for point in lengths} == {14}


@pytest.mark.parametrize("share, count", [(0, 0), (0.25, 2), (0.5, 4), (1, 8)])
def test_so_many_explored_responses_are_the_chosen_one(share: float, count: int) -> None:
    rows = Point(groups=8, prompt=6, response=8, aliased=share, vocab=64).rows()
    assert sum(row.explored == row.chosen for row in rows) == count
    (batch,) = pack(rows)
    assert len(batch.sequence_keys) == 24 - count


def test_flops_are_those_of_the_model() -> None:
    step = make_step(BASE, "cpu", SIZES)
    lengths = [GroupLengths.of(row.prompt, (row.chosen, row.rejected, row.explored)) for row in step.rows]
    shape = Shape.from_config(SIZES | {"vocab_size": 64})
    assert step.flops == flops(shape, Work.of(lengths), Settings(head="keep")).total


def test_a_packed_step_is_its_groups_one_by_one() -> None:
    step = make_step(BASE, "cpu", SIZES)
    assert scaling_sweeps.problem(step) is None
    assert step.run() == pytest.approx(step.one_by_one(), rel=1e-5)
    assert all(weight.grad is None for weight in step.policy.parameters())


def without_a_prompt_token(groups: Sequence[TokenGroup]) -> list[PackedBatch]:
    """Packs of many groups lack a key that packs of one have."""
    (batch,) = pack(groups)
    if len(groups) > 1:
        batch.kv_index[batch.cu_seqlens_k[1]] = 1
    return [batch]


def test_a_wrong_step_has_no_time_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling_sweeps, "pack", without_a_prompt_token)
    code, results = bench(tmp_path, "--only", "groups")
    part = results["parts"]["groups"]
    assert code == 1
    assert part["points"] == []
    assert part["slopes"] == {}
    assert any("of the packed step is" in problem for problem in part["problems"])
    printed = capsys.readouterr().out
    assert "WRONG, not shown: groups 1: " in printed
    assert "CPU ms" not in printed


@pytest.mark.parametrize("exponent, code", [(1.04, 0), (1.06, 1)])
def test_a_step_s_time_must_be_linear_in_its_groups(
    exponent: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(steps: dict[str, Any], repeats: int, _: str) -> dict[str, measure.Samples]:
        taken = {x: [step.point.groups**exponent] * repeats for x, step in steps.items()}
        return {x: measure.Samples(ms, ms) for x, ms in taken.items()}

    monkeypatch.setattr(scaling_sweeps, "MOST_EXPONENT", 1.05)
    monkeypatch.setattr(measure, "interleaved", timed)
    assert bench(tmp_path, "--only", "groups,vocabulary")[0] == code
    printed = capsys.readouterr().out
    verdict = "MISSED" if code else "met"
    assert f"Target exponent of a step's time by its groups: {exponent:.4g}, at most 1.05: {verdict}" in printed
    assert printed.count("Target") == 1


def test_slopes() -> None:
    xs = [1.0, 2.0, 4.0]
    assert slope(xs, [3 * x**1.5 for x in xs], "log-log") == pytest.approx(1.5)
    assert slope(xs, [10 + 5 * x for x in xs], "linear") == pytest.approx(15 / 15)
    assert slope(xs, [30 - 5 * x for x in xs], "linear") == pytest.approx(-15 / 10)


def test_the_data_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = bench(tmp_path, "--only", "data")
    assert code == 0
    data = results["parts"]["data"]
    assert [sample["rows"] for sample in data["tokenizing"]["sample"]] == [8, 32]
    assert [plan["rows"] for plan in data["planning"]] == [300, 600]
    for plan in data["planning"]:
        assert set(plan["us_a_row"]) == {"plan", "digest", "pack"}
        seconds = sum(plan["us_a_row"].values()) / 1e6
        assert plan["share_of_a_step"] == pytest.approx(seconds * 105_600 / plan["packed_tokens_a_row"])
        assert plan["packed_rows"] % 128 == 0
    assert all(target["met"] for target in data["targets"])
    assert "share of a step at 8B speed" in capsys.readouterr().out


def test_generated_groups_are_like_ultrafeedback_s() -> None:
    groups = scaling_data.make_groups(3000)
    assert abs(np.mean([len(group.prompt) for group in groups]) / scaling_data.PROMPT - 1) < 0.1
    assert abs(np.mean([len(group.chosen) for group in groups]) / scaling_data.RESPONSE - 1) < 0.1
    assert {len(group.responses()) for group in groups if group.row_id % 3 == 0} == {3}
    assert sum(len(group.responses()) == 2 for group in groups) == 2000


def test_a_missed_target_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling_data, "MOST_OF_A_STEP", 0.0)
    code, _ = bench(tmp_path, "--only", "data")
    assert code == 1
    assert "MISSED: planning and packing, share of a step of an 8B model on 8 GPUs" in capsys.readouterr().out


def test_growth_is_found_among_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 5, 200)
    assert scaling_steps.over_the_run([0.1 * step for step in range(200)]) == pytest.approx(19.9)
    assert scaling_steps.over_the_run((noise + 0.1 * np.arange(200)).tolist()) == pytest.approx(19.9, abs=4)
    assert abs(scaling_steps.over_the_run(noise.tolist())) < 4
    assert scaling_steps.over_the_run([7.0] * 50 + [1000.0]) == 0  # one slow step is no slope


@pytest.mark.parametrize("leak, slowing", [(0, 0.0), (20_000, 0.0), (0, 0.0004)])
def test_memory_and_time_of_a_run(
    leak: int,
    slowing: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trained(steps: int, device: str, threads: int) -> tuple[list[float], list[float], list[float]]:
        assert (steps, device, threads) == (501, "cpu", 1)
        machine = [1.0 + step / 1000 for step in range(500)]  # slows down, and the fixed work with it
        warm_up = [2.0**20 * min(step, 100) for step in range(500)]
        memory = [2.0**28 + warm + leak * step for step, warm in enumerate(warm_up)]
        times = [0.02 * (1 + slowing * step) * pace for step, pace in enumerate(machine)]
        return memory, times, [0.005 * pace for pace in machine]

    def here(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(scaling_steps, "train_steps", trained)
    monkeypatch.setattr(scaling_steps.measure, "in_fresh_process", here)
    code, results = bench(tmp_path, "--only", "steps", "--steps", "501")
    steps = results["parts"]["steps"]
    assert code == (1 if leak or slowing else 0)
    assert steps["looked_at"] == 400
    assert steps["growth_bytes_a_step"] == pytest.approx(leak, rel=0.01)
    assert [target["met"] for target in steps["targets"]] == [not leak, not slowing]
    printed = capsys.readouterr().out
    assert ("MISSED: growth of memory" in printed) == bool(leak)
    assert ("MISSED: growth of a step's time" in printed) == bool(slowing)


def test_a_short_run_is_not_judged_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = [0.01 * step for step in range(1, 120)]
    monkeypatch.setattr(scaling_steps.measure, "in_fresh_process", lambda *_: ([1e8] * 119, slower, [0.01] * 119))
    found = scaling_steps.run_steps(120, "cpu")
    assert [target["target"] for target in found["targets"]] == ["growth of memory over the steps, MiB"]
    assert found["slowing_a_step"] > 0


def test_a_run_is_the_package_s_own_training() -> None:
    memory, seconds, fixed = scaling_steps.train_steps(12, "cpu", 1)
    assert (len(memory), len(seconds), len(fixed)) == (11, 11, 11)
    assert min(memory) > 2**20
    assert min(seconds) > 0
    assert min(fixed) > 0


@pytest.mark.parametrize(
    "flags", [["--only", "none"], ["--repeats", "0"], ["--steps", "3"], ["--threads", "0"]], ids=" ".join
)
def test_a_wrong_flag_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_scaling.main(flags)
    assert refused.value.code == 2
