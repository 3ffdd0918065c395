"""Both forms of a checkpoint load; what is none is refused before any work, by what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from selm_fast.errors import Refused
from selm_fast.pairrm.checkpoint import check_checkpoint, find
from tests.pairrm.conftest import SMALL, load

Change = Callable[[Path], None]


def config(**settings: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), "utf-8")

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor] | None) -> Change:
    """Put another tensor in the place of one, or take it away."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        old = tensors.pop(name, torch.zeros(1))
        if make is not None:
            tensors[name] = make(old).contiguous()
        safetensors.torch.save_file(tensors, path)

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, "utf-8") and None


LAYER = "pretrained_model.encoder.layer.1.output.dense."
BOTH = [
    (pickled, "pytorch_model.bin, and pickles run code on load"),
    (damaged, "model.safetensors cannot be read"),
    (without("tokenizer.json"), "has no tokenizer.json"),
    (without("config.json"), "has no config.json"),
    (text("config.json", "{"), "not JSON"),
    (text("config.json", "[]"), "expected a mapping"),
    (config(model_type="bert"), "model_type 'bert'; expected 'pairranker' and 'deberta'"),
    (tensor("head_layer.1.weight", lambda old: old[:, 1:]), "head_layer.1.weight is"),
    (tensor("head_layer.4.bias", None), "head_layer.4.bias is not there"),
    (tensor("pretrained_model.embeddings.word_embeddings.weight", lambda old: old[:-1]), "checkpoint|expected"),
]
HF = [
    (config(hidden_size=48), "expected"),
    (config(hidden_size=None), "no whole number"),
    (config(source_prefix_id=7), "config.json says"),
    (config(share_att_key=False), "share_att_key = False, expected True"),
    (config(pos_att_type="c2p"), "pos_att_type"),
]


@pytest.mark.parametrize(("change", "message"), BOTH)
@pytest.mark.parametrize("form", ["folder", "hf_folder"])
def test_what_is_no_pairrm_is_refused_before_any_work(
    form: str, change: Change, message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    refused(request.getfixturevalue(form), change, message, tmp_path)


@pytest.mark.parametrize(("change", "message"), HF)
def test_settings_that_disagree_with_the_files_are_refused(
    change: Change, message: str, tmp_path: Path, hf_folder: Path
) -> None:
    refused(hf_folder, change, message, tmp_path)


def refused(source: Path, change: Change, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    check_checkpoint(str(folder))
    change(folder)
    for refusing in (lambda: check_checkpoint(str(folder)), lambda: load(folder)):
        with pytest.raises(Refused, match=message):
            refusing()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor(LAYER + "weight", None), rf"{LAYER}weight is missing"),
        (tensor(LAYER + "bias", lambda old: old[1:]), rf"{LAYER}bias is \(63,\), expected \(64,\)"),
        (tensor("pretrained_model.pooler.weight", lambda old: old), "pretrained_model.pooler.weight is unexpected"),
    ],
)
def test_every_tensor_has_its_place(change: Change, message: str, tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "changed")
    change(tmp_path / "changed")
    with pytest.raises(Refused, match=message):
        load(tmp_path / "changed")


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "~missing", "", "one-word", "a/b/c", __file__])
def test_what_is_neither_a_folder_nor_a_name_is_refused(source: str) -> None:
    with pytest.raises(Refused, match="neither a folder nor a name on the hub"):
        check_checkpoint(source)


def test_a_name_on_the_hub_is_not_fetched_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_: pytest.fail("fetched"))
    check_checkpoint("llm-blender/PairRM")


def test_a_name_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(source: str, name: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr("transformers.utils.hub.cached_file", offline)
    with pytest.raises(Refused, match="cannot get config.json of llm-blender/PairRM: no network"):
        find("llm-blender/PairRM")


def test_of_the_hub_come_json_and_safetensors_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def cached(source: str, name: str) -> str:
        names.append(name)
        return str(folder / name)

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    assert find("some/pairrm").limits == SMALL
    assert sorted(names) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_encoder_of_pairrms_own_form_is_a_deberta_v3_in_the_sizes_of_its_tensors(folder: Path) -> None:
    encoder = find(str(folder)).encoder
    assert [encoder[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")] == [64, 2, 1]
    assert (encoder["intermediate_size"], encoder["position_buckets"]) == (256, 256)


def test_looking_at_a_checkpoint_does_not_import_torch(folder: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from selm_fast.pairrm.checkpoint import check_checkpoint as check; check(sys.argv[1]); "
    code += "import selm_fast.pairrm.work; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == 0
