"""kill -9 and a full disk, at every point where something reaches a disk: nothing is lost, nothing half is used."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selm_fast.config import Config
from selm_fast.errors import RunFailed
from selm_fast.training import checkpoint, reference_cache, storage
from selm_fast.training.metrics import MetricsLog
from selm_fast.training.run_train import train

from .harness import (
    ALONE,
    KILLED,
    Crash,
    Live,
    MakeConfig,
    assert_same_run,
    disk_points,
    in_child,
    leftovers,
    make_rows,
    read_checkpoint,
    run,
    start_command,
    write_rows,
)

ROWS = make_rows(6, seed=11, duplicates=1)  # 2 steps
ConfigOf = Callable[[str], Config]


@pytest.fixture
def config_of(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigOf:
    """Runs with a cache of their own, in several shards, and a checkpoint at every step, of which one is kept."""
    monkeypatch.setattr(reference_cache, "SHARD_SEQUENCES", 8)

    def make(name: str) -> Config:
        return make_config(
            name, dtype="bfloat16", batch__groups=3, cache__dir=tmp_path / f"cache-{name}", checkpoint__every=1,
            checkpoint__keep=1,
        )  # fmt: skip

    return make


@pytest.fixture
def whole(config_of: ConfigOf) -> tuple[Path, list[str]]:
    """A run that was left alone, and the points at which the others are killed."""
    config = config_of("whole")
    with disk_points() as kinds:
        run(config, ROWS)
    return config.output_dir, kinds


def check_what_a_kill_left(config: Config, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every checkpoint and shard with a name is sound, and resuming ends with the bits of the run left alone."""
    caplog.clear()
    names = {path.name for path in (config.output_dir / "checkpoints").glob("step-*")}
    found = checkpoint.latest(config.output_dir / "checkpoints", ALONE, read_checkpoint)
    assert (found is None) == (not names)
    if found is not None:
        assert found.path.name == max(names)
    run(config, ROWS)
    assert not caplog.records, caplog.text  # nothing was found damaged
    assert_same_run(whole, config.output_dir)
    assert not leftovers(config.output_dir, config.cache.dir)


# To a process that is killed, an fsync does nothing: what is there before one is there before the next write as well.
AT_FSYNCS = pytest.param({"fsync"}, marks=pytest.mark.slow, id="fsyncs")
AT_WRITES_AND_RENAMES = pytest.param({"write", "rename"}, id="writes and renames")


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", [AT_WRITES_AND_RENAMES, AT_FSYNCS])
def test_hazard_31_killed_at_every_write_fsync_and_rename(
    config_of: ConfigOf, whole: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture, where: set[str], every: int
) -> None:
    reference, kinds = whole
    assert len(kinds) > 50
    assert {"write", "fsync", "rename"} == set(kinds)
    steps_kept = set()
    for at in [index for index, kind in enumerate(kinds, 1) if kind in where][::every]:
        config = config_of(f"killed-{at}")
        crash = Crash(at)

        def work(crash: Crash = crash, config: Config = config) -> None:
            crash.install()
            run(config, ROWS)

        assert in_child(work) == KILLED
        saved = sorted((config.output_dir / "checkpoints").glob("step-*"))
        steps_kept.add(saved[-1].name if saved else "no step")
        check_what_a_kill_left(config, reference, caplog)
        shutil.rmtree(config.output_dir)
        shutil.rmtree(config.cache.dir)
    assert steps_kept == {"no step", "step-00000001", "step-00000002"}


@pytest.mark.slow
def test_hazard_31_killed_in_the_middle_of_every_write(
    config_of: ConfigOf, whole: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    reference, kinds = whole
    for at in (index for index, kind in enumerate(kinds, 1) if kind == "write"):
        config = config_of(f"torn-{at}")

        def work(at: int = at, config: Config = config) -> None:
            Crash(at, torn=True).install()
            run(config, ROWS)

        assert in_child(work) == KILLED
        check_what_a_kill_left(config, reference, caplog)


def test_hazard_31_killed_again_and_again(
    config_of: ConfigOf, whole: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt is killed a few points further on than it began; the run gets there all the same."""
    reference, _ = whole
    config = config_of("killed")
    code = KILLED
    for at in range(1, 200, 6):

        def work(at: int = at) -> None:
            Crash(at).install()
            run(config, ROWS)

        code = in_child(work)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    check_what_a_kill_left(config, reference, caplog)


def test_hazard_31_killed_while_old_checkpoints_are_dropped(
    config_of: ConfigOf, whole: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """The older checkpoint is half gone; the newer one is whole."""
    config = config_of("killed")

    def work() -> None:
        def dies(path: Path, **_: Any) -> None:
            if path.name.startswith("step-"):
                os.unlink(path / "manifest.json")
                os._exit(KILLED)

        shutil.rmtree = dies  # type: ignore[assignment]
        run(config, ROWS)

    assert in_child(work) == KILLED
    assert len(list((config.output_dir / "checkpoints").glob("step-*"))) == 2
    check_what_a_kill_left(config, whole[0], caplog)


def test_hazard_31_killed_while_saving_at_a_step_that_is_not_saved_again(
    make_config: MakeConfig, live: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop saves where it is; what a kill in that save leaves is cleared away, although no save comes there again."""
    whole = make_config("whole", cache__dir=tmp_path / "cache-whole")
    run(whole, ROWS)
    config = make_config("killed", cache__dir=tmp_path / "cache-killed")
    temporary = config.output_dir / "checkpoints" / ".tmp-step-00000001"

    def stop(line: dict[str, Any]) -> None:
        assert live.stop is not None
        live.stop.request()

    def work() -> None:
        write = storage._write

        def dies(fd: int, data: memoryview) -> int:
            if temporary.exists():
                os._exit(KILLED)
            return write(fd, data)

        storage._write = dies
        train(config, rows=ROWS, on_log=stop)

    assert in_child(work) == KILLED
    assert temporary.exists()
    check_what_a_kill_left(config, whole.output_dir, caplog)


def test_hazard_31_everything_is_durable_before_it_gets_its_name(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a power cut: each file is fsynced after its last write and before its rename, then the folder is."""
    events: list[tuple[str, str]] = []
    write, rename = storage._write, storage._rename

    def path_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def seen_write(fd: int, data: memoryview) -> int:
        events.append(("write", path_of(fd)))
        return write(fd, data)

    def seen_rename(source: Path, target: Path) -> None:
        files = [str(path) for path in source.rglob("*")] if source.is_dir() else []
        durable = {path for kind, path in events if kind == "fsync"}
        dirty = [path for kind, path in events if kind == "write" and path not in durable]
        missing = [path for path in (str(source), *files) if path not in durable]
        assert not dirty, dirty
        assert not missing, missing
        rename(source, target)
        events.append(("rename", str(target)))

    monkeypatch.setattr(storage, "_write", seen_write)
    monkeypatch.setattr(storage, "_fsync", lambda fd: events.append(("fsync", path_of(fd))))
    monkeypatch.setattr(storage, "_rename", seen_rename)
    run(config_of("run"), ROWS)
    renames = [index for index, (kind, _) in enumerate(events) if kind == "rename"]
    assert len(renames) >= 10
    for index in renames:
        assert events[index + 1] == ("fsync", str(Path(events[index][1]).parent))
    for index, (kind, path) in enumerate(events):
        if kind == "write":
            assert ("fsync", path) in events[index:]


class FullDisk:
    """The n-th write or fsync says that the disk is full, and so do all after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.seen = at, 0
        write, fsync = storage._write, storage._fsync

        def full_write(fd: int, data: memoryview) -> int:
            if self._full():
                write(fd, data[: len(data) // 3])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data)

        def full_fsync(fd: int) -> None:
            if self._full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        monkeypatch.setattr(storage, "_write", full_write)
        monkeypatch.setattr(storage, "_fsync", full_fsync)

    def _full(self) -> bool:
        self.seen += 1
        return self.seen >= self.at


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "where", [pytest.param({"write"}, id="writes"), pytest.param({"fsync"}, marks=pytest.mark.slow, id="fsyncs")]
)
def test_hazard_32_full_disk_at_every_write_and_fsync(
    config_of: ConfigOf, whole: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture, where: set[str], every: int
) -> None:
    reference, kinds = whole
    points = [kind for kind in kinds if kind != "rename"]
    for at in [index for index, kind in enumerate(points, 1) if kind in where][::every]:
        config = config_of(f"full-{at}")
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, at)
            with pytest.raises(
                RunFailed, match="the disk is full: .* was not written; what was saved before is intact"
            ):
                run(config, ROWS)
        assert not leftovers(config.output_dir, config.cache.dir)
        check_what_a_kill_left(config, reference, caplog)
        shutil.rmtree(config.output_dir)


def test_hazard_32_the_last_good_checkpoint_is_not_touched(config_of: ConfigOf) -> None:
    """The write of the second checkpoint fails: the first is there to the byte, although only one is kept."""
    config = config_of("full")
    first = config.output_dir / "checkpoints" / "step-00000001"
    contents: dict[str, bytes] = {}
    write = storage._write

    def full_after_the_first(fd: int, data: memoryview) -> int:
        if first.exists():
            contents.update({path.name: path.read_bytes() for path in first.iterdir()})
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_write", full_after_the_first)
        with pytest.raises(RunFailed, match="the disk is full"):
            run(config, ROWS)
    assert contents
    assert {path.name: path.read_bytes() for path in first.iterdir()} == contents
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_hazard_32_other_errors_of_a_disk_are_not_taken_for_a_full_one(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "_write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run(config_of("broken"), ROWS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a real file system of so many bytes; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(size: int) -> Path:
        nonlocal mounted
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(line, capture_output=True, check=False).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("no right to mount a small disk")
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", ["half a cache", "half a checkpoint", "no model", "half a model", "no model card"])
def test_hazard_32_a_disk_that_is_really_full(
    make_config: MakeConfig, small_disk: Callable[[int], Path], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever writes: our own storage, the metrics, or safetensors and transformers in the export."""

    def pages(folder: Path) -> int:
        return sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())

    whole = make_config("whole")
    run(whole, ROWS)
    cache, everything, model = (pages(path) for path in (whole.cache.dir, whole.output_dir, whole.output_dir / "model"))
    before_model = cache + everything - model
    size = {
        "half a cache": 2, "half a checkpoint": cache + (everything - model) // 2, "no model": before_model,
        "half a model": before_model + model // 2, "no model card": before_model + model - 2,
    }[room]  # fmt: skip
    disk = small_disk(4096 * size)
    config = make_config("full", output_dir=disk / "run", cache__dir=disk / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    with pytest.raises(RunFailed, match="the disk is full"):
        run(config, ROWS)
    assert not leftovers(disk)
    assert not (disk / "run" / "model").exists()
    saved = list((disk / "run" / "checkpoints").glob("step-*"))
    assert bool(saved) == ("model" in room)
    for path in saved:
        read_checkpoint(path)


def test_hazard_32_metrics_on_a_full_disk(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(4 * 4096)
    log = MetricsLog(disk, tensorboard=False)
    log.write({"step": 1})
    log.sync()
    with pytest.raises(RunFailed, match="the disk is full: .*metrics.jsonl was not written"):
        log.write({"step": 2, "long": "x" * 4096 * 5})
    with pytest.raises(RunFailed, match="the disk is full"):
        log.write({"step": 3})
    with pytest.raises(RunFailed, match="the disk is full"):
        log.close()
    assert (disk / "metrics.jsonl").read_text().startswith('{"step": 1}\n')


@pytest.mark.slow
def test_hazard_31_three_real_kills_at_random_moments(make_config: MakeConfig, tmp_path: Path) -> None:
    """`python -m selm_fast train` and SIGKILL, three times; the moments are drawn anew in every test run."""
    rows = str(write_rows(tmp_path / "rows.jsonl", make_rows(40, seed=1)))
    settings: dict[str, Any] = {"data__train": rows, "epochs": 12, "checkpoint__every": 3}
    whole = make_config("whole", cache__dir=tmp_path / "cache-whole", **settings)
    began = time.monotonic()
    process = start_command(whole, tmp_path / "whole.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    seconds = time.monotonic() - began
    config = make_config("killed", cache__dir=tmp_path / "cache-killed", **settings)
    for _ in range(3):
        moment = random.SystemRandom().uniform(0.5, seconds)
        process = start_command(config, tmp_path / "killed.yaml")
        try:
            output, _ = process.communicate(timeout=moment)
            assert process.returncode == 0, output
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    train(config)
    assert_same_run(whole.output_dir, config.output_dir)
    assert not leftovers(config.output_dir, config.cache.dir)
