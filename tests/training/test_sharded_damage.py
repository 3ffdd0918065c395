"""What happens to checkpoints of several processes: damage, a killed process, a disk that is full for one of them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest

from selm_fast.errors import RunFailed
from selm_fast.training import checkpoint, storage
from selm_fast.training import world as world_module
from selm_fast.training.world import World

from .harness import ALONE, KILLED, Crash, assert_same_tensors, disk_points, leftovers, read_checkpoint, wait_for
from .shards import in_world, load, save, start_world, state_of, weights_of

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints that two processes wrote."""
    folder = tmp_path / "run"

    def both(world: World) -> None:
        for step in (1, 2):
            save(folder, world, step)

    in_world(2, both, tmp_path / "answers")
    return folder


@contextmanager
def damaged(path: Path, rng: random.Random) -> Iterator[str]:
    """A bit of one of a folder's files is flipped, or its end cut off, while the block runs; -> what was done."""
    file = rng.choice(sorted(path.iterdir()))
    data = file.read_bytes()
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    flipped = rng.random() < 0.7
    file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if flipped else data[:at])
    try:
        yield f"{file.name}: {f'bit {bit} of byte {at}' if flipped else f'cut at {at}'} of {len(data)}"
    finally:
        file.write_bytes(data)


@pytest.mark.parametrize("size", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_flipped_bit_and_every_cut_is_found_and_the_one_before_used(
    folder: Path, tmp_path: Path, size: int
) -> None:
    def damage_and_load(world: World) -> list[str]:
        missed = []
        rng = random.Random(0)
        for _ in range(200):
            with damaged(folder / "step-00000002", rng) if world.first else nullcontext("by rank 0") as what:
                world.meet("checkpoint")
                if load(folder, world) != 1:
                    missed.append(what)
                world.meet("checkpoint")
        world.meet("checkpoint")
        assert load(folder, world) == 2
        return missed

    assert in_world(size, damage_and_load, tmp_path / "answers") == [[]] * max(size, 1)


def swapped(path: Path) -> None:
    one, other = sorted(path.glob("weights-*"))
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)


def of_the_step_before(path: Path) -> None:
    name = "optimizer-00001-00001.safetensors"
    shutil.copyfile(path.with_name("step-00000001") / name, path / name)


def flipped_in_the_file_of(rank: int) -> Damage:
    def damage(path: Path) -> None:
        file = path / f"weights-{rank:05d}-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")

    return damage


def replaced_with_its_index(path: Path) -> None:
    """A whole kind of another step, sound in itself."""
    for file in path.with_name("step-00000001").glob("weights*"):
        shutil.copyfile(file, path / file.name)


DAMAGES: dict[str, Damage] = {
    "a file of rank 0 gone": lambda path: (path / "weights-00000-00001.safetensors").unlink(),
    "a file of rank 1 gone": lambda path: (path / "optimizer-00001-00001.safetensors").unlink(),
    "an index gone": lambda path: (path / "weights.json").unlink(),
    "state gone": lambda path: (path / "state.json").unlink(),
    "manifest gone": lambda path: (path / "manifest.json").unlink(),
    "manifest a byte short": lambda path: os.truncate(
        path / "manifest.json", os.stat(path / "manifest.json").st_size - 1
    ),
    "files swapped": swapped,
    "a file of the step before": of_the_step_before,
    "weights of the step before": replaced_with_its_index,
    "damaged for rank 0 alone": flipped_in_the_file_of(0),
    "damaged for rank 1 alone": flipped_in_the_file_of(1),
    "empty": lambda path: [file.unlink() for file in path.iterdir()] and None,
}


# Others than these are found by the same checks of names and digests (tests/training/test_checkpoint.py).
IN_CI = "a file of rank 1 gone", "files swapped", "weights of the step before", "damaged for rank 0 alone", "empty"


@pytest.mark.parametrize("how", [how if how in IN_CI else pytest.param(how, marks=pytest.mark.slow) for how in DAMAGES])
def test_damage_that_one_finds_makes_all_fall_back(folder: Path, tmp_path: Path, how: str) -> None:
    DAMAGES[how](folder / "step-00000002")

    def fall_back(world: World) -> list[str]:
        said: list[str] = []
        with mock.patch.object(checkpoint.log, "warning", lambda form, *values: said.append(form % values)):
            assert load(folder, world) == 1
        return said

    first, second = in_world(2, fall_back, tmp_path / "answers")
    assert len(first) == 1
    assert first[0].startswith("checkpoint step-00000002 is damaged (")
    assert not second  # one says it
    DAMAGES[how](folder / "step-00000001") if "before" not in how else (folder / "step-00000001/state.json").unlink()

    def fail(world: World) -> bool:
        with pytest.raises(RunFailed, match="every checkpoint in .* is damaged; move the folder away to begin again"):
            load(folder, world)
        return True

    assert in_world(2, fail, tmp_path / "answers") == [True, True]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_fails_one_process_alone_makes_all_fall_back(folder: Path, tmp_path: Path, rank: int) -> None:
    """Each file that it reads in turn, although the other reads the same one well."""
    read = storage.read_checked

    def fall_back(world: World) -> dict[str, int]:
        seen: dict[str, int] = {}
        for name in sorted(path.name for path in (folder / "step-00000002").iterdir()):

            def fails(path: Path, sha256: str, name: str = name) -> bytes:
                if path.name == name and "2" in path.parent.name and world.rank == rank:
                    raise storage.Damaged(f"{path}: Input/output error")
                return read(path, sha256)

            with mock.patch.object(storage, "read_checked", fails):
                seen[name] = load(folder, world)
        return seen

    one, other = in_world(2, fall_back, tmp_path / "answers")
    assert one == other
    not_its_own = {f"{kind}-0000{1 - rank}-00001.safetensors" for kind in ("weights", "optimizer")}
    if rank == 1:  # which also reads the step counts, that rank 0 wrote
        not_its_own.remove("optimizer-00000-00001.safetensors")
    assert {name for name, step in one.items() if step == 2} == not_its_own | {"manifest.json"}


def test_files_that_belong_to_nothing_are_not_read(folder: Path, tmp_path: Path) -> None:
    """Neither those of a larger world nor those of another run."""
    path = folder / "step-00000002"
    for stale in ("weights-00000-00002", "weights-00002-00001", "optimizer-00007-00001", "model"):
        shutil.copyfile(folder / "step-00000001/weights-00001-00001.safetensors", path / f"{stale}.safetensors")
    for size in (0, 2):
        assert set(in_world(size, lambda world: load(folder, world), tmp_path / "answers")) == {2}


# kill -9, and what the others do.


def points_of(rank: int, folder: Path, tmp_path: Path) -> list[str]:
    """The points at which something of one process reaches the disk in a save by two."""

    def counted(world: World) -> list[str]:
        with disk_points() as kinds:
            save(folder, world, 2)
        return kinds

    found: list[str] = in_world(2, counted, tmp_path / "answers")[rank]
    shutil.rmtree(folder / "step-00000002")
    return found


@pytest.mark.parametrize(
    ("rank", "every"), [(0, 3), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_hazard_31_one_process_is_killed_at_any_point_of_a_save(
    folder: Path, tmp_path: Path, rank: int, every: int
) -> None:
    """As launchers do, the others are ended with it; the checkpoint before is whole and found, and saving goes on."""
    shutil.rmtree(folder / "step-00000002")
    kinds = points_of(rank, folder, tmp_path)
    assert kinds.count("rename") == (rank == 0)
    assert kinds.count("write") == (6 if rank == 0 else 2)
    torn = [(at, True) for at, kind in enumerate(kinds, 1) if kind == "write"]
    for at, half in ([(at, False) for at in range(1, len(kinds) + 1)] + torn)[::every]:

        def killed(world: World, at: int = at, half: bool = half) -> None:
            if world.rank == rank:
                Crash(at, torn=half).install()
            save(folder, world, 2, keep=1)

        ranks = start_world(2, killed, tmp_path / "answers")
        assert wait_for(ranks.pids[rank]) == KILLED
        ranks.send(1 - rank, signal.SIGKILL)
        wait_for(ranks.pids[1 - rank])
        whole = checkpoint.latest(folder, ALONE, read_checkpoint)
        assert whole is not None
        assert whole.step == (2 if "rename" in kinds[: at - 1] else 1)
        assert_same_tensors(whole.masters, weights_of(whole.step))
        assert_same_tensors(whole.optimizer, state_of(whole.step))
        shutil.rmtree(folder / "step-00000002", ignore_errors=True)
    in_world(2, lambda world: save(folder, world, 2, keep=1) and None, tmp_path / "answers")
    assert in_world(4, lambda world: load(folder, world), tmp_path / "answers") == [2] * 4
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("rank", "at"), [(1, 1), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(0, 1, marks=pytest.mark.slow)]
)
def test_hazard_33_the_others_end_with_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, at: int
) -> None:
    monkeypatch.setattr(world_module, "_LAST_WORDS_S", 0.3)

    def killed(world: World) -> None:
        if world.rank == rank:
            Crash(at).install()
        save(folder, world, 3)

    ranks = start_world(3, killed, tmp_path / "answers")
    codes = ranks.wait()
    assert codes[rank] == KILLED
    survivors = [text for other, text in enumerate(ranks.texts()) if other != rank]
    for text in survivors:
        assert text.startswith(f"RunFailed: rank {rank} ended, or did not answer")
        assert "in phase 'checkpoint'" in text
    if rank != 0:
        assert not leftovers(folder)
    assert load(folder, ALONE) == 2


# A full disk.


class FullDisk:
    """From the n-th write or fsync on, this process's disk is full."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        self.write, self.fsync = storage._write, storage._fsync

    def full_write(self, fd: int, data: memoryview) -> int:
        if self._full():
            self.write(fd, data[: len(data) // 3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(fd, data)

    def full_fsync(self, fd: int) -> None:
        if self._full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(fd)

    def _full(self) -> bool:
        self.seen += 1
        return self.seen >= self.at


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_hazard_32_a_disk_full_for_one_is_an_error_of_all(folder: Path, tmp_path: Path, rank: int) -> None:
    shutil.rmtree(folder / "step-00000002")
    kinds = points_of(rank, folder, tmp_path)
    before_the_name = kinds.index("rename") if "rename" in kinds else len(kinds)

    def full(world: World) -> list[str]:
        said = []
        for at in range(1, before_the_name + 1):
            disk = FullDisk(at if world.rank == rank else 10**9)
            with (
                mock.patch.object(storage, "_write", disk.full_write),
                mock.patch.object(storage, "_fsync", disk.full_fsync),
                pytest.raises(RunFailed, match="what was saved before is intact") as info,
            ):
                save(folder, world, 2, keep=1)
            said.append(str(info.value))
            world.meet("checkpoint")
            assert [path.name for path in folder.iterdir()] == ["step-00000001"]
            assert load(folder, world) == 1
        save(folder, world, 2, keep=1)
        return said

    answers = in_world(2, full, tmp_path / "answers")
    assert len(answers[rank]) == before_the_name
    assert all("the disk is full: " in text for text in answers[rank])
    assert load(folder, ALONE) == 2


def test_other_errors_of_one_process_end_all(folder: Path, tmp_path: Path) -> None:
    def broken(world: World) -> str:
        def fails(fd: int, data: memoryview) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        if world.rank == 1:
            storage._write = fails
        with pytest.raises((OSError, RunFailed)) as info:
            save(folder, world, 3)
        return f"{info.type.__name__}: {info.value}"

    first, second = in_world(2, broken, tmp_path / "answers")
    assert first == "RunFailed: rank 1 failed while a checkpoint was written or read: OSError(5, 'Input/output error')"
    assert second == "OSError: [Errno 5] Input/output error"
    assert not leftovers(folder)
    assert load(folder, ALONE) == 2
