"""A world of 16 responses, its base model, and a policy that has moved away from it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from benchmarks.exploration.environment import Environment, Settings, make_environment
from benchmarks.exploration.experiment import Outcome, Training, run
from benchmarks.exploration.tiny_llama import make_base

SETTINGS = Settings(vocabulary=4, train_prompts=24, held_out_prompts=16)
TRAINING = Training(iterations=2, groups=8)
SEED = 7


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def environment() -> Environment:
    return make_environment(SETTINGS, SEED)


@pytest.fixture(scope="session")
def base_weights(environment: Environment) -> Mapping[str, Tensor]:
    return make_base(environment, SEED, steps=40).state_dict()


@pytest.fixture(scope="session")
def trained(environment: Environment, base_weights: Mapping[str, Tensor]) -> dict[str, Outcome]:
    """Runs by method; SELM at alpha .3."""
    return {
        name: run(name, environment, base_weights, alpha=0.3, lr=4e-3, seed=SEED, training=TRAINING)
        for name in ("dpo", "selm")
    }
