"""Several processes, one of which is told to stop: all save, and go on with the same bits, or in another number."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from selm_fast.config import Config
from selm_fast.errors import Stopped
from selm_fast.model import Policy
from selm_fast.training.metrics import MetricsLog

from .harness import (
    MakeConfig,
    assert_same_run,
    count_forwards_of,
    leftovers,
    make_rows,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    run,
)
from .ranks import at_forward, free_port, in_ranks, signal_oneself, start_training, train_in
from .test_resume import train_until_stopped

ROWS = make_rows(9, seed=7, duplicates=2)  # 3 steps, the last of one group
STOP_EXIT = Stopped.exit_code
TERM = partial(signal_oneself, signal.SIGTERM)


def settings(eval_file: str, tmp_path: Path, name: str) -> dict[str, Any]:
    """Two micro-batches or more of each process in a step, evaluations between steps."""
    return {
        "dtype": "bfloat16", "optim__moments": "bfloat16", "eval_every": 2, "data__eval": eval_file,
        "batch__max_tokens": 95, "cache__dir": tmp_path / f"cache-{name}", "log__every": 2,
    }  # fmt: skip


@pytest.mark.parametrize("every", [14, pytest.param(1, marks=pytest.mark.slow)])
def test_one_is_stopped_in_any_forward_and_all_go_on_to_the_bit(
    make_config: MakeConfig, eval_file: str, tmp_path: Path, every: int
) -> None:
    """In the self-check, the reference pass, an evaluation, between two micro-batches, in a step's last one."""

    def config_of(name: str) -> Config:
        return make_config(name, **settings(eval_file, tmp_path, name))

    forwards = in_ranks(2, lambda _: count_forwards_of(lambda: run(config_of("whole"), ROWS)), tmp_path / "answers")
    assert forwards[0] == forwards[1] > 20
    points = range(2, forwards[0] + 1, every)
    ports = iter([free_port() for _ in range(2 * len(points))])  # a meeting place of its own for each start

    def stop_and_resume(rank: int) -> list[bool]:
        stopped = []
        for nth in points:
            config = config_of(f"stopped-{nth}")
            with (
                pytest.MonkeyPatch.context() as patch,
                mock.patch.object(Policy, "hidden_states", Policy.hidden_states),
            ):
                patch.setenv("MASTER_PORT", str(next(ports)))
                if rank == nth % 2:
                    at_forward(nth, TERM)
                try:
                    run(config, ROWS)
                    stopped.append(False)
                except Stopped:
                    stopped.append(True)
                    assert not (config.output_dir / "model").exists()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MASTER_PORT", str(next(ports)))
                run(config, ROWS)
        return stopped

    one, other = in_ranks(2, stop_and_resume, tmp_path / "answers")
    assert one == other
    assert all(one[:-1])  # after the last forward of all there is nothing left to stop
    for nth in points:
        config = config_of(f"stopped-{nth}")
        assert_same_run(tmp_path / "whole", config.output_dir)
        assert not leftovers(config.output_dir, config.cache.dir)


def assert_about_the_same(one: Path, other: Path) -> None:
    """Every metric and the final weights, to what another order of sums changes in fp32."""
    for expected, got in zip(read_metrics(one), read_metrics(other), strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=2e-6, nan_ok=True)
    weights = [read_checkpoint(newest_checkpoint(path)).masters for path in (one, other)]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


SIZES = [(2, 0), (1, 4), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(0, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_a_run_goes_on_in_another_number_of_processes(
    make_config: MakeConfig, eval_file: str, tmp_path: Path, before: int, after: int
) -> None:
    """0: without FSDP. The packs are others, and the cache serves as one of another plan."""

    def config_of(name: str) -> Config:
        changes = settings(eval_file, tmp_path, name) | {"dtype": "float32", "optim__moments": "float32"}
        return make_config(name, **changes)

    run(config_of("whole"), ROWS)
    config = config_of("moved")

    write = MetricsLog.write

    def stopping(log: MetricsLog, line: dict[str, Any]) -> None:
        write(log, line)
        if line["step"] == 2 and "loss" in line:
            TERM()

    with mock.patch.object(MetricsLog, "write", stopping):
        if before:
            ranks = start_training(before, config, ROWS, tmp_path / "answers")
            assert ranks.wait() == [STOP_EXIT] * before
        else:
            assert train_until_stopped(config, ROWS)
    assert read_checkpoint(newest_checkpoint(config.output_dir)).step == 2
    lines = train_in(after, config, ROWS, tmp_path / "answers")[0]
    assert [line["step"] for line in lines if "loss" in line] == [3]
    assert_about_the_same(tmp_path / "whole", config.output_dir)
