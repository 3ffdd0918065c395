"""A process that is killed, hangs or has a full disk: the others end and name it, and no run is lost."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selm_fast.config import Config
from selm_fast.errors import RunFailed
from selm_fast.training import reference_cache, storage
from selm_fast.training import world as world_module
from selm_fast.training.metrics import MetricsLog

from .harness import MakeConfig, assert_same_run, leftovers, make_rows, wait_for
from .ranks import Ranks, at_forward, signal_oneself, start_training, train_in

ROWS = make_rows(7, seed=7, duplicates=1)  # 2 steps
FAILED = RunFailed.exit_code
ConfigOf = Callable[[str], Config]
KILL, STOP = partial(signal_oneself, signal.SIGKILL), partial(signal_oneself, signal.SIGSTOP)


@pytest.fixture(autouse=True)
def short_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who are left need not look for the others as long as over a network."""
    monkeypatch.setattr(world_module, "_LAST_WORDS_S", 2.0)


@pytest.fixture
def config_of(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigOf:
    """Runs with a cache of their own in several shards, and a checkpoint at every step."""
    monkeypatch.setattr(reference_cache, "SHARD_SEQUENCES", 8)

    def make(name: str, **changes: Any) -> Config:
        return make_config(name, cache__dir=tmp_path / f"cache-{name}", checkpoint__every=1, **changes)

    return make


@pytest.fixture
def whole(config_of: ConfigOf, tmp_path: Path) -> Path:
    """A run of two processes that nothing happened to."""
    config = config_of("whole")
    train_in(2, config, ROWS, tmp_path / "answers")
    return config.output_dir


def in_a_save(action: Callable[[], None], config: Config) -> None:
    """`action` is called in this process while it writes its part of the second checkpoint."""
    write = storage._write
    temporary = config.output_dir / "checkpoints" / ".tmp-step-00000002"

    def acting(fd: int, data: memoryview) -> int:
        if temporary.exists():
            action()
        return write(fd, data)

    storage._write = acting


# Forwards: the self-check, then a reference pass of four or more packs, then training.
PLACES: dict[str, Callable[[Callable[[], None], Config], None]] = {
    "reference pass": lambda action, _: at_forward(3, action),
    "step": lambda action, config: when_training(action),
    "checkpoint": in_a_save,
}


def when_training(action: Callable[[], None]) -> None:
    """`action` is called in the second forward of training."""
    from selm_fast.training.loop import Trainer

    trained = Trainer.run

    def ran(self: Trainer) -> None:
        at_forward(2, action)
        trained(self)

    Trainer.run = ran  # type: ignore[method-assign]


@pytest.mark.parametrize("place", [p if p == "step" else pytest.param(p, marks=pytest.mark.slow) for p in PLACES])
@pytest.mark.parametrize(
    ("size", "victim"), [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_hazard_33_the_others_name_the_one_that_was_killed(
    config_of: ConfigOf, tmp_path: Path, whole: Path, place: str, size: int, victim: int
) -> None:
    """And the same command goes on, to the bits of the run left alone."""
    config = config_of("killed", timeout_s=60.0)

    def disturb(rank: int) -> None:
        if rank == victim:
            PLACES[place](KILL, config)

    ranks = start_training(size, config, ROWS, tmp_path / "answers", disturb)
    codes, texts = ranks.wait(), ranks.texts()
    assert codes == [-signal.SIGKILL if rank == victim else FAILED for rank in range(size)], texts
    for rank, text in enumerate(texts):
        if rank != victim:
            # Of four, one may wait for another that lives, and be counted as gone by those who have noticed.
            names = f"rank {victim}" if size == 2 else f"ranks? [0-9, ]*{victim}[0-9, ]*"
            assert re.match(f"RunFailed: {names} ended, or did not answer for ", text), text
            assert f"in phase '{place}'" in text
            assert "run the same command to go on" in text
    train_in(2, config, ROWS, tmp_path / "answers")
    if size == 2:
        assert_same_run(whole, config.output_dir)
    else:
        assert any(f"{victim}" in text.partition(" ended")[0] for text in texts)
    assert not leftovers(config.output_dir, config.cache.dir)


@pytest.fixture
def hung() -> Iterator[list[int]]:
    """Stopped processes, which would stay for ever."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        assert wait_for(pid) == -signal.SIGKILL


def wait_for_others(ranks: Ranks, hung: list[int], victim: int) -> list[int]:
    """Exit codes of all but the one that hangs."""
    hung.append(ranks.pids[victim])
    return [wait_for(pid) for pid in ranks.pids if pid != ranks.pids[victim]]


@pytest.mark.parametrize(
    ("place", "size", "victim"),
    [
        pytest.param("step", 2, 1, marks=pytest.mark.slow),  # tests of `World` have one that hangs
        pytest.param("step", 4, 3, marks=pytest.mark.slow),
        pytest.param("step", 2, 0, marks=pytest.mark.slow),
        pytest.param("reference pass", 2, 1, marks=pytest.mark.slow),
        pytest.param("checkpoint", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_hazard_33_the_others_name_the_one_that_hangs(
    config_of: ConfigOf, tmp_path: Path, hung: list[int], place: str, size: int, victim: int
) -> None:
    """In FSDP's collectives, too, whose time-out is that of a step."""
    config = config_of("hung", timeout_s=4.0)

    def disturb(rank: int) -> None:
        if rank == victim:
            PLACES[place](STOP, config)

    ranks = start_training(size, config, ROWS, tmp_path / "answers", disturb)
    codes = wait_for_others(ranks, hung, victim)
    texts = [text for rank, text in enumerate(ranks.texts()) if rank != victim]
    assert codes == [FAILED] * (size - 1), texts
    for text in texts:
        assert text.startswith(f"RunFailed: rank {victim} ended, or did not answer for "), text
        assert "(timeout_s sets it)" in text


# A disk that is full for one.


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_metrics(_config: Config) -> None:
    write = MetricsLog.write

    def writing(log: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 2:
            log._file.close()
            log._file = open("/dev/full", "ab")  # noqa: SIM115
        write(log, line)

    MetricsLog.write = writing  # type: ignore[method-assign, assignment]


def full_for_the_cache(config: Config) -> None:
    write = storage._write

    def writing(fd: int, data: memoryview) -> int:
        return full() if str(config.cache.dir) in os.readlink(f"/proc/self/fd/{fd}") else write(fd, data)

    storage._write = writing


@pytest.mark.parametrize(
    ("place", "victim"),
    [("metrics", 0), *(pytest.param("cache", victim, marks=pytest.mark.slow) for victim in (0, 1))],
)
def test_hazard_32_the_disk_is_full_for_one(
    config_of: ConfigOf, tmp_path: Path, whole: Path, place: str, victim: int
) -> None:
    """(In a checkpoint: tests/training/test_sharded_damage.py.)"""
    config = config_of("full", timeout_s=60.0)

    def disturb(rank: int) -> None:
        if rank == victim:
            {"cache": full_for_the_cache, "metrics": full_for_metrics}[place](config)

    ranks = start_training(2, config, ROWS, tmp_path / "answers", disturb)
    codes, texts = ranks.wait(), ranks.texts()
    assert codes == [FAILED, FAILED], texts
    assert texts[victim].startswith("RunFailed: the disk is full: "), texts
    assert texts[1 - victim].startswith("RunFailed: "), texts
    assert not leftovers(config.output_dir, config.cache.dir)
    if place == "metrics":
        assert (config.output_dir / "checkpoints" / "step-00000001").exists()
    train_in(2, config, ROWS, tmp_path / "answers")
    assert_same_run(whole, config.output_dir)
