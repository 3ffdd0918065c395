"""A reference pass by several processes: joined, it is the pass of one, to the bit."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan
from selm_fast.errors import Refused, Stopped
from selm_fast.training import cache_parts, storage
from selm_fast.training.cache_parts import join_parts, part_folder, part_of
from selm_fast.training.inputs import read_inputs
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache, ReferenceLogps
from selm_fast.training.run_train import Run, train
from selm_fast.training.signals import StopFlag
from selm_fast.training.storage import Damaged

from .harness import KILLED, MakeConfig, assert_same_run, in_child, leftovers, make_rows, same_bits, write_rows

Keys = list[tuple[bytes, ...]]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows among which some are equal: their sequences are in several packs."""
    return str(write_rows(tmp_path / "rows.jsonl", make_rows(16, seed=61, duplicates=4)))


@pytest.fixture
def settings(make_config: MakeConfig, rows: str, eval_file: str) -> MakeConfig:
    """Settings of runs that all have their own cache."""

    def make(name: str, **changes: Any) -> Config:
        own = {"cache__dir": make_config().cache.dir / name, "data__train": rows, "data__eval": eval_file}
        return make_config(name, **own | changes)

    return make


def run_of(config: Config, stop: StopFlag | None = None) -> Run:
    return Run(config, Display(quiet=True), stop or StopFlag())


def fill(config: Config, count: int) -> None:
    """Every part, one process after another."""
    for index in range(count):
        run_of(config).fill_cache(index, count)


def values_of(config: Config) -> list[ReferenceLogps]:
    """What the whole cache holds for the plans of training and evaluation."""
    (manifest,) = config.cache.dir.glob(f"*/{storage.MANIFEST}")
    cache = ReferenceCache(config.cache.dir, storage.read_json(manifest)["identity"])
    found = [cache.find(plan) for plan in read_inputs(config).plans(config, 1).of_reference()]
    assert len(found) == (2 if config.data.eval else 1)
    assert all(found)
    return [values for values in found if values is not None]


def assert_same_values(one: Config, other: Config) -> None:
    for a, b in zip(values_of(one), values_of(other), strict=True):
        assert a.by_key == b.by_key
        assert a.packs is not None
        assert b.packs is not None
        assert len(a.packs) == len(b.packs)
        assert all(same_bits(x, y) for x, y in zip(a.packs, b.packs, strict=True))


@given(
    steps=st.lists(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4), max_size=5),
    count=st.integers(1, 6),
)
def test_parts_are_the_packs_in_order(steps: list[list[list[int]]], count: int) -> None:
    groups = [TokenGroup([n + 1], [1], [2]) for n in range(6)]
    plan = Plan(groups, tuple(tuple(map(tuple, step)) for step in steps))
    parts = [part_of(plan, index, count) for index in range(count)]
    assert [keys for part in parts for keys in part.pack_keys()] == plan.pack_keys()
    sizes = [len(part.pack_keys()) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_joined_are_one_pass_to_the_bit(
    settings: MakeConfig, reference_forwards: Keys, count: int, dtype: str
) -> None:
    whole, parts = settings("whole", dtype=dtype), settings("parts", dtype=dtype)
    run_of(whole).fill_cache()
    packs = list(reference_forwards)
    reference_forwards.clear()
    shares = []
    for index in range(count):
        run_of(parts).fill_cache(index, count)
        shares.append(len(reference_forwards) - sum(shares))
    assert sorted(reference_forwards) == sorted(packs)  # each pack once
    assert max(shares) - min(shares) <= 2  # of two plans
    assert not list(parts.cache.dir.glob(f"*/{storage.MANIFEST}"))
    run_of(parts).join_cache(count)
    assert_same_values(whole, parts)
    assert not (parts.cache.dir / "parts").exists()
    assert not leftovers(parts.cache.dir)


def test_training_after_joining_runs_no_reference_forward(settings: MakeConfig, reference_forwards: Keys) -> None:
    whole, parts = settings("whole"), settings("parts", cache__require=True)
    with pytest.raises(Refused, match=r"cache\.require"):
        train(parts)
    fill(parts, 3)
    with pytest.raises(Refused, match=r"cache\.require"):  # parts that are not joined are no cache
        train(parts)
    run_of(parts).join_cache(3)
    reference_forwards.clear()
    train(parts)
    assert reference_forwards == []
    train(whole)
    assert reference_forwards
    assert_same_run(parts.output_dir, whole.output_dir)
    first = json.loads((parts.output_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == math.log(2)


def test_more_parts_than_packs(settings: MakeConfig) -> None:
    few = {"batch__max_tokens": 10_000, "batch__groups": 99}
    whole, parts = settings("whole", **few), settings("parts", **few)
    run_of(whole).fill_cache()
    assert [len(values.packs or ()) for values in values_of(whole)] == [1, 1]
    fill(parts, 4)
    run_of(parts).join_cache(4)
    assert_same_values(whole, parts)


def test_joining_twice_is_joining_once(settings: MakeConfig) -> None:
    config = settings("parts")
    fill(config, 2)
    run_of(config).join_cache(2)
    before = {path: path.read_bytes() for path in config.cache.dir.rglob("*") if path.is_file()}
    run_of(config).join_cache(2)
    assert {path: path.read_bytes() for path in config.cache.dir.rglob("*") if path.is_file()} == before
    fill(config, 2)  # everything is there
    assert {path: path.read_bytes() for path in config.cache.dir.rglob("*") if path.is_file()} == before


def test_a_part_that_was_stopped_goes_on_where_it_was(settings: MakeConfig, reference_forwards: Keys) -> None:
    whole, config = settings("whole", data__eval=None), settings("parts", data__eval=None)
    run_of(whole).fill_cache()
    packs = len(reference_forwards)
    reference_forwards.clear()
    run_of(config).fill_cache(0, 2)
    stop = StopFlag()
    stop.request()
    with pytest.raises(Stopped, match="stopped in the reference pass; 1 of"):
        run_of(config, stop).fill_cache(1, 2)
    with pytest.raises(Damaged, match="holds no complete pass"):
        run_of(config).join_cache(2)
    fill(config, 2)
    assert len(reference_forwards) == packs
    run_of(config).join_cache(2)
    assert_same_values(whole, config)


def test_a_missing_part_is_refused(settings: MakeConfig) -> None:
    config = settings("parts")
    fill(config, 3)
    shutil.rmtree(part_folder(config.cache.dir, 1))
    with pytest.raises(Damaged, match="not every part was made"):
        run_of(config).join_cache(3)
    run_of(config).fill_cache(1, 3)
    run_of(config).join_cache(3)
    values_of(config)


def test_parts_of_different_models_are_refused(settings: MakeConfig, other_model: Path) -> None:
    config = settings("parts")
    run_of(config).fill_cache(0, 2)
    run_of(settings("parts", model__path=str(other_model))).fill_cache(1, 2)
    with pytest.raises(Damaged, match="not with the same model and settings"):
        run_of(config).join_cache(2)


def test_parts_of_another_number_of_processes_are_refused(settings: MakeConfig) -> None:
    config = settings("parts")
    fill(config, 3)
    with pytest.raises(Damaged, match="holds no complete pass"):
        run_of(config).join_cache(2)
    fill(config, 2)  # as a run that goes on with fewer processes does
    run_of(config).join_cache(2)
    whole = settings("whole")
    run_of(whole).fill_cache()
    assert_same_values(whole, config)


def test_more_processes_go_on_where_one_had_done_the_training_rows(
    settings: MakeConfig, reference_forwards: Keys
) -> None:
    whole, config = settings("whole"), settings("parts")
    run_of(whole).fill_cache()
    packs = len(reference_forwards)
    reference_forwards.clear()
    run_of(settings("parts", data__eval=None)).fill_cache()  # the pass over the held-out rows was not begun
    fill(config, 2)
    assert len(reference_forwards) == packs
    run_of(config).join_cache(2)
    assert_same_values(whole, config)


def test_parts_of_an_attempt_with_another_model_are_made_again(settings: MakeConfig, other_model: Path) -> None:
    """Or with another torch, or on another machine: whatever is in the identity."""
    whole, config = settings("whole"), settings("parts")
    run_of(whole).fill_cache()
    run_of(settings("parts", model__path=str(other_model))).fill_cache(1, 2)
    fill(config, 2)
    run_of(config).join_cache(2)
    assert_same_values(whole, config)


def test_a_shard_that_was_damaged_is_not_used(
    settings: MakeConfig, reference_forwards: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings("parts")
    fill(config, 2)
    shard = next(iter(sorted(part_folder(config.cache.dir, 1).rglob("shard-*"))))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    run_of(config).join_cache(2)
    reference_forwards.clear()
    train(config)
    assert reference_forwards  # computed again
    assert "truncated or changed" in caplog.text


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_hazard_31_a_kill_while_the_parts_are_removed_loses_nothing(settings: MakeConfig, removed: int) -> None:
    """Whichever of the parts was gone by then."""
    config = settings("parts")
    fill(config, 3)

    def killed() -> None:
        rmtree = shutil.rmtree

        def some(path: Path, **settings: Any) -> None:
            if Path(path).exists():
                rmtree(Path(path) / str(removed))
                os._exit(KILLED)

        cache_parts.shutil.rmtree = some  # type: ignore[attr-defined]
        run_of(config).join_cache(3)

    assert in_child(killed) == KILLED
    run_of(config).join_cache(3)
    whole = settings("whole")
    run_of(whole).fill_cache()
    assert_same_values(whole, config)
    assert {path.parent for path in config.cache.dir.rglob("shard-*")} == {*config.cache.dir.glob("*")}


def test_hazard_31_a_kill_while_they_are_linked_loses_nothing(settings: MakeConfig) -> None:
    config = settings("parts")
    fill(config, 2)

    def killed() -> None:
        link, left = os.link, 2

        def some(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                os._exit(KILLED)
            link(*arguments)

        os.link = some  # type: ignore[assignment]
        run_of(config).join_cache(2)

    assert in_child(killed) == KILLED
    run_of(config).join_cache(2)
    whole = settings("whole")
    run_of(whole).fill_cache()
    assert_same_values(whole, config)


def test_one_part_alone_needs_no_joining(settings: MakeConfig) -> None:
    config = settings("whole")
    run_of(config).fill_cache(0, 1)
    before = sorted(config.cache.dir.rglob("*"))
    run_of(config).join_cache(1)
    join_parts(config.cache.dir, [], 1)
    assert sorted(config.cache.dir.rglob("*")) == before
    values_of(config)
