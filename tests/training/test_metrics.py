"""Metrics and progress: what is written, under which names, and what a person sees."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selm_fast.errors import Refused
from selm_fast.model import Policy
from selm_fast.ops.preference_loss import METRICS
from selm_fast.training import metrics, progress
from selm_fast.training.metrics import TIMINGS, MetricsLog, mean
from selm_fast.training.pending import Pending, StepRecord
from selm_fast.training.progress import Display
from selm_fast.training.run_train import train

from .harness import ALONE, Live, MakeConfig, groups_of, make_rows, own_logp, own_model, read_metrics, run

ROWS = make_rows(9, seed=71, duplicates=1)
PREFERENCE = {
    "loss", "loss/preference", "loss/exploration", "rewards/chosen", "rewards/rejected", "rewards/explored",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logps/explored",
}  # fmt: skip
STEP = {
    "step", "epoch", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "groups_per_second", "memory_gib",
}  # fmt: skip


def strict(line: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity, no name twice."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    return json.loads(line, parse_constant=refuse, object_pairs_hook=unique)


def test_every_name_of_the_contract_is_there(make_config: MakeConfig, eval_file: str) -> None:
    config = make_config(data__eval=eval_file, eval_every=1)
    trace = run(config, ROWS)
    lines = [strict(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert len(lines) == len(steps) + len(evaluations) == 3 + 4
    for line in steps:
        assert line.keys() >= PREFERENCE | STEP
    for line in evaluations:
        assert {f"eval_{name}" for name in PREFERENCE} | {"step"} <= line.keys()
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines == trace.lines  # `on_log` sees what the file gets


def test_values_of_the_step_lines(make_config: MakeConfig) -> None:
    config = make_config(epochs=2, optim__schedule="linear", optim__max_grad_norm=1e9)
    trace = run(config, ROWS)
    groups = groups_of(config, ROWS)
    tokens = sum(group.num_tokens() for group in groups)
    assert [line["step"] for line in trace.steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in trace.steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert trace.steps[2]["num_tokens"] == tokens
    assert trace.steps[5]["num_tokens"] == 2 * tokens
    assert [line["learning_rate"] for line in trace.steps] == pytest.approx([1e-3 * (1 - k / 6) for k in range(6)])
    for line in trace.steps:
        assert line["tokens_per_second"] > line["groups_per_second"] > 0
        assert 0.01 < line["memory_gib"] < 1000
        assert line["grad_norm"] > 0
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
        assert line["loss"] == pytest.approx(line["loss/preference"] + line["loss/exploration"])


def test_values_of_an_evaluation_are_the_formula_in_float64(make_config: MakeConfig, eval_file: str) -> None:
    """Means over held-out groups, at the end of training, by the models' own forwards, a sequence at a time."""
    config = make_config(data__eval=eval_file, alpha=0.5)
    evaluation = run(config, ROWS).evaluations[-1]
    policy = own_model(config.output_dir / "model", torch.float64)
    reference = own_model(str(config.model.path), torch.float64)
    rows = [json.loads(line) for line in Path(eval_file).read_text().splitlines()]
    values: dict[str, list[float]] = {name: [] for name in PREFERENCE}
    for group in groups_of(config, rows):
        with torch.no_grad():
            logps, ratios = {}, {}
            for name in ("chosen", "rejected", "explored"):
                response = getattr(group, name)
                if response is not None:
                    logps[name] = own_logp(policy, group.prompt, response).item()
                    ratios[name] = logps[name] - own_logp(reference, group.prompt, response).item()
        margin = config.beta * (ratios["chosen"] - ratios["rejected"])
        preference = math.log1p(math.exp(-margin))
        exploration = config.exploration_weight * ratios.get("explored", 0.0)
        values["loss"].append(preference + exploration)
        values["loss/preference"].append(preference)
        values["loss/exploration"].append(exploration)
        values["rewards/margins"].append(margin)
        values["rewards/accuracies"].append(float(margin > 0))
        for name, logp in logps.items():
            values[f"logps/{name}"].append(logp)
            values[f"rewards/{name}"].append(config.beta * ratios[name])
    assert len(values["rewards/explored"]) < len(values["rewards/chosen"])  # some have none, and are left out
    for name, found in values.items():
        assert evaluation[f"eval_{name}"] == pytest.approx(sum(found) / len(found), rel=1e-4, abs=1e-5), name


def test_evaluation_leaves_training_as_it_was(make_config: MakeConfig, eval_file: str, live: Live) -> None:
    run(make_config("without"), ROWS)
    run(make_config("with", data__eval=eval_file, eval_every=1), ROWS)
    folder = make_config().output_dir.parent
    with_steps = [line for line in read_metrics(folder / "with") if "loss" in line]
    assert with_steps == read_metrics(folder / "without")
    assert live.trainer is not None
    assert live.trainer.policy.training
    assert all(weight.grad is None for weight in live.trainer.policy.parameters())


def test_train_returns_the_evaluations_by_step(make_config: MakeConfig, eval_file: str) -> None:
    config = make_config(data__eval=eval_file, eval_every=2)
    result = train(config, rows=ROWS)
    assert sorted(result.evaluations) == [0, 2, 3]
    assert result.steps == 3
    assert result.output_dir == config.output_dir
    assert result.model_dir == config.output_dir / "model"


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_logging_seldom_loses_no_line(make_config: MakeConfig, every: int) -> None:
    config = make_config(f"every-{every}", epochs=2, log__every=every)
    run(config, ROWS)
    run(make_config("every-step", epochs=2), ROWS)
    assert read_metrics(config.output_dir) == read_metrics(config.output_dir.parent / "every-step")


@pytest.mark.parametrize("method", ["dpo", "selm"])
def test_what_no_group_has_is_null(make_config: MakeConfig, method: str) -> None:
    """Steps of one group: some have no explored response."""
    config = make_config(method=method, alpha=0.0 if method == "dpo" else 0.1, batch__groups=1)
    trace = run(config, ROWS)
    lines = [strict(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    missing = [line["rewards/explored"] is None for line in lines]
    assert missing == [math.isnan(line["rewards/explored"]) for line in trace.steps]
    assert all(missing) if method == "dpo" else 0 < sum(missing) < len(missing)
    assert all(line["loss/exploration"] is not None for line in lines)


def test_lines_can_be_read_while_the_run_goes_on(make_config: MakeConfig, eval_file: str) -> None:
    config = make_config(data__eval=eval_file)
    seen: list[dict[str, Any]] = []

    def look(line: dict[str, Any]) -> None:
        seen.append(line)
        assert [strict(text) for text in (config.output_dir / "metrics.jsonl").read_text().splitlines()] == seen

    train(config, rows=ROWS, on_log=look)
    assert len(seen) == 5


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": 5e-324, "f": 3})
    log.close()
    expected = {"step": 1, "a": None, "b": None, "c": None, "d": 0.1, "e": 5e-324, "f": 3}
    assert strict((tmp_path / "metrics.jsonl").read_text()) == expected


def test_lines_after_the_place_to_go_on_from_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"step": 1})
    length = log.sync()
    assert length == (tmp_path / "metrics.jsonl").stat().st_size
    log.write({"step": 2})
    log.close()
    log = MetricsLog(tmp_path, tensorboard=False, length=length)
    log.write({"step": 2, "again": True})
    assert log.sync() > length
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'


def test_lost_metrics_leave_no_hole_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log = MetricsLog(tmp_path, tensorboard=False, length=1000)
    log.write({"step": 9})
    log.close()
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 9]


@given(st.floats(-1e6, 1e6), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 3))
def test_mean_of_equal_values_is_that_value(value: float, sizes: list[int], nans: int) -> None:
    parts = [torch.full((size,), value, dtype=torch.float64) for size in sizes]
    parts.insert(0, torch.full((nans,), math.nan, dtype=torch.float64))
    assert mean(parts).item() == value


@given(st.lists(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), min_size=1), min_size=1, max_size=5))
def test_mean_weighs_every_group_alike(parts: list[list[float]]) -> None:
    found = mean([torch.tensor(part, dtype=torch.float64) for part in parts])
    there = [value for part in parts for value in part if not math.isnan(value)]
    assert found.dtype == torch.float64
    if there:
        assert found.item() == pytest.approx(math.fsum(there) / len(there), rel=1e-9, abs=1e-9)
    else:
        assert math.isnan(found.item())


def test_pending_metrics_are_means_over_all_groups_of_a_step() -> None:
    """Each metric by its name, each group weighed alike, whatever steps it waited with."""
    pending, record = Pending(), StepRecord(1, 0.5, 1e-3, 10, 10, 3, 1e9, [0, 1, 2])
    first = torch.arange(33, dtype=torch.float64).view(11, 3)
    pending.add(record, first, torch.tensor(2.0))
    pending.add(record, torch.full((11, 1), torch.nan, dtype=torch.float64), torch.tensor(torch.inf))
    (one, other), memory = pending.take(ALONE, 0.5)
    assert memory == 0.5
    assert {name: one.metrics[name] for name in METRICS} == dict(zip(METRICS, first.mean(1).tolist(), strict=True))
    assert one.metrics["grad_norm"] == 2.0
    assert not one.is_bad
    assert other.is_bad
    assert math.isnan(other.metrics["loss"])
    assert not pending.steps


@pytest.mark.parametrize("interrupted", [False, True])
def test_tensorboard_gets_the_same_numbers(make_config: MakeConfig, eval_file: str, interrupted: bool) -> None:
    """Once each, also where steps are run again after an interruption."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(log__tensorboard=True, data__eval=eval_file, epochs=2)

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            train(config, rows=ROWS, on_log=interrupt)
    run(config, ROWS)
    events = EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    lines = read_metrics(config.output_dir)
    names = {name for line in lines for name in line} - {"step"}
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        written = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)] == written


def test_tensorboard_that_is_not_installed_is_refused_before_any_work(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, reference_forwards: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = make_config(log__tensorboard=True)
    with pytest.raises(Refused, match=r"pip install 'selm_fast\[tensorboard\]'"):
        run(config, ROWS)
    assert not config.output_dir.exists()
    assert not reference_forwards


def test_tensorboard_is_off_where_it_is_not_asked_for(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = make_config()
    run(config, ROWS)
    assert not (config.output_dir / "tensorboard").exists()


# Progress.


def test_plain_lines_where_there_is_no_terminal(
    make_config: MakeConfig, eval_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run(make_config(data__eval=eval_file), ROWS)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    assert re.fullmatch(r"rows: 9 of 9 rows used, \d+ packed tokens", lines[0])
    shown = [line for line in lines if line.startswith("reference pass: ")]
    assert len(shown) >= 4
    assert all(re.fullmatch(r"reference pass: \d+/\d+ groups, \d+ s left", line) for line in shown)
    assert "reference pass: 9/9 groups, 0 s left" in shown
    assert "evaluation: 9/9 groups, 0 s left" in lines
    for step in (1, 2, 3):
        assert [line for line in lines if re.match(rf"step {step}/3  loss \d\.\d+ ", line)]
    assert [line for line in lines if line.startswith("evaluation at step 0: loss 0.6931")]
    assert [line for line in lines if line.endswith(str(make_config().output_dir / "model"))]


def test_a_quick_phase_prints_no_line_of_its_own(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_config(), ROWS)
    assert "reference pass:" not in capsys.readouterr().out


def test_a_terminal_gets_a_bar() -> None:
    stream = io.StringIO()
    display = Display(console=Console(file=stream, force_terminal=True, width=100))
    with display.phase("training", 4, "steps") as phase:
        phase.advance(2)
        display.say("step 2/4 [not markup]")
        with display.phase("evaluation", 3, "groups") as inner:
            inner.advance(3)
        phase.advance(2)
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "training" in output
    assert "evaluation" in output
    assert "steps" in output
    assert "[not markup]" in output


def test_a_whole_run_on_a_terminal(
    make_config: MakeConfig, eval_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run(make_config(data__eval=eval_file, eval_every=1), ROWS)
    assert "step 3/3" in capsys.readouterr().out


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=True)
    display.say("hello")
    with display.phase("training", 1, "steps") as phase:
        phase.advance()
    assert capsys.readouterr().out == ""


def test_timings_are_what_differs_between_two_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    """The list of names that comparisons leave out holds the timings and nothing else."""
    lines = []
    for name in ("one", "two"):
        config = make_config(name, cache__dir=tmp_path / name / "cache", output_dir=tmp_path / name / "run")
        lines.append(run(config, ROWS).steps)
    for one, two in zip(*lines, strict=True):
        assert {name for name in one if one[name] != two[name]} <= set(TIMINGS)
    assert set(TIMINGS) >= {"tokens_per_second", "groups_per_second", "memory_gib"}
    assert not set(TIMINGS) & (PREFERENCE | {"grad_norm", "learning_rate", "epoch", "num_tokens", "step"})


def test_memory_is_in_gib(make_config: MakeConfig, tiny_model: Path) -> None:
    line = run(make_config(), ROWS).steps[-1]
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    peak = next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    assert line["memory_gib"] == pytest.approx(peak / 2**20, rel=0.2)
    assert Policy.from_pretrained(str(tiny_model)).training


def test_memory_where_the_status_lacks_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("VmSize:\t 9 kB\n")
    for path in (tmp_path / "status", tmp_path / "absent"):
        monkeypatch.setattr(metrics, "_STATUS", path)
        assert 0.05 < metrics.peak_memory_gib(torch.device("cpu")) < 500


def test_memory_is_the_process_s_own() -> None:
    """And not that of the larger process that started it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    child = "import torch; from selm_fast.training.metrics import peak_memory_gib as f; print(f(torch.device('cpu')))"
    parent = "import subprocess, sys; held = b'x' * (3 << 29); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < 1.2
