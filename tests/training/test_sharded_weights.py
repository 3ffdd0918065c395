"""Weights come from their files straight into shards: each process reads its rows, and nobody holds the model."""

from __future__ import annotations

import gc
import json
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from selm_fast.errors import Refused
from selm_fast.model import Policy, streaming
from selm_fast.model.sharding import first_row, local, materialise, named_shards, shard
from selm_fast.model.streaming import build, stream
from selm_fast.training.dither import dither_
from selm_fast.training.masters import spread
from selm_fast.training.weights import load
from selm_fast.training.world import World
from tests import helpers_models

from .harness import (
    MakeConfig,
    groups_of,
    make_rows,
    own_logp,
    own_model,
    read_metrics,
    run,
    same_bits,
    tensors_of,
    write_model,
)
from .ranks import in_ranks, train_in
from .shards import in_world, placed

FP32 = torch.float32


def streamed(folder: Path, world: World, dtype: torch.dtype = FP32) -> Policy:
    """The model of a folder, sharded over a world."""
    assert world.mesh is not None
    policy = Policy(build(str(folder), trust_remote_code=False), source=str(folder))
    shard(policy, world.mesh, dtype)
    materialise(policy, world.device)
    stream(str(folder), named_shards(policy.model))
    return policy


def assert_is(policy: Policy, folder: Path) -> None:
    """Every parameter and buffer is that of the model as transformers loads it, to the bit."""
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    expected = dict(own.named_parameters())
    found = named_shards(policy.model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        start, part = first_row(weight), local(weight.data)
        assert same_bits(part, expected[name][start : start + part.shape[0]]), name
    buffers = dict(own.named_buffers())
    assert buffers
    for name, buffer in policy.model.named_buffers():
        assert same_bits(buffer, buffers[name]), name


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama tied", "gemma3", "phi"))]
)
def test_each_process_reads_its_rows_alone(tmp_path: Path, family: str) -> None:
    """Together every row once; from several files, tied embeddings, rotary frequencies of two kinds, a biased head."""
    folder = tmp_path / "model"
    helpers_models.tiny_model(family).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2

    def read(world: World) -> dict[str, list[list[int]]]:
        seen: dict[str, list[list[int]]] = defaultdict(list)
        opened = safetensors.safe_open

        class Slice:
            def __init__(self, name: str, stored: Any) -> None:
                self.name, self.stored = name, stored

            def get_shape(self) -> Any:
                return self.stored.get_shape()

            def __getitem__(self, rows: slice) -> Tensor:
                seen[self.name].append([rows.start, rows.stop])
                return self.stored[rows]  # type: ignore[no-any-return]

        class File:
            def __init__(self, *arguments: Any, **settings: Any) -> None:
                self.file = opened(*arguments, **settings)

            def __enter__(self) -> File:
                self.file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.__exit__(*error)

            def keys(self) -> Any:
                return self.file.keys()

            def get_slice(self, name: str) -> Slice:
                return Slice(name, self.file.get_slice(name))

        with mock.patch.object(streaming, "safe_open", File):
            policy = streamed(folder, world)
        assert_is(policy, folder)
        return seen

    shapes = {name: weight.shape for name, weight in helpers_models.tiny_model(family).named_parameters()}
    for size in (1, 2, 4):
        parts = in_world(size, read, tmp_path / "answers")
        for name, shape in shapes.items():
            read_rows = [row for part in parts for start, stop in part.get(name, []) for row in range(start, stop)]
            assert sorted(read_rows) == list(range(shape[0])), name


def test_a_model_is_built_without_memory_for_its_parameters(tmp_path: Path) -> None:
    """And nothing that is built later is left so."""
    helpers_models.tiny_model("llama tied").save_pretrained(tmp_path)
    model = build(str(tmp_path), trust_remote_code=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.nn.Linear(2, 2).weight.is_meta


def rewritten(folder: Path, change: Any) -> None:
    """A model folder whose weights are changed: by name, in place."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def refusal(folder: Path, world: World) -> str:
    with pytest.raises(Refused) as info:
        streamed(folder, world)
    return str(info.value)


def test_files_that_are_not_of_the_model_are_refused_by_all(tmp_path: Path) -> None:
    missing, shapes, none, broken, index = (
        tmp_path / name for name in ("missing", "shapes", "none", "broken", "index")
    )
    for folder in (missing, shapes, none, broken, index):
        write_model(folder)
    rewritten(missing, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    rewritten(shapes, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(15)}))
    (none / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    (index / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    )

    def act(world: World) -> list[str]:
        return [refusal(folder, world) for folder in (missing, shapes, none, broken, index)]

    one, other = in_world(2, act, tmp_path / "answers")
    assert one == other
    assert (
        f"{missing} has no weights named model.layers.1.mlp.up_proj.weight: its files are not of this model" in one[0]
    )
    assert f"model.norm.weight in {shapes}/model.safetensors is (15,) and the model's is (16,)" in one[1]
    for text, folder in zip(one[2:], (none, broken, index), strict=True):
        assert text.startswith(f"cannot load the weights of {folder}: ")


def test_bf16_files_weights_that_nobody_asks_for_and_tied_names_stored_twice(tmp_path: Path) -> None:
    write_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewritten(tmp_path / "model", change)

    def act(world: World) -> None:
        policy = streamed(tmp_path / "model", world, torch.bfloat16)
        assert {weight.dtype for weight in policy.model.parameters()} == {FP32}
        assert_is(policy, tmp_path / "model")

    in_world(2, act, tmp_path / "answers")


# What is derived from weights does not depend on who holds them.


def test_random_weights_and_digests_are_those_of_one_process(
    make_config: MakeConfig, tmp_path: Path, tiny_model: Path
) -> None:
    config = make_config(model__path=None, model__init=tiny_model / "config.json", model__tokenizer=str(tiny_model))

    def digests(world: World) -> list[str]:
        return [load(config, None, world, dtype).digest for dtype in (FP32, torch.bfloat16)]

    (expected,) = in_world(0, digests, tmp_path)
    assert len(set(expected)) == 2
    for size in (1, 2, 4):
        assert in_world(size, digests, tmp_path / "answers") == [expected] * size


def test_the_masters_of_a_run_are_the_source_of_another(make_config: MakeConfig, tmp_path: Path) -> None:
    """Made by two processes, read by four: its fp32 weights to the bit, and not spread again."""
    rows = make_rows(6, seed=3)
    first = make_config("first", dtype="bfloat16")
    train_in(2, first, rows, tmp_path / "answers")

    def config_of(size: int) -> Any:
        return make_config(f"second-{size}", dtype="bfloat16", model__path=str(first.output_dir), optim__lr=1e-30)

    found = []
    for size in (0, 4):
        lines = train_in(size, config_of(size), rows, tmp_path / "answers")[0]
        assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        record = json.loads((tmp_path / f"second-{size}" / "run.json").read_text())
        found.append((record["weights"], tensors_of(tmp_path / f"second-{size}" / "model")))
    assert found[0][0] == found[1][0]
    for name, weight in tensors_of(first.output_dir / "model").items():
        assert same_bits(found[1][1][name], weight), name


@pytest.mark.parametrize("shape", [(8, 3), (7, 5), (3, 2), (5,), (1, 6)], ids=str)
def test_the_dither_of_shards_is_that_of_the_whole(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Uneven and empty ones among them."""

    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16().float()
    whole = weight.clone()
    dither_(whole, seed=5, name="w")
    assert (whole != weight).any()

    def act(world: World) -> int:
        part = placed({"w": weight}, world)["w"]
        spread({"w": part}, 5)
        start = first_row(part)
        assert same_bits(local(part), whole[start : start + local(part).shape[0]])
        return start

    starts = in_world(4, act, tmp_path)
    assert starts == sorted(starts)


# A reference of its own.


def test_reference_base_is_one_model_after_the_other_and_its_values_are_right(
    make_config: MakeConfig, tmp_path: Path, other_model: Path, tiny_model: Path
) -> None:
    """The first is gone from memory, by itself, before there is any of the second."""
    rows = make_rows(6, seed=81)
    alive: list[weakref.ref[Any]] = []
    left: list[list[str]] = []
    made = Policy.__init__

    def watched(self: Policy, *arguments: Any, **settings: Any) -> None:
        left.append([name for found in alive if (policy := found()) for name, _ in policy.named_parameters()])
        made(self, *arguments, **settings)
        alive.append(weakref.ref(self))

    def train(_rank: int) -> Any:
        gc.disable()
        config = make_config("run-2", model__reference=str(other_model), batch__groups=6)
        with mock.patch.object(Policy, "__init__", watched):
            lines = run(config, rows).lines
        return [left, lines]

    for found, _ in in_ranks(2, train, tmp_path / "answers"):
        assert found == [[], []]
    plain = make_config("run-0", model__reference=str(other_model), batch__groups=6, cache__dir=tmp_path / "other")
    run(plain, rows)
    (one,), (other,) = read_metrics(tmp_path / "run-0"), read_metrics(tmp_path / "run-2")
    assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True)
    policy, reference = own_model(tiny_model, torch.float64), own_model(other_model, torch.float64)
    with torch.no_grad():
        rewards = [
            0.1
            * (own_logp(policy, group.prompt, group.chosen) - own_logp(reference, group.prompt, group.chosen)).item()
            for group in groups_of(plain, rows)
        ]
    assert other["rewards/chosen"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
