"""The reference cache of several processes: each writes shards of its own, and all of them are one pass."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from selm_fast.config import Config
from selm_fast.errors import Stopped
from selm_fast.model import Policy
from selm_fast.training import reference_cache, storage

from .harness import (
    KILLED,
    Crash,
    MakeConfig,
    assert_same_run,
    disk_points,
    leftovers,
    make_rows,
    read_metrics,
    run,
)
from .ranks import in_ranks, signal_oneself, start_ranks, start_training, train_in

ROWS = make_rows(14, seed=21, duplicates=2)
MakeRun = Callable[..., Config]


@pytest.fixture
def config_of(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Runs in bf16, whose caches have several shards of each process; with one cache unless told otherwise."""
    monkeypatch.setattr(reference_cache, "SHARD_SEQUENCES", 8)

    def make(name: str, cache: str = "cache") -> Config:
        return make_config(name, dtype="bfloat16", batch__max_tokens=95, cache__dir=tmp_path / cache)

    return make


def counted(config: Config, nth: int = -1, action: Callable[[], None] = lambda: None) -> list[Any]:
    """Train in this process; -> its reference forwards and what it warned of. action: called in the n-th of them."""
    forwards, in_loss, warnings = 0, False, list[str]()
    sequence_logps, forward = Policy.sequence_logps, Policy.forward

    def counting(self: Policy, batch: Any) -> Any:
        nonlocal forwards
        forwards += not in_loss
        if not in_loss and forwards == nth:
            action()
        return sequence_logps(self, batch)

    def marking(self: Policy, *arguments: Any, **settings: Any) -> Any:
        nonlocal in_loss
        in_loss = True
        found = forward(self, *arguments, **settings)
        in_loss = False
        return found

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    kept = Kept(logging.WARNING)
    logger = logging.getLogger("selm_fast")
    logger.addHandler(kept)
    try:
        with mock.patch.object(Policy, "sequence_logps", counting), mock.patch.object(Policy, "forward", marking):
            run(config, ROWS)
    except Stopped:
        warnings.append("stopped")
    finally:
        logger.removeHandler(kept)
    return [forwards, warnings]


def count_in(size: int, config: Config, tmp_path: Path) -> list[list[Any]]:
    """`counted`, in each of several processes."""
    return in_ranks(size, lambda _: counted(config), tmp_path / "answers")


@pytest.mark.parametrize("others", [[(0, "plain")], pytest.param([(1, "one"), (4, "four")], marks=pytest.mark.slow)])
def test_a_second_run_makes_no_reference_forward(
    config_of: MakeRun, tmp_path: Path, others: list[tuple[int, str]]
) -> None:
    """In as many processes to the bit; in another number with a warning, and values as of another plan."""
    (packs, warned), second = count_in(2, config_of("first"), tmp_path)
    assert packs > 4
    assert [packs, warned] == second == [packs, []]
    shards = sorted((tmp_path / "cache").rglob("shard-*"))
    assert len(shards) >= 4
    assert len(shards) % 2 == 0
    assert count_in(2, config_of("second"), tmp_path) == [[0, []], [0, []]]
    assert_same_run(tmp_path / "first", tmp_path / "second")
    for size, name in others:
        found = [counted(config_of(name))] if size == 0 else count_in(size, config_of(name), tmp_path)
        assert [forwards for forwards, _ in found] == [0] * len(found)
        (warning,) = found[0][1]
        assert "was made under another plan" in warning
        assert not any(warnings for _, warnings in found[1:])  # one speaks for all
        for expected, line in zip(read_metrics(tmp_path / "first"), read_metrics(tmp_path / name), strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], abs=0.02)


@pytest.mark.parametrize("at", [[3], pytest.param([1, -1], marks=pytest.mark.slow)], ids=str)
def test_a_pass_that_was_stopped_for_one_goes_on_for_all(config_of: MakeRun, tmp_path: Path, at: list[int]) -> None:
    """In its n-th pack; -1: in the last."""
    (packs, _), _ = count_in(2, config_of("whole", "another"), tmp_path)
    for nth in (number if number > 0 else packs for number in at):
        config = config_of(f"stopped-{nth}", f"cache-{nth}")

        def stop_and_resume(rank: int, config: Config = config, nth: int = nth) -> list[Any]:
            stop = partial(signal_oneself, signal.SIGTERM)
            return counted(config, nth if rank == 1 else -1, stop)

        assert in_ranks(2, stop_and_resume, tmp_path / "answers") == [[nth, ["stopped"]]] * 2
        assert count_in(2, config, tmp_path) == [[packs - nth, []]] * 2
        assert_same_run(tmp_path / "whole", config.output_dir)


def test_hazard_14_damage_to_a_shard_of_one_is_made_good_by_all(config_of: MakeRun, tmp_path: Path) -> None:
    """What was before it is kept."""
    (packs, _), _ = count_in(2, config_of("whole"), tmp_path)
    shards = sorted((tmp_path / "cache").rglob("shard-*"))
    computed = []
    for nth in (1, len(shards) - 2):  # of the second process in the first round, of the first one in the last
        data = shards[nth].read_bytes()
        shards[nth].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = count_in(2, config_of(f"damaged-{nth}"), tmp_path)
        assert found[0][0] == found[1][0]
        for what in ("rebuilding", "going on from there"):
            assert any(shards[nth].name in warning and what in warning for warning in found[0][1])
        computed.append(found[0][0])
        assert shards[nth].read_bytes() == data
        assert_same_run(tmp_path / "whole", tmp_path / f"damaged-{nth}")
    assert computed[0] == packs
    assert 0 < computed[1] < packs


@pytest.mark.parametrize("every", [43, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_hazard_31_one_is_killed_wherever_the_pass_reaches_the_disk(
    config_of: MakeRun, tmp_path: Path, victim: int, every: int
) -> None:
    """Every shard with a name is sound: what is in the manifest is not computed again, nothing is found damaged."""

    def points(rank: int) -> list[str]:
        with disk_points() as kinds:
            run(config_of("whole", "another"), ROWS)
            return kinds

    train = in_ranks(2, points, tmp_path / "answers")
    in_cache = 4 * len(list((tmp_path / "another").rglob("shard-*"))) // 2 * (2 if victim == 0 else 1)
    assert len(train[victim]) > in_cache
    for at in range(1 + victim, in_cache, every):
        config = config_of(f"killed-{at}", f"cache-{at}")

        def work(rank: int, at: int = at, config: Config = config) -> None:
            if rank == victim:
                Crash(at).install()
            run(config, ROWS)

        ranks = start_ranks(2, work, tmp_path / "answers")
        codes = ranks.wait()
        assert codes[victim] == KILLED
        assert codes[1 - victim] == 1, ranks.texts()
        assert not (config.output_dir / "metrics.jsonl").exists()
        for _, warnings in count_in(2, config, tmp_path):
            assert not warnings
        assert_same_run(tmp_path / "whole", config.output_dir)
        assert not leftovers(config.output_dir, config.cache.dir)


def test_two_runs_fill_one_cache_at_the_same_time(config_of: MakeRun, tmp_path: Path) -> None:
    """One waits for the other, and finds it full."""
    runs = [start_training(2, config_of(name), ROWS, tmp_path / f"answers-{name}") for name in ("one", "other")]
    assert [ranks.wait() for ranks in runs] == [[0, 0]] * 2, [ranks.texts() for ranks in runs]
    assert_same_run(tmp_path / "one", tmp_path / "other")
    train_in(2, config_of("third"), ROWS, tmp_path / "answers")
    assert_same_run(tmp_path / "one", tmp_path / "third")
    assert os.listdir(tmp_path / "cache") and storage.MANIFEST in os.listdir(next((tmp_path / "cache").iterdir()))
