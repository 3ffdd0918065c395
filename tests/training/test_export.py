"""The model folder that a run leaves: transformers loads it, and it says what the live policy says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from selm_fast.cli.main import main
from selm_fast.config import Config
from selm_fast.data.packing import pack
from selm_fast.errors import Refused
from selm_fast.training import storage
from selm_fast.training.export import export_run

from .harness import (
    Live,
    MakeConfig,
    assert_same_tensors,
    groups_of,
    leftovers,
    make_rows,
    newest_checkpoint,
    own_logp,
    own_model,
    read_checkpoint,
    run,
    same_bits,
    tensors_of,
)

ROWS = make_rows(9, seed=31, duplicates=1)
WEIGHTS = {".safetensors"}
TEXTS = {".json", ".jsonl", ".md", ".jinja"}


def live_logps(live: Live, config: Config) -> list[float]:
    """Log-prob of every response by the policy that the run left in memory, packed."""
    assert live.trainer is not None
    policy = live.trainer.policy
    with torch.no_grad():
        return [logp for batch in pack(groups_of(config, ROWS)) for logp in policy.sequence_logps(batch).tolist()]


def exported_logps(model: Any, config: Config) -> list[float]:
    """The same by an exported model's own eager forward, a sequence at a time."""
    with torch.no_grad():
        return [
            own_logp(model, group.prompt, response).item()
            for group in groups_of(config, ROWS)
            for response in group.responses()
        ]


@pytest.mark.parametrize("model", ["tiny_model", "tied_model", "bf16_model"])
def test_exported_model_says_what_the_live_policy_says(
    make_config: MakeConfig, live: Live, request: pytest.FixtureRequest, model: str
) -> None:
    path = request.getfixturevalue(model)
    config = make_config(model__path=str(path))
    run(config, ROWS)
    folder = config.output_dir / "model"
    loaded = own_model(folder, torch.float32)
    expected = live_logps(live, config)
    assert exported_logps(loaded, config) == pytest.approx(expected, rel=1e-5)
    start = exported_logps(own_model(path, torch.float32), config)
    assert max(abs(a - b) for a, b in zip(start, expected, strict=True)) > 1e-2  # not the model it began with
    assert loaded.config.tie_word_embeddings == (model == "tied_model")


@pytest.mark.parametrize("model", ["tiny_model", "tied_model", "bf16_model"])
def test_exported_bf16_weights_are_the_ones_that_computed(
    make_config: MakeConfig, live: Live, request: pytest.FixtureRequest, model: str
) -> None:
    config = make_config(dtype="bfloat16", model__path=str(request.getfixturevalue(model)))
    run(config, ROWS)
    assert live.trainer is not None
    computed = dict(live.trainer.policy.model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(config.output_dir / "model")  # dtype as its config says
    assert loaded.dtype == torch.bfloat16
    exported = dict(loaded.named_parameters())
    assert exported.keys() == computed.keys()
    for name, weight in computed.items():
        assert same_bits(exported[name], weight), name
    masters = read_checkpoint(newest_checkpoint(config.output_dir)).masters
    for name, master in masters.items():
        assert same_bits(exported[name], master.bfloat16()), name
        assert not torch.equal(master, master.bfloat16().float()), name  # spread inside their cells


def test_exported_folder_holds_what_it_should(make_config: MakeConfig, tiny_model: Path) -> None:
    config = make_config(batch__groups=5)
    run(config, ROWS)
    folder = config.output_dir / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not any(path.is_dir() or path.is_symlink() for path in folder.iterdir())
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"]
    assert "selm" not in json.dumps(stored)  # nothing of ours is needed to load it
    assert not [key for key, value in stored.items() if value == str(tiny_model)]
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.float32}
    before = AutoTokenizer.from_pretrained(tiny_model)
    after = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "why is the sky blue?"}, {"role": "assistant", "content": "because"}]
    assert after.apply_chat_template(messages, tokenize=True) == before.apply_chat_template(messages, tokenize=True)
    assert after.eos_token_id == before.eos_token_id == 1


def test_no_pickle_is_written_anywhere(make_config: MakeConfig, eval_file: str) -> None:
    config = make_config(dtype="bfloat16", data__eval=eval_file)
    run(config, ROWS)
    files = [path for folder in (config.output_dir, config.cache.dir) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        assert path.suffix in WEIGHTS | TEXTS or path.name == "lock", path
        if path.suffix in TEXTS:
            path.read_text("utf-8")
        if path.suffix in WEIGHTS:  # eight bytes of length, then JSON; not a zip, not a pickle
            assert path.read_bytes()[8:9] == b"{", path


def test_model_card(make_config: MakeConfig) -> None:
    config = make_config(batch__groups=5, epochs=2, method="xpo", alpha=0.25, beta=0.125)
    run(config, ROWS)
    _, header, text = (config.output_dir / "model" / "README.md").read_text("utf-8").split("---\n", 2)
    fields = YAML(typ="safe").load(header)
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"selm_fast", "xpo"} <= set(fields["tags"])
    assert "base_model" not in fields  # a folder of this machine is no name on the hub
    for line in (
        "| method | xpo |",
        "| beta | 0.125 |",
        "| exploration weight | 0.25 |",
        "| steps | 4 |",
        "| seed | 42 |",
    ):
        assert line in text
    assert str(Path(str(config.model.path)).parent) not in header + text  # no path of this machine


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_export_run_in_any_dtype(
    make_config: MakeConfig, tied_model: Path, tmp_path: Path, trained_in: str, dtype: str | None
) -> None:
    config = make_config(dtype=trained_in, model__path=str(tied_model))
    run(config, ROWS)
    out = tmp_path / "exported"
    export_run(config.output_dir, out, dtype)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype or trained_in]
    masters = read_checkpoint(newest_checkpoint(config.output_dir)).masters
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == wanted
    exported = dict(loaded.named_parameters())
    assert exported.keys() == masters.keys()
    for name, master in masters.items():
        assert same_bits(exported[name], master.to(wanted)), name
    if dtype is None:
        assert_same_tensors(tensors_of(out), tensors_of(config.output_dir / "model"))
    assert not leftovers(out.parent)


def test_export_run_refuses_what_it_cannot_write(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    run(config, ROWS)
    out = tmp_path / "out"
    with pytest.raises(Refused, match="holds no run"):
        export_run(tmp_path / "nowhere", out)
    out.mkdir()
    (out / "mine").write_text("keep this")
    with pytest.raises(Refused, match="exists and is never overwritten"):
        export_run(config.output_dir, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(Refused, match="exists and is never overwritten"):
        export_run(config.output_dir, config.output_dir / "model")
    shutil.rmtree(config.output_dir / "checkpoints")
    with pytest.raises(Refused, match="has no checkpoint yet"):
        export_run(config.output_dir, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_export_of_a_run_that_was_stopped_is_of_its_newest_checkpoint(
    make_config: MakeConfig, tmp_path: Path, live: Live
) -> None:
    config = make_config(checkpoint__every=1, checkpoint__keep=5)
    run(config, ROWS)
    shutil.rmtree(config.output_dir / "model")
    shutil.rmtree(newest_checkpoint(config.output_dir))
    second = read_checkpoint(newest_checkpoint(config.output_dir))
    assert second.step == 2
    export_run(config.output_dir, tmp_path / "out", "float32")
    assert_same_tensors(
        {name: tensor for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters()},
        second.masters,
    )
    assert "| steps | 2 |" in (tmp_path / "out" / "README.md").read_text()


def test_export_command(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    run(config, ROWS)
    arguments = ["export", str(config.output_dir), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(arguments) == 0
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(config.output_dir / "model"))
    assert main(arguments) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_weights_in_many_files(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of more than one tensor file are read back whole, and give the same model."""
    run(make_config("one"), ROWS)
    monkeypatch.setattr(storage, "MAX_SHARD", 6000)
    config = make_config("many")
    run(config, ROWS)
    files = sorted(newest_checkpoint(config.output_dir).glob("weights-*"))
    assert len(files) >= 3
    assert_same_tensors(tensors_of(config.output_dir / "model"), tensors_of(config.output_dir / "../one/model"))
    shutil.rmtree(config.output_dir / "model")
    export_run(config.output_dir, tmp_path / "out", "float32")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(config.output_dir / "../one/model"))


def test_exported_model_can_be_trained_again(make_config: MakeConfig) -> None:
    """What one iteration leaves is what the next begins with: its first step is exact too."""
    for dtype in ("float32", "bfloat16"):
        first = make_config(f"first-{dtype}", dtype=dtype)
        run(first, ROWS)
        model = str(first.output_dir / "model")
        second = run(make_config(f"second-{dtype}", dtype=dtype, model__path=model), ROWS)
        assert second.steps[0]["loss"] == math.log(2)
