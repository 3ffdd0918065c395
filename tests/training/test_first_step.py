"""Step 0 is exact: the reference is the policy before its first step, through the same code and the same packs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from selm_fast.training.machine import COMPILES_BF16
from selm_fast.training.run_train import train

from .harness import MakeConfig, make_rows, read_metrics, run, write_rows

ZEROS = ("rewards/chosen", "rewards/rejected", "rewards/explored", "rewards/margins", "rewards/accuracies")
METHODS: list[dict[str, Any]] = [{"method": "selm"}, {"method": "xpo"}, {"method": "dpo", "alpha": 0.0}]
needs_newer_torch = pytest.mark.skipif(torch.__version__ < COMPILES_BF16, reason="refused with this torch on a CPU")
ROWS = make_rows(13, duplicates=4)  # a last step of one group; equal sequences in several packs


def assert_exact(line: dict[str, Any], prefix: str = "", *, explores: bool = True) -> None:
    """ln 2 and zeros, with no tolerance."""
    assert line[f"{prefix}loss"] == math.log(2)
    assert line[f"{prefix}loss/preference"] == math.log(2)
    assert line[f"{prefix}loss/exploration"] == 0.0
    for name in ZEROS:
        if explores or name != "rewards/explored":
            assert line[prefix + name] == 0.0, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["method"])
def test_first_step_is_exact(
    make_config: MakeConfig, eval_file: str, dtype: str, checkpointing: str, method: dict[str, Any]
) -> None:
    config = make_config(dtype=dtype, model__activation_checkpointing=checkpointing, data__eval=eval_file, **method)
    trace = run(config, ROWS)
    explores = method["method"] != "dpo"
    assert_exact(trace.steps[0], explores=explores)
    assert trace.evaluations[0]["step"] == 0
    assert_exact(trace.evaluations[0], "eval_", explores=explores)
    written = read_metrics(config.output_dir)
    assert_exact(written[0], "eval_", explores=explores)
    assert_exact(written[1], explores=explores)
    assert trace.steps[1]["rewards/margins"] != 0.0  # training moved something


@pytest.mark.parametrize(
    "changes",
    [
        {"batch__max_tokens": 95},
        {"batch__max_tokens": 10_000},
        {"batch__groups": 13},
        {"batch__groups": 1},
        {"head_mode": "recompute"},
        {"head_mode": "keep"},
        {"label_smoothing": 0.1},
        {"grid_dither": True},
        {"beta": 3.7, "alpha": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_every_step_of_an_epoch_is_exact_while_nothing_moves(
    make_config: MakeConfig, dtype: str, changes: dict[str, Any]
) -> None:
    config = make_config(dtype=dtype, optim__lr=1e-30, checkpoint__every=100, **changes)
    trace = run(config, ROWS)
    assert len(trace.steps) == math.ceil(len(ROWS) / config.batch.groups)
    for line in trace.steps:
        explores = line["rewards/explored"] == line["rewards/explored"]  # no such group in the step: NaN
        assert_exact(line, explores=explores)


def test_exact_from_a_cache_that_another_run_made(make_config: MakeConfig) -> None:
    run(make_config("first", dtype="bfloat16"), ROWS)
    assert_exact(run(make_config("second", dtype="bfloat16"), ROWS).steps[0])


def test_exact_when_the_rows_come_from_a_file(make_config: MakeConfig, tmp_path: Any) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = make_config(data__train=str(rows))
    train(config)
    assert_exact(read_metrics(config.output_dir)[0])


@pytest.mark.parametrize("model", ["tied_model", "bf16_model"])
def test_exact_for_tied_embeddings_and_bf16_checkpoints(
    make_config: MakeConfig, request: pytest.FixtureRequest, model: str
) -> None:
    path = str(request.getfixturevalue(model))
    for dtype in ("float32", "bfloat16"):
        assert_exact(run(make_config(dtype, dtype=dtype, model__path=path), ROWS).steps[0])


def test_exact_from_random_weights(make_config: MakeConfig, tiny_model: Any) -> None:
    source = {"init": str(tiny_model / "config.json"), "tokenizer": str(tiny_model)}
    for dtype in ("float32", "bfloat16"):
        assert_exact(run(make_config(dtype, dtype=dtype, model=source), ROWS).steps[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_newer_torch)])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_first_step_is_exact_when_compiled(
    make_config: MakeConfig, eval_file: str, dtype: str, checkpointing: str
) -> None:
    torch.compiler.reset()
    counters.clear()
    config = make_config(
        dtype=dtype, model__compile=True, model__activation_checkpointing=checkpointing, data__eval=eval_file,
        optim__lr=1e-30, checkpoint__every=100,
    )  # fmt: skip
    trace = run(config, ROWS)
    assert counters["frames"]["ok"] >= 2  # with gradients and without
    for line in trace.steps:
        assert_exact(line, explores=line["rewards/explored"] == line["rewards/explored"])
    for line in trace.evaluations:
        assert_exact(line, "eval_")


def test_metrics_hold_ln_2_with_all_its_digits(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    first = (config.output_dir / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["loss"] == math.log(2)
    assert '"loss": 0.6931471805599453' in first
