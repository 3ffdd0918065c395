"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from selm_fast.cli.main import main
from selm_fast.config import Config
from selm_fast.errors import Stopped
from selm_fast.model import Policy
from selm_fast.training import cache_identity, reference_cache
from selm_fast.training.run_train import train

from .harness import (
    Live,
    MakeConfig,
    assert_same_run,
    count_forwards_of,
    leftovers,
    make_rows,
    newest_checkpoint,
    run,
    start_child,
    start_command,
    wait_for,
    write_recipe,
    write_rows,
)

ROWS = make_rows(9, seed=7, duplicates=2)  # 3 steps of several micro-batches, the last one shorter
STOP_EXIT = 75


def train_until_stopped(config: Config, rows: Any, on_log: Any = None) -> bool:
    """Train; -> whether it was stopped."""
    try:
        train(config, rows=rows, on_log=on_log)
    except Stopped:
        return True
    return False


def stop_at_forward(monkeypatch: pytest.MonkeyPatch, live: Live, nth: int) -> None:
    """Ask for a stop during the n-th packed forward of the run."""
    count = 0
    hidden_states = Policy.hidden_states

    def counted(self: Policy, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == nth:
            assert live.stop is not None
            live.stop.request()
        return hidden_states(self, batch)

    monkeypatch.setattr(Policy, "hidden_states", counted)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_stopped_in_any_forward_then_resumed(
    make_config: MakeConfig, live: Live, eval_file: str, tmp_path: Path, dtype: str, every: int
) -> None:
    """Any micro-batch of the reference pass, of evaluation and of training, the model's self-check included."""

    def config_of(name: str) -> Config:
        return make_config(
            name, dtype=dtype, eval_every=1, data__eval=eval_file, cache__dir=tmp_path / f"cache-{name}", log__every=2
        )

    whole = config_of("whole")
    forwards = count_forwards_of(lambda: run(whole, ROWS))
    assert forwards > 20
    positions = set()
    for nth in [*range(1, forwards, every), forwards]:
        config = config_of(f"stopped-{nth}")
        with pytest.MonkeyPatch.context() as patch:
            stop_at_forward(patch, live, nth)
            stopped = train_until_stopped(config, ROWS)
        assert stopped or nth == forwards  # after the last forward of all there is nothing left to stop
        if stopped:
            assert not (config.output_dir / "model").exists()
            saved = sorted((config.output_dir / "checkpoints").glob("step-*"))
            positions.add(saved[-1].name if saved else "no step")
        run(config, ROWS)
        assert_same_run(whole.output_dir, config.output_dir)
        assert not leftovers(config.output_dir, config.cache.dir)
    assert positions == {"no step", "step-00000001", "step-00000002", "step-00000003"}


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"log__every": 3}, {"checkpoint__every": 1}], ids=str)
def test_stopped_at_every_logged_line_then_resumed(
    make_config: MakeConfig, live: Live, eval_file: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """One run that is stopped again and again, each time as soon as it has written something new."""

    def config_of(name: str) -> Config:
        return make_config(
            name, epochs=2, eval_every=2, data__eval=eval_file, cache__dir=tmp_path / f"cache-{name}", **changes
        )

    whole, config = config_of("whole"), config_of("stopped")
    run(whole, ROWS)
    seen: set[str] = set()

    def stop_on_news(line: dict[str, Any]) -> None:
        name = f"{line['step']} {'loss' in line}"
        if name not in seen:
            assert live.stop is not None
            live.stop.request()
        seen.add(name)

    stops = 0
    while train_until_stopped(config, ROWS, stop_on_news):
        stops += 1
        assert stops < 20
    assert stops >= 3
    assert_same_run(whole.output_dir, config.output_dir)


def test_a_stop_in_the_reference_pass_keeps_what_was_computed(
    make_config: MakeConfig, live: Live, reference_forwards: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        stop_at_forward(patch, live, 4)  # the first is the model's self-check
        assert train_until_stopped(config, ROWS)
    assert len(reference_forwards) == 3
    first = list(reference_forwards)
    reference_forwards.clear()
    run(config, ROWS)
    again = list(reference_forwards)
    reference_forwards.clear()
    run(make_config("whole", cache__dir=config.cache.dir / "another"), ROWS)
    assert first + again == reference_forwards  # none twice, none left out


def test_a_stop_at_the_last_pack_of_the_reference_pass_leaves_a_cache_that_is_exact(
    make_config: MakeConfig, live: Live, reference_forwards: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_config("whole")
    run(whole, ROWS)
    packs = len(reference_forwards)
    config = make_config("stopped", cache__dir=whole.cache.dir / "another")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_forward(patch, live, 1 + packs)
        assert train_until_stopped(config, ROWS)
    reference_forwards.clear()
    run(config, ROWS)
    assert not reference_forwards
    assert "another plan" not in caplog.text
    assert_same_run(whole.output_dir, config.output_dir)


def test_optimiser_state_is_resumed_not_begun_anew(make_config: MakeConfig, live: Live) -> None:
    """Moments and step counts of the resumed run are those of all its steps."""
    config = make_config(checkpoint__every=100)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            assert live.stop is not None
            live.stop.request()

    assert train_until_stopped(config, ROWS, stop)
    run(config, ROWS)
    assert live.trainer is not None
    assert live.trainer.optimizer.step.item() == 3


def test_resuming_says_so_and_logs_the_remaining_steps_alone(
    make_config: MakeConfig, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()

    def stop(line: dict[str, Any]) -> None:
        assert live.stop is not None
        live.stop.request()

    assert train_until_stopped(config, ROWS, stop)
    trace = run(config, ROWS)
    assert "resuming after step 1 of 3" in capsys.readouterr().out
    assert [line["step"] for line in trace.steps] == [2, 3]


# Real signals: a forked process runs the command line, slowed down so that the signal meets it at work.


def slow_command(config: Config, recipe: Path, seconds: float) -> int:
    """Start the command in a forked process whose every forward takes `seconds` more; -> its process id.

    A file beside the recipe, with the suffix .working, is made at the first forward.
    """
    write_recipe(config, recipe)
    hidden_states = Policy.hidden_states

    def slowly(self: Policy, batch: Any) -> Tensor:
        recipe.with_suffix(".working").touch()
        time.sleep(seconds)
        return hidden_states(self, batch)

    def work() -> int:
        Policy.hidden_states = slowly  # type: ignore[method-assign]
        return main(["train", str(recipe)])

    return start_child(work)


def wait_until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("stage", ["reference pass", "training"])
def test_hazard_30_a_signal_saves_and_exits_75(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, stage: str
) -> None:
    monkeypatch.setattr(reference_cache, "SHARD_SEQUENCES", 4)
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    config = make_config("stopped", data__train=rows, cache__dir=tmp_path / "cache-stopped", checkpoint__every=100)
    child = slow_command(config, tmp_path / "recipe.yaml", 0.03)
    checkpoints = config.output_dir / "checkpoints"
    if stage == "reference pass":
        wait_until(lambda: list(config.cache.dir.glob("*/shard-*")))
    else:
        wait_until(lambda: (config.output_dir / "metrics.jsonl").exists())
        time.sleep(0.1)
    os.kill(child, number)
    assert wait_for(child) == STOP_EXIT
    if stage == "reference pass":
        assert not (config.output_dir / "metrics.jsonl").exists()
    train(config)
    assert len(list(checkpoints.glob("step-*"))) <= config.checkpoint.keep
    whole = make_config("whole", data__train=rows, cache__dir=tmp_path / "cache-whole", checkpoint__every=100)
    train(whole)
    assert_same_run(whole.output_dir, config.output_dir)


def test_hazard_30_a_second_signal_ends_the_process_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    config = make_config(data__train=rows, epochs=50)
    child = slow_command(config, tmp_path / "recipe.yaml", 5.0)  # a forward that does not end soon
    wait_until((tmp_path / "recipe.working").exists)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # at work until the forward ends
    os.kill(child, signal.SIGTERM)
    assert wait_for(child) == -signal.SIGTERM


def test_hazard_30_the_handlers_of_the_caller_are_put_back(make_config: MakeConfig) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(make_config(), ROWS)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_hazard_30_the_command_itself(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m selm_fast train` and SIGTERM in the middle of training; another process goes on from there."""
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    config = make_config("stopped", data__train=rows, epochs=16, cache__dir=tmp_path / "cache-stopped")
    process = start_command(config, tmp_path / "recipe.yaml")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == STOP_EXIT
    assert "run the same command to go on" in rest
    step = int(newest_checkpoint(config.output_dir).name.removeprefix("step-"))
    assert 5 <= step < 48
    assert json.loads((config.output_dir / "run.json").read_text())["done"] is False
    train(config)
    assert f"resuming after step {step} of 48" in capsys.readouterr().out
    whole = make_config("whole", data__train=rows, epochs=16, cache__dir=tmp_path / "cache-whole")
    train(whole)
    assert_same_run(whole.output_dir, config.output_dir)


def test_another_version_is_told_of(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()

    def stop(_line: Any) -> None:
        assert live.stop is not None
        live.stop.request()

    assert train_until_stopped(config, ROWS, stop)
    assert not caplog.records
    monkeypatch.setattr(cache_identity.transformers, "__version__", "99.0.0")
    run(config, ROWS)
    assert "'transformers': '99.0.0'" in caplog.text
    assert "} it may not go on to the bit" in caplog.text
