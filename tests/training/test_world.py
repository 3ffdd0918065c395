"""What processes tell each other beside FSDP's traffic, and what each finds out about those that are gone."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from selm_fast.errors import RunFailed
from selm_fast.training import world as world_module
from selm_fast.training.world import PATIENCE, World, is_of_a_collective, join, launched

from .harness import ALONE, KILLED, wait_for
from .ranks import in_ranks, signal_oneself, start_ranks
from .shards import CPU, in_world

SIZES = (0, 1, 2, 4)


@pytest.mark.parametrize("size", SIZES)
def test_any_is_true_of_all_as_soon_as_it_is_true_of_one(tmp_path: Path, size: int) -> None:
    def act(world: World) -> list[bool]:
        return [world.any(False), *(world.any(world.rank == rank) for rank in range(world.size)), world.any(True)]

    count = max(size, 1)
    assert in_world(size, act, tmp_path) == [[False, *[True] * count, True]] * count


@pytest.mark.parametrize("size", SIZES)
def test_values_of_any_length_are_gathered_by_rank(tmp_path: Path, size: int) -> None:
    """None among them, and every dtype as it was, NaN too."""

    def act(world: World) -> list[list[list[float]]]:
        lengths = (2 * world.rank, world.size - 1 - world.rank, 0, 3)
        found = [world.gather(torch.arange(length, dtype=torch.float64) + world.rank) for length in lengths]
        special = world.gather(torch.tensor([float("nan"), -0.0]))
        assert all(part[0].isnan() and part[1].signbit() for part in special)
        assert [part.dtype for part in world.gather(torch.tensor([7], dtype=torch.uint8))] == [torch.uint8] * world.size
        return [[part.tolist() for part in parts] for parts in found]

    count = max(size, 1)
    expected = [
        [[float(rank + n) for n in range(length)] for rank, length in enumerate(lengths)]
        for lengths in zip(*((2 * rank, count - 1 - rank, 0, 3) for rank in range(count)), strict=True)
    ]
    assert in_world(size, act, tmp_path) == [expected] * count


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_over_all(tmp_path: Path, size: int) -> None:
    def act(world: World) -> list[float]:
        return world.sum(torch.tensor([1.0, float(world.rank)], dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    count = max(size, 1)
    assert in_world(size, act, tmp_path) == [[count, count * (count - 1) / 2]] * count


def test_nobody_leaves_a_meeting_before_all_have_come(tmp_path: Path) -> None:
    def act(world: World) -> list[str]:
        for phase in PATIENCE:
            if world.rank == 1:
                (tmp_path / phase).touch()
            world.meet(phase)
            assert (tmp_path / phase).exists()
        return sorted(PATIENCE)

    assert in_world(4, act, tmp_path / "answers") == [sorted(PATIENCE)] * 4


def test_one_process_without_a_launcher_has_no_groups() -> None:
    assert not launched()
    with join(CPU, 5) as world:
        assert (world.rank, world.size, world.mesh, world.control) == (0, 1, None, None)
        assert world.first
        assert not dist.is_initialized()
        world.meet("start")


def test_groups_are_gone_when_the_block_ends_in_whatever_way(tmp_path: Path) -> None:
    def act(_rank: int) -> bool:
        with pytest.raises(KeyError), join(CPU, 20) as world:
            assert world.mesh is not None
            world.meet("start")
            raise KeyError
        return dist.is_initialized()

    assert in_ranks(2, act, tmp_path) == [False, False]


# Who is gone.


def ends(_world: World) -> None:
    os._exit(KILLED)


HANGS = partial(signal_oneself, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("size", "gone", "how"),
    [
        (2, {1}, "killed"),
        (2, {0}, "killed"),
        pytest.param(4, {1, 3}, "killed", marks=pytest.mark.slow),
        (2, {1}, "hangs"),
        pytest.param(2, {0}, "hangs", marks=pytest.mark.slow),
        pytest.param(4, {1, 2}, "hangs", marks=pytest.mark.slow),
        pytest.param(4, {0, 3}, "killed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "call", ["meet", *(pytest.param(call, marks=pytest.mark.slow) for call in ("any", "gather", "sum"))]
)
def test_hazard_33_whoever_is_left_names_those_who_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, gone: set[int], how: str, call: str
) -> None:
    if how == "hangs" and call in ("any", "gather"):
        pytest.skip("as meet: one place waits for all three")
    monkeypatch.setattr(world_module, "_LAST_WORDS_S", 1.0)
    monkeypatch.setitem(world_module.PATIENCE, "export", 500)  # of another phase: nobody waits for it, not at the end
    calls = {
        "any": lambda world: world.any(False),
        "gather": lambda world: world.gather(torch.ones(1)),
        "meet": lambda world: world.meet("step"),
        "sum": lambda world: world.sum(torch.ones(1)),
    }

    def act(rank: int) -> None:
        with join(CPU, 2.0 if how == "hangs" else 60.0) as world:
            world.meet("checkpoint")
            if rank in gone:
                ends(world) if how == "killed" else HANGS()
            with world.watched("step"):
                for _ in range(100):
                    calls[call](world)

    began = time.monotonic()
    ranks = start_ranks(size, act, tmp_path)
    codes = {rank: wait_for(pid) for rank, pid in enumerate(ranks.pids) if how == "killed" or rank not in gone}
    for rank in gone if how == "hangs" else ():
        ranks.send(rank, signal.SIGKILL)
        wait_for(ranks.pids[rank])
    assert time.monotonic() - began < 40  # a process that is killed is noticed at once, and not after the time-out
    told = {0} if 0 in gone else gone  # where the store is gone with rank 0, it cannot be asked for others
    names = f"rank {min(told)}" if len(told) == 1 else "ranks " + ", ".join(map(str, sorted(told)))
    for rank, text in enumerate(ranks.texts()):
        if rank not in gone:
            assert codes[rank] == RunFailed.exit_code, text
            assert text.startswith(f"RunFailed: {names} ended, or did not answer for "), text
            assert "in phase 'step'" in text


def test_other_errors_pass_through(tmp_path: Path) -> None:
    """Those of this package, and those that no collective raised."""

    def act(world: World) -> None:
        for error in (RunFailed("gloo is mentioned"), RuntimeError("shapes differ"), ValueError("gloo")):
            with pytest.raises(type(error)) as info, world.watched("step"):
                raise error
            assert info.value is error
        world.meet("step")  # the others were not given up

    in_world(2, act, tmp_path)
    with pytest.raises(RuntimeError, match="gloo"), ALONE.watched("step"):
        raise RuntimeError("gloo")
    assert is_of_a_collective(RuntimeError("[enforce fail] NCCL error"))
    assert not is_of_a_collective(RuntimeError("CUDA out of memory"))
