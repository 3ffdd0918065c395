"""Several processes train as one does: the same losses, gradients and weights, the same bits again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan
from selm_fast.model import Policy
from selm_fast.training.machine import COMPILES_BF16
from selm_fast.training.optimizer import AdamW
from tests import helpers_models

from .harness import (
    MakeConfig,
    Rows,
    assert_same_run,
    assert_same_tensors,
    make_rows,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    run,
    tensors_of,
    write_tokenizer,
)
from .ranks import in_ranks, train_in
from .test_first_step import assert_exact

ROWS = make_rows(24, duplicates=2)
TEN_STEPS: dict[str, Any] = {"batch__groups": 5, "epochs": 2, "checkpoint__every": 100}


def train_watched(size: int, config: Config, rows: Rows, folder: Path) -> list[dict[str, Any]]:
    """Train, and keep the whole gradients of the first step in gradients.safetensors; -> what the first one logged."""
    folder.mkdir(exist_ok=True)
    apply = AdamW.apply

    def train(rank: int) -> list[dict[str, Any]]:
        gradients: dict[str, Tensor] = {}

        def watched(self: AdamW, *arguments: Any, **settings: Any) -> None:
            if not gradients:
                for name, master in self.masters.items():
                    assert master.grad is not None
                    grad = master.grad
                    gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
            apply(self, *arguments, **settings)

        with mock.patch.object(AdamW, "apply", watched):
            lines = run(config, rows).lines
        if rank == 0:
            safetensors.torch.save_file(gradients, folder / "gradients.safetensors")
        return lines

    if size == 0:
        return train(0)
    first, *others = in_ranks(size, train, folder)
    assert all(not lines for lines in others)  # one speaks
    return first  # type: ignore[no-any-return]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """No element is off by more than a share of its tensor's largest."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).abs().max().item()
        assert error <= relative * value.abs().max().item(), name


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])  # Gemma's are, below
def test_any_number_of_processes_trains_as_one(
    make_config: MakeConfig, tmp_path: Path, tiny_model: Path, tied_model: Path, tied: bool
) -> None:
    """Every metric, the gradients of the first step, the weights after ten; one process under FSDP to the bit."""
    model = str(tied_model if tied else tiny_model)

    def config_of(size: int) -> Config:
        return make_config(f"run-{size}", model__path=model, cache__dir=tmp_path / f"cache-{size}", **TEN_STEPS)

    expected = train_watched(0, config_of(0), ROWS, tmp_path / "0")
    gradients = tensors_of(tmp_path / "0")
    weights = read_checkpoint(newest_checkpoint(tmp_path / "run-0"))
    assert len(expected) == 10
    for size in (1, 2, 4):
        train_watched(size, config_of(size), ROWS, tmp_path / str(size))
        found = read_metrics(tmp_path / f"run-{size}")
        for one, other in zip(read_metrics(tmp_path / "run-0"), found, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True)
        assert_close(tensors_of(tmp_path / str(size)), gradients, 1e-5)
        end = read_checkpoint(newest_checkpoint(tmp_path / f"run-{size}"))
        assert_close(end.masters, weights.masters, 1e-5)
        assert_close(end.optimizer, weights.optimizer, 1e-4)  # squares of gradients
    assert_same_run(tmp_path / "run-0", tmp_path / "run-1")
    assert_same_tensors(tensors_of(tmp_path / "1"), gradients)


# bf16 moments are rounded stochastically, by place: the same in every sharding.
BF16: list[Any] = [
    pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    {"dtype": "bfloat16", "optim__moments": "bfloat16", "model__activation_checkpointing": "full"},
    pytest.param({"dtype": "bfloat16", "model__activation_checkpointing": "selective"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", BF16, ids=lambda changes: " ".join(map(str, list(changes.values())[1:])) or "plain")
def test_in_bf16_too(
    make_config: MakeConfig, tmp_path: Path, bf16_model: Path, eval_file: str, changes: dict[str, Any]
) -> None:
    """One process under FSDP: to the bit. Several: the first step is exact, and the rest what bf16 lets them be."""

    def config_of(size: int) -> Config:
        cache = tmp_path / f"cache-{size}"
        more: dict[str, Any] = {"model__path": str(bf16_model), "data__eval": eval_file, "cache__dir": cache}
        return make_config(f"run-{size}", **TEN_STEPS | more | changes | {"epochs": 1})

    train_in(0, config_of(0), ROWS, tmp_path)
    train_in(1, config_of(1), ROWS, tmp_path / "1")
    assert_same_run(tmp_path / "run-0", tmp_path / "run-1")
    first = train_in(2, config_of(2), ROWS, tmp_path / "2")[0]
    assert_exact(first[0], "eval_")
    assert_exact(first[1])
    expected = read_metrics(tmp_path / "run-0")
    for one, other in zip(expected, read_metrics(tmp_path / "run-2"), strict=True):
        name = "loss" if "loss" in one else "eval_loss"
        assert other[name] == pytest.approx(one[name], abs=0.02)
        if "loss" in one and "grad_norm" in one:
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


COMPILED = {"model__compile": True}
EXACT: list[Any] = [
    (4, {"dtype": "bfloat16"}),
    pytest.param((4, {"dtype": "float32"}), marks=pytest.mark.slow),
    (2, {"dtype": "float32", "model__activation_checkpointing": "full"}),
    pytest.param((2, {"dtype": "float32", "model__activation_checkpointing": "selective"}), marks=pytest.mark.slow),
    pytest.param((2, {"dtype": "float32", "method": "xpo"}), marks=pytest.mark.slow),
    pytest.param((2, {"dtype": "float32", "head_mode": "recompute"}), marks=pytest.mark.slow),
    pytest.param((2, {"dtype": "float32", **COMPILED}), marks=pytest.mark.slow),
    pytest.param((2, {"dtype": "float32", **COMPILED, "model__activation_checkpointing": "full"}), marks=pytest.mark.slow),  # noqa: E501
    pytest.param(
        (2, {"dtype": "bfloat16", **COMPILED}),
        marks=[pytest.mark.slow, pytest.mark.skipif(torch.__version__ < COMPILES_BF16, reason="refused there")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case[0]} {' '.join(map(str, case[1].values()))}")
def test_the_first_step_is_exact(
    make_config: MakeConfig, tmp_path: Path, eval_file: str, case: tuple[int, dict[str, Any]]
) -> None:
    size, changes = case
    config = make_config(data__eval=eval_file, **changes)
    trace = train_in(size, config, ROWS[:8] + ROWS[-2:], tmp_path / "answers")[0]
    assert_exact(trace[0], "eval_")
    assert_exact(trace[1])
    assert trace[2]["rewards/margins"] != 0.0


@pytest.mark.parametrize(
    "family",
    ["gemma", "qwen3", "phi3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cohere", "phi", "gemma2"))],
)
def test_families(make_config: MakeConfig, tmp_path: Path, family: str) -> None:
    """Tied embeddings, norms of heads, joint projections, a head with a bias, soft caps: one step at two."""
    folder = tmp_path / "model"
    helpers_models.tiny_model(family, vocab_size=284).save_pretrained(folder)
    write_tokenizer(folder)
    found = []
    for size in (0, 2):
        config = make_config(
            f"run-{size}", model__path=str(folder), batch__groups=8, cache__dir=tmp_path / f"cache-{size}"
        )
        train_watched(size, config, ROWS[:8], tmp_path / str(size))
        found.append(tensors_of(tmp_path / str(size)))
        (line,) = read_metrics(config.output_dir)
        assert line["loss"] == math.log(2)
    assert_close(found[1], found[0], 2e-5)


# Fewer groups than processes.


@pytest.mark.parametrize(("groups", "count"), [(2, 3), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_step_with_fewer_groups_than_processes(
    make_config: MakeConfig, tmp_path: Path, eval_file: str, groups: int, count: int
) -> None:
    """Of four, two or three have nothing to do but to take part, in evaluation too."""
    lines = []
    for size in (0, 4):
        config = make_config(
            f"run-{size}", batch__groups=groups, batch__max_tokens=95, data__eval=eval_file, epochs=2,
            cache__dir=tmp_path / f"cache-{size}",
        )  # fmt: skip
        train_watched(size, config, ROWS[:count], tmp_path / str(size))
        lines.append(read_metrics(config.output_dir))
    for one, other in zip(*lines, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True)
    assert_close(tensors_of(tmp_path / "4"), tensors_of(tmp_path / "0"), 1e-5)
    one, other = (read_checkpoint(newest_checkpoint(tmp_path / f"run-{size}")).masters for size in (0, 4))
    assert_close(other, one, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_what_stands_in_for_a_missing_pack_adds_exactly_nothing(tiny_model: Path, scale: float) -> None:
    """However unlikely the policy finds its tokens."""
    policy = Policy.from_pretrained(tiny_model)
    with torch.no_grad():
        policy.head.weight.mul_(scale)
    plan = Plan([TokenGroup([5, 6, 7], [8, 9], [10], [11, 12])], (((0,), ()),), 2)
    (dummy,) = plan.batches(0, 1)
    assert dummy.num_groups == 0
    assert dummy.sequence_keys == dummy.row_ids == ()
    reference = torch.zeros(dummy.cu_responses.shape[0] - 1, dtype=torch.float64)
    loss, metrics = policy(dummy, reference, beta=0.1, exploration_weight=0.01, num_groups=1)
    assert loss.item() == 0.0
    assert all(value.shape == (0,) for value in metrics.values())
    loss.backward()
    gradients = helpers_models.take_gradients(policy.model)  # all are there: FSDP waits for each
    assert not any(gradient.any() for gradient in gradients.values())
    assert policy.sequence_logps(dummy).min().item() < -2 * scale


# The same command twice.


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_command_twice_gives_the_same_bits(
    make_config: MakeConfig, tmp_path: Path, eval_file: str, size: int
) -> None:
    for name in ("one", "other"):
        config = make_config(
            name, dtype="bfloat16", optim__moments="bfloat16", data__eval=eval_file, epochs=2,
            cache__dir=tmp_path / f"cache-{name}",
        )  # fmt: skip
        train_in(size, config, ROWS[:12], tmp_path / "answers")
    assert_same_run(tmp_path / "one", tmp_path / "other")
    caches = [sorted((tmp_path / f"cache-{name}").rglob("*.safetensors")) for name in ("one", "other")]
    assert [path.read_bytes() for path in caches[0]] == [path.read_bytes() for path in caches[1]]


# What one process knows and the others do not.


def test_a_loss_that_is_not_finite_for_one_process_is_applied_by_none(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its gradients reach all of them; so does a loss whose gradients are finite."""
    config = make_config(epochs=2)
    forward = Policy.forward

    def train(rank: int) -> list[Any]:
        calls = 0

        def broken(self: Policy, *arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            loss, metrics = forward(self, *arguments, **settings)
            if rank == 1 and calls == 2:  # of the second step: a micro-batch each makes a step
                loss = loss + torch.tensor(math.nan, dtype=loss.dtype)  # a constant has no gradient
            return loss, metrics

        with mock.patch.object(Policy, "forward", broken):
            return run(config, ROWS[:12]).steps

    settings = config.model_copy(update={"batch": config.batch.model_copy(update={"max_tokens": 400})})
    config = settings
    steps = in_ranks(2, train, tmp_path / "answers")[0]
    assert [line["bad_steps"] for line in steps] == [0, 1, 1, 1, 1, 1]
    (told,) = [json.loads(line) for line in (config.output_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert told["step"] == 2
    assert len(told["row_ids"]) == 4  # of all processes
    assert read_checkpoint(newest_checkpoint(config.output_dir)).optimizer["step"] == 5


@pytest.mark.parametrize("checkpointing", [pytest.param("none", marks=pytest.mark.slow), "selective", "full"])
def test_reference_values_arrive_unrounded_in_bf16(make_config: MakeConfig, tmp_path: Path, checkpointing: str) -> None:
    """bf16 would make -600.123 of it -600; a recomputed layer must cast as the first time (pytorch issue 159359)."""
    config = make_config(dtype="bfloat16", model__activation_checkpointing=checkpointing, batch__max_tokens=400)
    from selm_fast.training import weights
    from selm_fast.training.world import join

    def measure(_rank: int) -> float:
        with join(torch.device("cpu"), 60) as world:
            policy = weights.load(config, config.model.path, world, torch.bfloat16).policy
            plan = Plan([TokenGroup([5, 6, 7], [8, 9], [10], None, 0)] * 2, (((0,), (1,)),), 2)
            (batch,) = plan.batches(0, world.rank)
            with torch.no_grad():
                own = policy.sequence_logps(batch)
            reference = torch.tensor([-600.123, -600.456], dtype=torch.float64)
            loss, metrics = policy(batch, reference, beta=0.1, num_groups=2)
            loss.backward()
            expected = 0.1 * (own - reference)
            assert metrics["rewards/chosen"].item() == expected[0].item()
            assert metrics["rewards/rejected"].item() == expected[1].item()
            assert all(parameter.grad is not None for parameter in policy.model.parameters())
            return float(metrics["rewards/chosen"])

    one, other = in_ranks(2, measure, tmp_path / "answers")
    assert one == other > 55
