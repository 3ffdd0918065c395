"""What a finished run leaves for the next one: its fp32 masters, bit for bit, and nothing that stands in the way."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from selm_fast.cli.main import main
from selm_fast.config import Config
from selm_fast.errors import Refused
from selm_fast.model import Policy
from selm_fast.training import final
from selm_fast.training.digest import weights_digest
from selm_fast.training.export import export_run
from selm_fast.training.final import is_run, keep_masters, load_masters
from selm_fast.training.loop import Trainer
from selm_fast.training.run_folder import RunFolder

from .harness import (
    KILLED,
    Crash,
    Live,
    MakeConfig,
    assert_same_run,
    assert_same_tensors,
    disk_points,
    in_child,
    leftovers,
    make_rows,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    run,
    same_bits,
    tensors_of,
    write_recipe,
    write_rows,
)

ROWS = make_rows(9, seed=51, duplicates=1)
OTHER_ROWS = make_rows(9, seed=52)


@pytest.fixture
def first(make_config: MakeConfig, bf16_model: Path) -> Path:
    """A finished run of one iteration in bf16, from a checkpoint in bf16; its masters are kept."""
    config = make_config("first", dtype="bfloat16", model__path=str(bf16_model))
    run(config, ROWS)
    keep_masters(RunFolder(config.output_dir))
    return Path(config.output_dir)


def second(make_config: MakeConfig, first: Path, **settings: Any) -> Config:
    """The settings of an iteration that begins with `first`."""
    return make_config("second", **{"dtype": "bfloat16", "model__path": str(first)} | settings)


def names_and_values(folder: Path) -> dict[str, Tensor]:
    masters, _ = load_masters(RunFolder(folder))
    return masters


def begun_with(config: Config, live: Live, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The masters that a run has before its first step."""
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(
        "selm_fast.training.loop.Trainer._train_step",
        lambda trainer: seen.update({n: m.detach().clone() for n, m in trainer.masters.masters.items()}) or _stop(),
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, OTHER_ROWS)
    return seen


def _stop() -> None:
    raise KeyboardInterrupt


# From one iteration to the next.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_next_iteration_begins_with_the_masters_bit_for_bit(
    make_config: MakeConfig, live: Live, first: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    ended = names_and_values(first)
    config = second(make_config, first, dtype=dtype, grid_dither=True)  # asked for, and yet not applied again
    begun = begun_with(config, live, monkeypatch)
    assert_same_tensors(begun, ended)
    exported = dict(AutoModelForCausalLM.from_pretrained(first / "model").named_parameters())
    assert exported.keys() == begun.keys()
    for name, master in begun.items():
        assert same_bits(master.bfloat16(), exported[name].bfloat16()), name  # the export is their rounding
        assert not torch.equal(master, exported[name].float()), name  # and not them


def test_masters_that_lie_on_the_grid_stay_there(
    make_config: MakeConfig, live: Live, bf16_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before had no dither, and no step moved them: one applied now would be seen in every weight."""
    config = make_config("first", dtype="bfloat16", grid_dither=False, model__path=str(bf16_model), optim__lr=1e-30)
    run(config, ROWS)
    keep_masters(RunFolder(config.output_dir))
    begun = begun_with(second(make_config, Path(config.output_dir)), live, monkeypatch)
    for name, master in begun.items():
        assert torch.equal(master, master.bfloat16().float()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_its_first_step_is_exact(make_config: MakeConfig, first: Path, eval_file: str, dtype: str) -> None:
    trace = run(second(make_config, first, dtype=dtype, data__eval=eval_file), OTHER_ROWS)
    assert trace.steps[0]["loss"] == math.log(2)
    assert trace.evaluations[0]["eval_loss"] == math.log(2)
    assert trace.evaluations[-1]["eval_loss"] != math.log(2)


@pytest.mark.parametrize("kept", [True, False])
def test_the_command_takes_a_run_for_a_model(make_config: MakeConfig, tmp_path: Path, kept: bool) -> None:
    """With masters or with checkpoints alone; configuration and tokenizer come from its assets."""
    config = make_config("first")
    run(config, ROWS)
    ended = read_checkpoint(newest_checkpoint(config.output_dir)).masters
    if kept:
        keep_masters(RunFolder(config.output_dir))
    shutil.rmtree(config.output_dir / "model")  # nobody needs the export
    rows = write_rows(tmp_path / "rows.jsonl", OTHER_ROWS)
    settings = make_config("second", model__path=str(config.output_dir), data__train=str(rows), optim__lr=1e-30)
    assert main(["train", str(write_recipe(settings, tmp_path / "recipe.yaml"))]) == 0
    assert read_metrics(settings.output_dir)[0]["loss"] == math.log(2)
    assert_same_tensors(names_and_values(settings.output_dir), ended)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0  # it is finished, and says so
    files = [{path.name: path.read_bytes() for path in (folder / "assets").iterdir()}
             for folder in (config.output_dir, settings.output_dir)]  # fmt: skip
    assert files[0]["tokenizer.json"] == files[1]["tokenizer.json"]
    assert json.loads(files[0]["config.json"]) == json.loads(files[1]["config.json"])


def test_validate_takes_a_run_for_a_model(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("first")
    run(config, ROWS)
    rows = write_rows(tmp_path / "rows.jsonl", OTHER_ROWS)
    capsys.readouterr()
    assert main(["validate", f"--model.path={config.output_dir}", f"--data.train={rows}"]) == 0
    out = capsys.readouterr().out
    assert "rows: 9 read, 9 used" in out
    assert f"tokenizer: {config.output_dir / 'assets'}, 280 ids" in out
    assert "ends a response: <|eos|>" in out


def test_a_run_may_be_the_reference(make_config: MakeConfig, tiny_model: Path, first: Path) -> None:
    """As with `reference: base` where the run began with another run."""
    trace = run(make_config("other", model__path=str(tiny_model), model__reference=str(first)), OTHER_ROWS)
    exported = str(make_config().output_dir.parent / "exported")
    export_run(first, Path(exported), "float32")
    same = run(make_config("same", model__path=str(tiny_model), model__reference=exported), OTHER_ROWS)
    assert trace.steps[0]["rewards/margins"] == same.steps[0]["rewards/margins"] != 0.0


def test_tied_weights_and_what_ends_a_response_pass_on(make_config: MakeConfig, tied_model: Path, live: Live) -> None:
    config = make_config("first", model__path=str(tied_model))
    run(config, ROWS)
    folder = RunFolder(config.output_dir)
    (folder.assets / "generation_config.json").write_text('{"eos_token_id": [1, 77]}')
    keep_masters(folder)
    next_config = make_config("second", model__path=str(config.output_dir))
    run(next_config, OTHER_ROWS)
    assert live.trainer is not None
    policy = live.trainer.policy
    assert policy.head.weight is policy.body.embed_tokens.weight
    exported = AutoModelForCausalLM.from_pretrained(next_config.output_dir / "model")
    assert exported.generation_config.eos_token_id == [1, 77]
    assert exported.config.tie_word_embeddings


def test_a_killed_second_iteration_goes_on_to_the_bit(make_config: MakeConfig, first: Path) -> None:
    whole = second(make_config, first)
    run(whole, OTHER_ROWS)
    config = whole.model_copy(update={"output_dir": first.parent / "stopped"})

    def end_in_the_third_step() -> None:
        train_step = Trainer._train_step
        left = 3

        def counted(trainer: Trainer) -> bool:
            nonlocal left
            left -= 1
            return train_step(trainer) if left else os._exit(KILLED)

        Trainer._train_step = counted  # type: ignore[method-assign]
        run(config, OTHER_ROWS)

    assert in_child(end_in_the_third_step) == KILLED
    assert newest_checkpoint(config.output_dir).name == "step-00000002"
    run(config, OTHER_ROWS)
    assert_same_run(config.output_dir, whole.output_dir)


# What is kept.


def test_masters_are_a_third_of_the_checkpoint_and_stand_alone(make_config: MakeConfig) -> None:
    config = make_config(checkpoint__every=1, checkpoint__keep=3)
    run(config, ROWS)
    folder = RunFolder(config.output_dir)
    last = newest_checkpoint(folder.path)
    expected = read_checkpoint(last)
    size = sum(path.stat().st_size for path in last.iterdir())
    assert is_run(folder.path)
    assert not is_run(folder.model)
    keep_masters(folder)
    masters, step = load_masters(folder)
    assert_same_tensors(masters, expected.masters)
    assert step == expected.step == 3
    assert not folder.checkpoints.exists()
    kept = {path.name: path for path in folder.masters.iterdir()}
    assert set(kept) == {"weights-00000-00001.safetensors", "weights.json", "state.json", "manifest.json"}
    assert sum(path.stat().st_size for path in kept.values()) < 0.4 * size
    assert {path.stat().st_nlink for path in kept.values()} == {1}


def test_keeping_them_twice_is_keeping_them_once(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    folder = RunFolder(config.output_dir)
    keep_masters(folder)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    keep_masters(folder)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_hazard_31_a_kill_while_they_are_kept_loses_nothing(make_config: MakeConfig) -> None:
    """At every point where something reaches the disk, and between the last of them and the removal."""
    config = make_config()
    run(config, ROWS)
    source = Path(config.output_dir)
    expected = read_checkpoint(newest_checkpoint(source)).masters

    def copy(name: str) -> RunFolder:
        return RunFolder(Path(shutil.copytree(source, source.parent / name)))

    with disk_points() as points:
        keep_masters(copy("counted"))
    assert len(points) >= 4

    for at in range(1, len(points) + 2):
        folder = copy(f"killed-{at}")

        def killed(folder: RunFolder = folder, at: int = at) -> None:
            Crash(at=at).install()
            final.shutil.rmtree = lambda *_, **__: os._exit(KILLED) if folder.masters.exists() else None  # type: ignore[attr-defined]
            keep_masters(folder)

        assert in_child(killed) == KILLED
        assert_same_tensors(load_masters(folder)[0], expected)  # whatever it found
        assert folder.checkpoints.exists()
        keep_masters(folder)
        assert_same_tensors(load_masters(folder)[0], expected)
        assert not folder.checkpoints.exists()
        assert not leftovers(folder.path)


def test_a_removal_that_was_cut_short_is_ended(make_config: MakeConfig) -> None:
    config = make_config(checkpoint__every=1, checkpoint__keep=3)
    run(config, ROWS)
    folder = RunFolder(config.output_dir)
    expected = read_checkpoint(newest_checkpoint(folder.path)).masters
    keep_masters(folder)
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    (folder.checkpoints / "step-00000001" / "state.json").write_text("{")
    assert_same_tensors(load_masters(folder)[0], expected)
    keep_masters(folder)
    assert not folder.checkpoints.exists()


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "manifest", "state"])
def test_damage_is_found_on_read(make_config: MakeConfig, first: Path, damage: str) -> None:
    weights, manifest = first / "masters/weights-00000-00001.safetensors", first / "masters/manifest.json"
    data = bytearray(weights.read_bytes())
    if damage == "bit":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        weights.write_bytes(data[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text("{}")
    else:
        (first / "masters/state.json").write_text('{"step": 99}')
    with pytest.raises(Refused, match=r"first are damaged: .*; train it again"):
        load_masters(RunFolder(first))
    with pytest.raises(Refused, match="are damaged"):
        run(second(make_config, first), OTHER_ROWS)


def test_damage_of_the_checkpoint_is_found_in_the_masters(make_config: MakeConfig) -> None:
    """Their hashes are those that were taken when the checkpoint was written, not when it was kept."""
    config = make_config()
    run(config, ROWS)
    folder = RunFolder(config.output_dir)
    weights = newest_checkpoint(folder.path) / "weights-00000-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    keep_masters(folder)
    with pytest.raises(Refused, match="are damaged"):
        load_masters(folder)


def test_masters_of_another_model_are_refused(make_config: MakeConfig, first: Path) -> None:
    content = json.loads((first / "assets/config.json").read_text())
    (first / "assets/config.json").write_text(json.dumps(content | {"num_hidden_layers": 1}))
    with pytest.raises(Refused, match="are not those of its config.json; was it edited"):
        run(second(make_config, first), OTHER_ROWS)


# Export.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_export_of_kept_masters(first: Path, tmp_path: Path, dtype: str | None) -> None:
    export_run(first, tmp_path / "out", dtype)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    masters = names_and_values(first)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert exported.keys() == masters.keys()
    for name, master in masters.items():
        assert same_bits(exported[name], master.to(wanted)), name
    if dtype is None:
        assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(first / "model"))


def digest_of(policy: Policy) -> str:
    return weights_digest(dict(policy.model.named_parameters()), torch.float32)


def test_weights_of_a_policy_from_masters_are_their_own(first: Path) -> None:
    """Two policies of one run say the same and share nothing with each other."""
    folder = RunFolder(first)
    one, other = (Policy.from_tensors(folder.assets, names_and_values(first)) for _ in range(2))
    assert digest_of(one) == digest_of(other)
    with torch.no_grad():
        one.head.weight.add_(1)
    assert digest_of(one) != digest_of(other)
