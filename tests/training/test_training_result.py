"""What training computes: the same as a plain loop, whatever the micro-batches; and the same bits every time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import get_scheduler

from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import plan_epoch
from selm_fast.training.metrics import TIMINGS
from selm_fast.training.schedule import learning_rate

from .harness import (
    MakeConfig,
    Trace,
    assert_same_run,
    groups_of,
    make_rows,
    newest_checkpoint,
    own_logp,
    own_model,
    read_checkpoint,
    run,
)

ROWS = make_rows(14, seed=5, duplicates=2)
# AdamW divides by the root of a second moment: a larger eps keeps rounding noise in tiny gradients from being blown up.
SMOOTH = {"optim__eps": 1e-4, "optim__lr": 3e-3}


def plain_loop(config: Config, groups: list[TokenGroup]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The run as anyone would write it: one sequence at a time, the formula of the loss, torch's AdamW; fp64.

    Returns the final weights and, for each step, loss, gradient norm and learning rate.
    """
    policy, reference = (own_model(str(config.model.path), torch.float64) for _ in range(2))
    optim, beta, smoothing = config.optim, config.beta, config.label_smoothing
    weights = dict(policy.named_parameters())
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    vectors = [weight for weight in weights.values() if weight.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    per_epoch = math.ceil(len(groups) / config.batch.groups)
    total = per_epoch * config.epochs
    schedule = get_scheduler(optim.schedule, adamw, math.ceil(total * optim.warmup), total)
    log = []
    for epoch in range(config.epochs):
        plan = plan_epoch(
            groups, groups_per_step=config.batch.groups, max_tokens=10**6, seed=config.seed, epoch=epoch,
            shuffle=config.batch.shuffle,
        )  # fmt: skip
        for step in plan.steps:
            members = [groups[i] for micro_batch in step for i in micro_batch]
            losses = []
            for group in members:
                named = {"chosen": group.chosen, "rejected": group.rejected, "explored": group.explored}
                ratios = {}
                for name, response in named.items():
                    if response is not None:
                        with torch.no_grad():
                            base = own_logp(reference, group.prompt, response)
                        ratios[name] = own_logp(policy, group.prompt, response) - base
                margin = beta * (ratios["chosen"] - ratios["rejected"])
                loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
                if "explored" in ratios:
                    loss = loss + config.exploration_weight * ratios["explored"]
                losses.append(loss)
            mean_loss = torch.stack(losses).sum() / len(members)
            adamw.zero_grad()
            mean_loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), optim.max_grad_norm)
            log.append({"loss": mean_loss.item(), "grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]})
            adamw.step()
            schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}, log


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__warmup": 0.4, "optim__weight_decay": 0.3},
        {"method": "xpo", "alpha": 0.2, "optim__schedule": "linear", "optim__max_grad_norm": 100.0},
        {"method": "dpo", "alpha": 0.0, "epochs": 2, "label_smoothing": 0.2, "optim__schedule": "constant"},
        {"alpha": 5.0, "beta": 0.5, "batch__shuffle": False, "optim__beta1": 0.5, "optim__beta2": 0.7},
    ],
    ids=["selm, warm-up, decay", "xpo, linear", "dpo, two epochs, smoothing", "strong exploration"],
)
def test_training_equals_a_plain_loop(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    config = make_config(**SMOOTH | changes)
    trace = run(config, ROWS)
    weights, log = plain_loop(config, groups_of(config, ROWS))
    assert len(trace.steps) == len(log)
    for line, expected in zip(trace.steps, log, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=2e-5, abs=1e-12), (line["step"], name)
    found = read_checkpoint(newest_checkpoint(config.output_dir)).masters
    started = dict(own_model(str(config.model.path), torch.float64).named_parameters())
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        moved = (weight - started[name]).abs().max()
        assert (found[name] - weight).abs().max() < 1e-5 + 1e-3 * moved, name


@pytest.mark.parametrize(
    "changes", [{}, {"model__activation_checkpointing": "full"}, {"head_mode": "recompute"}], ids=str
)
def test_result_does_not_depend_on_the_micro_batches(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    traces: dict[int, Trace] = {}
    masters: dict[int, dict[str, Tensor]] = {}
    for max_tokens in (95, 200, 10_000):
        own = {"batch__max_tokens": max_tokens, "cache__dir": tmp_path / f"cache-{max_tokens}"}
        config = make_config(f"run-{max_tokens}", batch__groups=7, **own, **SMOOTH, **changes)
        traces[max_tokens] = run(config, ROWS)
        masters[max_tokens] = read_checkpoint(newest_checkpoint(config.output_dir)).masters
    for max_tokens in (95, 200):
        for name, weight in masters[10_000].items():
            assert (masters[max_tokens][name] - weight).abs().max() < 1e-5, name
        for line, expected in zip(traces[max_tokens].steps, traces[10_000].steps, strict=True):
            assert line.keys() == expected.keys()
            for name in line.keys() - set(TIMINGS):
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_command_twice_gives_the_same_bits(
    make_config: MakeConfig, eval_file: str, tmp_path: Path, dtype: str
) -> None:
    configs = [
        make_config(name, dtype=dtype, epochs=2, data__eval=eval_file, cache__dir=tmp_path / f"cache-{name}")
        for name in ("one", "two")
    ]
    for config in configs:
        run(config, ROWS)
    assert_same_run(configs[0].output_dir, configs[1].output_dir)


def test_another_seed_gives_another_run(make_config: MakeConfig) -> None:
    first, second = make_config("one"), make_config("two", seed=43)
    lines = [run(config, ROWS).steps[-1]["loss"] for config in (first, second)]
    assert lines[0] != lines[1]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (1, 1.0), (10, 0.0), (10, 0.1), (7, 0.3), (100, 1.0)])
def test_schedule_is_that_of_transformers(name: str, total: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-7)
    kind = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(kind, optimizer, math.ceil(total * warmup), total)
    for step in range(total):
        ours = learning_rate(step, peak=5e-7, total=total, warmup=warmup, schedule=name)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        theirs.step()
