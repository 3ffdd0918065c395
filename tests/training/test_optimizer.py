"""The optimiser: what it takes on a GPU, and how its state comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from selm_fast.config import Config
from selm_fast.training import checkpoint
from selm_fast.training.masters import Masters
from selm_fast.training.optimizer import make_optimizer

CONFIG = Config.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}})


def masters_of(size: int, device: str) -> Masters:
    torch.manual_seed(0)
    return Masters(nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size)).to(device), torch.float32)


def steps(masters: Masters, optimizer: torch.optim.Optimizer, number: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + number):
        for master in masters.masters.values():
            master.grad = torch.full_like(master, 0.1 + step)
        optimizer.step()
    return [master.detach().clone() for master in masters.masters.values()]


def test_state_comes_back(tmp_path: Path) -> None:
    whole = masters_of(8, "cpu")
    expected = steps(whole, make_optimizer(whole, CONFIG), 5)

    stopped = masters_of(8, "cpu")
    optimizer = make_optimizer(stopped, CONFIG)
    steps(stopped, optimizer, 3)
    checkpoint.save(tmp_path, step=3, masters=stopped, optimizer=optimizer, state={}, keep=1)

    resumed = masters_of(8, "cpu")
    optimizer = make_optimizer(resumed, CONFIG)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    checkpoint.restore(found, resumed, optimizer)
    for one, other in zip(steps(resumed, optimizer, 2, first=3), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_step_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Weights, gradients and two moments, 16 bytes a weight, as the recipes say and `check_room` counts."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    masters = masters_of(4096, "cuda")
    optimizer = make_optimizer(masters, CONFIG)
    steps(masters, optimizer, 1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 4096**2  # a quarter of what one copy takes

    saved = checkpoint.save(tmp_path, step=1, masters=masters, optimizer=optimizer, state={}, keep=1)
    assert saved.exists()
    resumed = masters_of(4096, "cuda")
    again = make_optimizer(resumed, CONFIG)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    checkpoint.restore(found, resumed, again)
    for one, other in zip(steps(resumed, again, 2), steps(masters, optimizer, 2), strict=True):
        assert torch.equal(one, other)
