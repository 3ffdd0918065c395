"""A reference other than the policy's start (XPO's base model, a fixed reference): its values are that model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from selm_fast.training.reference_cache import ReferenceLogps

from .harness import (
    Live,
    MakeConfig,
    assert_same_run,
    groups_of,
    make_rows,
    own_logp,
    own_model,
    run,
)

ROWS = make_rows(8, seed=81, duplicates=1)


def formula(config: Any, reference_folder: Path) -> dict[str, float]:
    """Loss and rewards of all rows before the first step, in float64."""
    policy, reference = own_model(str(config.model.path), torch.float64), own_model(reference_folder, torch.float64)
    losses, chosen, rejected = [], [], []
    with torch.no_grad():
        for group in groups_of(config, ROWS):
            ratio = [
                (own_logp(policy, group.prompt, y) - own_logp(reference, group.prompt, y)).item()
                if y is not None
                else 0.0
                for y in (group.chosen, group.rejected, group.explored)
            ]
            margin = config.beta * (ratio[0] - ratio[1])
            losses.append(math.log1p(math.exp(-margin)) + config.exploration_weight * ratio[2])
            chosen.append(config.beta * ratio[0])
            rejected.append(config.beta * ratio[1])
    means = {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected}
    return {name: math.fsum(values) / len(values) for name, values in means.items()}


@pytest.mark.parametrize("method", ["selm", "xpo"])
def test_first_step_equals_the_formula_with_that_reference(
    make_config: MakeConfig, live: Live, other_model: Path, method: str
) -> None:
    config = make_config(method=method, model__reference=str(other_model), batch__groups=8)
    line = run(config, ROWS).steps[0]
    expected = formula(config, other_model)
    assert abs(expected["loss"] - math.log(2)) > 0.01
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-5), name


def test_reference_values_are_those_of_the_other_model(
    make_config: MakeConfig, live: Live, other_model: Path, eval_file: str
) -> None:
    config = make_config(model__reference=str(other_model), data__eval=eval_file)
    run(config, ROWS)
    assert live.trainer is not None
    found: ReferenceLogps = live.trainer.reference
    model = own_model(other_model, torch.float64)
    groups = groups_of(config, ROWS)
    assert len(found.by_key) < sum(len(group.responses()) for group in groups)  # duplicates share a key
    index = 0
    for step in range(live.trainer.steps_per_epoch):
        for batch in live.trainer.plans[0].batches(step):
            with torch.no_grad():
                own = [
                    own_logp(model, groups[row].prompt, response).item()
                    for row in batch.row_ids
                    for response in groups[row].responses()
                ]
            assert found.of(batch, index).tolist() == pytest.approx(own, rel=1e-5)
            index += 1


def test_a_reference_equal_to_the_policy_gives_the_same_run(make_config: MakeConfig, tiny_model: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        own = make_config(f"own-{dtype}", dtype=dtype)
        named = make_config(f"named-{dtype}", dtype=dtype, model__reference=str(tiny_model))
        assert run(own, ROWS).steps[0]["loss"] == math.log(2)
        assert run(named, ROWS).steps[0]["loss"] == math.log(2)
        assert_same_run(own.output_dir, named.output_dir)


def test_the_cache_of_the_other_model_serves_it_and_no_other(
    make_config: MakeConfig, other_model: Path, reference_forwards: list[Any]
) -> None:
    run(make_config("one", model__reference=str(other_model)), ROWS)
    packs = len(reference_forwards)
    assert packs
    run(make_config("two", model__reference=str(other_model)), ROWS)
    assert len(reference_forwards) == packs
    run(make_config("three"), ROWS)  # its own start is the reference
    assert len(reference_forwards) == 2 * packs
    run(make_config("four", model__path=str(other_model)), ROWS)  # the other model again
    assert len(reference_forwards) == 2 * packs


def test_the_policy_that_is_trained_is_not_the_reference(
    make_config: MakeConfig, live: Live, other_model: Path, tiny_model: Path
) -> None:
    config = make_config(model__reference=str(other_model), optim__lr=1e-30)
    run(config, ROWS)
    assert live.trainer is not None
    start = own_model(tiny_model, torch.float32)
    for name, weight in start.named_parameters():
        assert torch.equal(live.trainer.masters.masters[name], weight), name
