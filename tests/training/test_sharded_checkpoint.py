"""Checkpoints of sharded tensors: saved by a world of one size, read by one of another, the same format for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from selm_fast.errors import Refused, RunFailed
from selm_fast.training import checkpoint, storage
from selm_fast.training.final import keep_masters, load_into, load_masters
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.world import World

from .harness import ALONE, assert_same_tensors, leftovers, read_checkpoint, same_bits
from .shards import Tensors, expect, in_world, load, local, placed, save, state_of, weights_of

SIZES = (0, 1, 2, 4)  # 0: one process without any group


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with two checkpoints each, by the size of the world that wrote them."""
    base = tmp_path_factory.mktemp("saved")
    folders = {size: base / str(size) for size in SIZES}
    for size, folder in folders.items():

        def both(world: World, folder: Path = folder) -> None:
            for step in (1, 2):
                save(folder, world, step)

        in_world(size, both, base / "answers")
    return folders


@pytest.mark.parametrize("size", SIZES)
def test_what_any_world_saved_is_loaded_to_the_bit(saved: dict[int, Path], tmp_path: Path, size: int) -> None:
    def load_all(world: World) -> list[int]:
        return [load(folder, world) for folder in saved.values()]

    assert in_world(size, load_all, tmp_path) == [[2] * len(SIZES)] * max(size, 1)


def test_a_world_of_one_writes_the_bytes_of_a_process_without_groups(saved: dict[int, Path]) -> None:
    one, other = (
        {path.name: path.read_bytes() for path in (saved[size] / "step-00000002").iterdir()} for size in (0, 1)
    )
    assert one == other
    assert one.keys() == {
        "manifest.json", "optimizer-00000-00001.safetensors", "optimizer.json", "state.json",
        "weights-00000-00001.safetensors", "weights.json",
    }  # fmt: skip


def test_each_process_writes_its_own_rows_and_one_what_is_everywhere(saved: dict[int, Path]) -> None:
    path = saved[4] / "step-00000002"
    index = json.loads((path / "weights.json").read_text())
    ranks = {name: [chunk["file"][:13] for chunk in found["chunks"]] for name, found in index.items()}
    assert ranks["even"] == [f"weights-0000{rank}" for rank in range(4)]
    assert ranks["few"] == [f"weights-0000{rank}" for rank in range(3)]
    assert ranks["one row"] == ["weights-00000"]
    steps = [found for name, found in json.loads((path / "optimizer.json").read_text()).items() if "/step" in name]
    assert [len(found["chunks"]) for found in steps] == [1] * len(weights_of(2))


@pytest.mark.parametrize("size", SIZES)
def test_no_pickle_is_written(saved: dict[int, Path], size: int) -> None:
    for path in (saved[size] / "step-00000002").iterdir():
        data = path.read_bytes()
        assert b"PK\x03\x04" not in data
        if path.suffix == ".json":
            json.loads(data)
        else:
            assert path.suffix == ".safetensors"
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


def test_files_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor a file, where none fits beside another; an empty one is a tensor too."""
    monkeypatch.setattr(storage, "MAX_SHARD", 1)

    def there_and_back(world: World) -> None:
        targets: dict[str, Any] = {"weights": placed({**weights_of(1), "empty": torch.empty(0, 3)}, world)}
        checkpoint.save(tmp_path / "run", step=1, optimizer={}, state={}, keep=1, world=world, **targets)
        for tensor in targets["weights"].values():
            local(tensor).zero_()
        assert checkpoint.load_latest(tmp_path / "run", optimizer={}, world=world, **targets) is not None
        targets["weights"].pop("empty")
        expect(targets["weights"], weights_of(1), world)

    in_world(2, there_and_back, tmp_path)
    path = tmp_path / "run/step-00000001"
    index = json.loads((path / "weights.json").read_text())
    assert len(list(path.glob("weights-*"))) == sum(len(found["chunks"]) for found in index.values()) == 6 + 4
    (path / index["empty"]["chunks"][0]["file"]).write_bytes(b"")  # nobody needs anything of it
    with pytest.raises(RunFailed, match="every checkpoint in .* is damaged"):
        in_one: Any = {"weights": {**weights_of(1), "empty": torch.empty(0, 3)}, "optimizer": {}}
        checkpoint.load_latest(tmp_path / "run", world=ALONE, **in_one)


def test_parameters_of_fsdp(tmp_path: Path) -> None:
    """FSDP pads what it shards unevenly: the padding is not saved."""

    def model_of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))

    def there_and_back(world: World) -> None:
        assert world.mesh is not None
        one, other = (fully_shard(model_of(seed), mesh=world.mesh) for seed in (0, 1))
        weights = dict(one.named_parameters())
        checkpoint.save(tmp_path / "run", step=1, weights=weights, optimizer={}, state={}, keep=1, world=world)
        assert checkpoint.load_latest(
            tmp_path / "run", weights=dict(other.named_parameters()), optimizer={}, world=world
        )
        for name, weight in other.named_parameters():
            assert same_bits(local(weight), local(weights[name]))

    in_world(2, there_and_back, tmp_path)
    expected = {name: weight.detach() for name, weight in model_of(0).named_parameters()}
    assert_same_tensors(read_checkpoint(tmp_path / "run/step-00000001").masters, expected)


def without(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "few"}


OTHERS: dict[str, Callable[[Tensors], Tensors]] = {
    "few: float32 [3, 2] there, missing here": without,
    "more: missing there, float32 [2] here": lambda tensors: tensors | {"more": torch.zeros(2)},
    "few: float32 [3, 2] there, float32 [2, 3] here": lambda tensors: tensors | {"few": torch.zeros(2, 3)},
    "few: float32 [3, 2] there, bfloat16 [3, 2] here": lambda tensors: tensors | {"few": tensors["few"].bfloat16()},
}


@pytest.mark.parametrize("size", [0, 2])
def test_a_checkpoint_of_another_model_is_refused_by_all(saved: dict[int, Path], tmp_path: Path, size: int) -> None:
    def refused(world: World) -> list[str]:
        said = []
        for change in OTHERS.values():
            weights, optimizer = placed(change(weights_of(7)), world), placed(state_of(7), world)
            with pytest.raises(
                RunFailed, match="step-00000002 holds other weights .* belongs to another model"
            ) as info:
                checkpoint.load_latest(saved[4], weights=weights, optimizer=optimizer, world=world)
            said.append(str(info.value))
            expect(weights, change(weights_of(7)), world)  # not touched
            expect(optimizer, state_of(7), world)
        with pytest.raises(RunFailed, match="holds other optimizer than this model has"):
            checkpoint.load_latest(saved[4], weights=placed(weights_of(7), world), optimizer={}, world=world)
        return said

    for said in in_world(size, refused, tmp_path):
        assert all(f"({difference})" in text for difference, text in zip(OTHERS, said, strict=True))


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    def nothing(world: World) -> bool:
        return checkpoint.load_latest(tmp_path / "run", weights={}, optimizer={}, world=world) is None

    assert in_world(2, nothing, tmp_path / "answers") == [True, True]


def test_old_ones_are_dropped_and_one_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work(world: World) -> None:
        for step in (1, 2, 3):
            save(folder, world, step, keep=2)
            assert (folder / f"step-{step:08d}").exists()  # for all, as soon as `save` returns
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "step-00000003").iterdir()}
        save(folder, world, 3, keep=2)
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before

    in_world(2, work, tmp_path / "answers")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


# What a finished run leaves.


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", [0, 2])
def test_masters_of_a_sharded_run(saved: dict[int, Path], tmp_path: Path, kept: bool, size: int) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(saved[4], run.checkpoints)
    if kept:
        keep_masters(run)
        assert not [path for path in run.masters.iterdir() if "optimizer" in path.name]
    masters, step = load_masters(run)
    assert step == 2
    assert_same_tensors(masters, weights_of(2))
    rounded, _ = load_masters(run, torch.bfloat16)
    assert_same_tensors(rounded, {name: weight.bfloat16() for name, weight in weights_of(2).items()})

    def into(world: World) -> int:
        weights = placed(weights_of(0), world)
        found = load_into(run, weights, world)
        expect(weights, weights_of(2), world)
        with pytest.raises(Refused, match=r"few: float32 \[3, 2\] there, missing here.*was its config.json edited"):
            load_into(run, placed(without(weights_of(0)), world), world)
        return found

    assert in_world(size, into, tmp_path / "answers") == [2] * max(size, 1)
    for path in (*run.masters.glob("weights-00002*"), *run.checkpoints.glob("*/weights-00002*")):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused if kept else RunFailed, match="damaged"):
        load_into(run, weights_of(0), ALONE)
    assert not leftovers(tmp_path)
