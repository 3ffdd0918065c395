"""Checkpoints: which are kept, and what happens when they are damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selm_fast.config import Config
from selm_fast.errors import RunFailed, Stopped
from selm_fast.training import checkpoint, storage
from selm_fast.training.loop import Trainer
from selm_fast.training.run_train import train
from selm_fast.training.storage import Damaged

from .harness import (
    ALONE,
    Live,
    MakeConfig,
    assert_same_run,
    assert_same_tensors,
    leftovers,
    make_rows,
    newest_checkpoint,
    read_checkpoint,
    run,
    same_bits,
)

ROWS = make_rows(8, seed=61)


def steps_of(config: Config) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (config.output_dir / "checkpoints").iterdir())


def tensors_of_trainer(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint is given."""
    return {"weights": trainer.masters.masters, "optimizer": trainer.optimizer.tensors()}


def stop_after(config: Config, live: Live, step: int) -> None:
    """Train until that step is logged, and stop."""

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == step:
            assert live.stop is not None
            live.stop.request()

    with pytest.raises(Stopped):
        train(config, rows=ROWS, on_log=stop)


@pytest.mark.parametrize(
    ("every", "keep", "expected"), [(1, 1, [8]), (1, 3, [6, 7, 8]), (3, 2, [6, 8]), (100, 2, [8]), (2, 9, [2, 4, 6, 8])]
)
def test_the_newest_checkpoints_are_kept(make_config: MakeConfig, every: int, keep: int, expected: list[int]) -> None:
    config = make_config(epochs=4, checkpoint__every=every, checkpoint__keep=keep)
    run(config, ROWS)
    assert steps_of(config) == expected
    for path in (config.output_dir / "checkpoints").iterdir():
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
        assert {"manifest.json", "state.json"} <= {file.name for file in path.iterdir()}


def damage(path: Path, how: str) -> None:
    weights = next(path.glob("weights-*"))
    if how == "flipped":
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif how == "a file gone":
        weights.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "manifest garbled":
        (path / "manifest.json").write_bytes(b"{")
    elif how == "manifest of something else":
        (path / "manifest.json").write_bytes(b"[]")
    elif how == "position changed":
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"step": 1}))
    else:
        shutil.rmtree(path)
        path.mkdir()


@pytest.mark.parametrize(
    ("how", "keep"),
    [
        ("flipped", 1), ("a file gone", 2), ("no manifest", 2), ("manifest garbled", 2), ("position changed", 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("flipped", 2), ("truncated", 2), ("manifest of something else", 2), ("empty", 1), ("empty", 2))
        ),
    ],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_same_bits_reached(
    make_config: MakeConfig, live: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, keep: int
) -> None:
    def config_of(name: str) -> Config:
        return make_config(
            name, epochs=4, checkpoint__every=1, checkpoint__keep=keep, cache__dir=tmp_path / f"cache-{name}"
        )

    whole, config = config_of("whole"), config_of("stopped")
    run(whole, ROWS)
    stop_after(config, live, 4)
    newest = newest_checkpoint(config.output_dir)
    if keep == 1:  # the one before was dropped already: put one back
        shutil.copytree(newest, newest.with_name("step-00000005"))
        newest = newest.with_name("step-00000005")
    damage(newest, how)
    trace = run(config, ROWS)
    assert trace.steps[0]["step"] == (5 if keep == 1 else 4)
    assert f"checkpoint {newest.name} is damaged" in caplog.text
    assert "falling back to the one before" in caplog.text
    assert_same_run(whole.output_dir, config.output_dir)
    assert steps_of(config) == ([8] if keep == 1 else [7, 8])
    for path in (config.output_dir / "checkpoints").iterdir():
        read_checkpoint(path)


def test_a_stop_right_after_falling_back_saves_again(
    make_config: MakeConfig, live: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The damaged checkpoint does not stand in the way of the sound one of its step, nor push it out."""
    whole = make_config("whole", epochs=4, cache__dir=tmp_path / "another")
    run(whole, ROWS)
    config = make_config("stopped", epochs=4, checkpoint__every=2, checkpoint__keep=1)
    stop_after(config, live, 2)
    for later in (4, 7):
        shutil.copytree(
            config.output_dir / "checkpoints/step-00000002", config.output_dir / f"checkpoints/step-{later:08d}"
        )
        damage(config.output_dir / f"checkpoints/step-{later:08d}", "flipped")
    stop_after(config, live, 4)
    assert read_checkpoint(newest_checkpoint(config.output_dir)).step == 4
    caplog.clear()
    stop_after(config, live, 5)
    assert not caplog.records
    assert steps_of(config) == [5]
    run(config, ROWS)
    assert_same_run(whole.output_dir, config.output_dir)


def test_where_every_checkpoint_is_damaged_the_run_fails(make_config: MakeConfig, live: Live) -> None:
    config = make_config(epochs=4, checkpoint__every=1, checkpoint__keep=2)
    stop_after(config, live, 4)
    paths = sorted((config.output_dir / "checkpoints").iterdir())
    assert len(paths) == 2
    for path in paths:
        damage(path, "flipped")
    before = {file: file.read_bytes() for path in paths for file in path.iterdir()}
    with pytest.raises(RunFailed, match="every checkpoint in .* is damaged; move the folder away to begin again"):
        run(config, ROWS)
    assert {file: file.read_bytes() for path in paths for file in path.iterdir()} == before
    shutil.rmtree(config.output_dir / "checkpoints")
    assert run(config, ROWS).steps[0]["step"] == 1


def test_every_bit_of_a_checkpoint_is_checked(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    path = newest_checkpoint(config.output_dir)
    rng = random.Random(0)
    for file in (file for file in sorted(path.iterdir()) if file.name != "manifest.json"):
        data = file.read_bytes()
        for offset in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
            flipped = bytearray(data)
            flipped[offset] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(Damaged, match=file.name):
                read_checkpoint(path)
        file.write_bytes(data)
    read_checkpoint(path)


def test_bit_flips_in_the_manifest_of_a_checkpoint_are_found_or_mean_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    path = newest_checkpoint(config.output_dir)
    data = (path / "manifest.json").read_bytes()
    expected = read_checkpoint(path)
    rng = random.Random(0)
    damaged = 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (path / "manifest.json").write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except Damaged:
            damaged += 1
        else:  # white space, or the size in bytes, which is for people
            assert found.state == expected.state
            assert_same_tensors(found.masters, expected.masters)
            assert_same_tensors(found.optimizer, expected.optimizer)
    assert damaged > 100


def test_links_are_not_followed(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    path = newest_checkpoint(config.output_dir)
    weights = next(path.glob("weights-*"))
    elsewhere = weights.rename(config.output_dir / "elsewhere")
    weights.symlink_to(elsewhere)
    with pytest.raises(Damaged):
        read_checkpoint(path)


def test_an_existing_checkpoint_is_never_overwritten(make_config: MakeConfig, live: Live) -> None:
    config = make_config()
    run(config, ROWS)
    assert live.trainer is not None
    path = newest_checkpoint(config.output_dir)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    with torch.no_grad():
        for master in live.trainer.masters.masters.values():
            master.zero_()
    checkpoint.save(path.parent, step=2, state={}, keep=2, world=ALONE, **tensors_of_trainer(live.trainer))
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before
    with pytest.raises(FileExistsError), storage.new_folder(path):
        raise AssertionError("not reached")


def test_a_checkpoint_of_another_model_is_not_loaded(make_config: MakeConfig, live: Live, tied_model: Path) -> None:
    config = make_config("one")
    run(config, ROWS)
    other = make_config("two", model__path=str(tied_model))
    run(other, ROWS)
    assert live.trainer is not None
    before = {name: master.detach().clone() for name, master in live.trainer.masters.masters.items()}
    names = r"lm_head.weight: float32 \[284, 16\] there, missing here"
    with pytest.raises(RunFailed, match=rf"other weights than this model has \({names}\): it belongs to another model"):
        checkpoint.load_latest(config.output_dir / "checkpoints", world=ALONE, **tensors_of_trainer(live.trainer))
    assert_same_tensors({**live.trainer.masters.masters}, before)


def test_restore_brings_back_every_tensor(make_config: MakeConfig, live: Live) -> None:
    config = make_config(dtype="bfloat16")
    run(config, ROWS)
    trainer = live.trainer
    assert trainer is not None
    found = read_checkpoint(newest_checkpoint(config.output_dir))
    moments = {f"{name}/{moment}" for name in found.masters for moment in ("exp_avg", "exp_avg_sq")}
    assert set(found.optimizer) == {"step"} | moments
    with torch.no_grad():
        for master in trainer.masters.masters.values():
            master.fill_(7.0)
        for value in trainer.optimizer.tensors().values():
            value.fill_(7.0)
    trainer.resume()
    for name, master in trainer.masters.masters.items():
        assert same_bits(master, found.masters[name])
        assert same_bits(trainer.masters.parameters[name], found.masters[name].bfloat16())
    assert_same_tensors(trainer.optimizer.tensors(), found.optimizer)


def test_what_is_exported_is_never_older_than_the_last_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last checkpoint is damaged before the export reads it, the run ends, and its steps are repeated."""
    whole = make_config("whole", epochs=4, cache__dir=tmp_path / "another")
    run(whole, ROWS)
    config = make_config("damaged", epochs=4)
    with monkeypatch.context() as patch:
        train_to_the_end = Trainer.run

        def then_damage(trainer: Trainer) -> None:
            train_to_the_end(trainer)
            damage(newest_checkpoint(config.output_dir), "flipped")

        patch.setattr(Trainer, "run", then_damage)
        with pytest.raises(RunFailed, match="the last checkpoint of .* was damaged: run again, to repeat"):
            run(config, ROWS)
    assert not (config.output_dir / "model").exists()
    assert [line["step"] for line in run(config, ROWS).steps] == [7, 8]
    assert_same_run(whole.output_dir, config.output_dir)


def test_an_error_while_saving_leaves_no_folder(tmp_path: Path) -> None:
    class BoomError(Exception):
        pass

    with pytest.raises(BoomError), storage.new_folder(tmp_path / "step-00000001") as temporary:
        (temporary / "half").write_text("x")
        raise BoomError
    assert not list(tmp_path.iterdir())
    assert not leftovers(tmp_path)
