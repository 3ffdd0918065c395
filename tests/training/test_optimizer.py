"""The optimiser: what it takes on a GPU, and how its state comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selm_fast.config import Config
from selm_fast.training import checkpoint
from selm_fast.training.masters import Masters
from selm_fast.training.optimizer import AdamW, gradient_norm

from .harness import ALONE

CONFIG = Config.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}})
BF16_MOMENTS = CONFIG.model_copy(update={"optim": CONFIG.optim.model_copy(update={"moments": "bfloat16"})})


def masters_of(size: int, device: str) -> Masters:
    torch.manual_seed(0)
    return Masters(nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size)).to(device), torch.float32)


def steps(masters: Masters, optimizer: AdamW, number: int, first: int = 0) -> list[Tensor]:
    one, no = (torch.tensor(value, device=optimizer.step.device) for value in (1.0, False))
    for step in range(first, first + number):
        for master in masters.masters.values():
            master.grad = torch.full_like(master, 0.1 + step)
        optimizer.apply(1e-3, grad_scale=one, skip=no)
    return [master.detach().clone() for master in masters.masters.values()]


def tensors(masters: Masters, optimizer: AdamW) -> dict[str, Any]:
    """What a checkpoint is given of both."""
    return {"weights": masters.masters, "optimizer": optimizer.tensors(), "world": ALONE}


@pytest.mark.parametrize("config", [CONFIG, BF16_MOMENTS], ids=["float32", "bfloat16"])
def test_state_comes_back(tmp_path: Path, config: Config) -> None:
    whole = masters_of(8, "cpu")
    expected = steps(whole, AdamW(whole.masters, config), 5)

    stopped = masters_of(8, "cpu")
    optimizer = AdamW(stopped.masters, config)
    steps(stopped, optimizer, 3)
    checkpoint.save(tmp_path, step=3, state={}, keep=1, **tensors(stopped, optimizer))

    resumed = masters_of(8, "cpu")
    optimizer = AdamW(resumed.masters, config)
    assert checkpoint.load_latest(tmp_path, **tensors(resumed, optimizer)) is not None
    for one, other in zip(steps(resumed, optimizer, 2, first=3), expected, strict=True):
        assert torch.equal(one, other)


def test_weights_step_as_in_torch() -> None:
    """Decay of matrices alone, as in transformers; a step that is skipped does not count."""
    config = CONFIG.model_copy(update={"optim": CONFIG.optim.model_copy(update={"weight_decay": 0.1})})
    masters, like = masters_of(8, "cpu"), masters_of(8, "cpu")
    matrices, vectors = ([p for p in like.masters.values() if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    optimizer = AdamW(masters.masters, config)
    one = torch.tensor(1.0)
    for step in range(4):
        for name, master in masters.masters.items():
            master.grad = torch.full_like(master, 0.1 + step)
            like.masters[name].grad = master.grad.clone()
        torchs.step()
        optimizer.apply(1e-3, grad_scale=one, skip=torch.tensor(False))
        for master in masters.masters.values():
            master.grad = torch.full_like(master, torch.nan)
        optimizer.apply(1e-3, grad_scale=one, skip=torch.tensor(True))
    assert optimizer.step.item() == 4
    for name, master in masters.masters.items():
        assert torch.equal(master, like.masters[name]), name


@pytest.mark.parametrize(("config", "width"), [(CONFIG, torch.float32), (BF16_MOMENTS, torch.bfloat16)])
def test_moments_have_the_dtype_that_is_asked_for(config: Config, width: torch.dtype) -> None:
    masters = masters_of(8, "cpu").masters
    found = AdamW(masters, config).tensors()
    assert found.keys() == {"step"} | {f"{name}/{kind}" for name in masters for kind in ("exp_avg", "exp_avg_sq")}
    assert {t.dtype for name, t in found.items() if name != "step"} == {width}
    assert all(found[f"{name}/exp_avg"].shape == master.shape for name, master in masters.items())


def test_the_norm_is_that_of_all_gradients_and_nan_where_the_loss_is() -> None:
    masters = masters_of(8, "cpu").masters
    for master in masters.values():
        master.grad = torch.randn_like(master)
    expected = torch.nn.utils.get_total_norm([master.grad for master in masters.values()])
    assert torch.equal(gradient_norm(masters, torch.tensor(1.0), ALONE), expected)
    assert gradient_norm(masters, torch.tensor(torch.inf), ALONE).isnan()
    next(iter(masters.values())).grad[0, 0] = torch.inf
    assert not gradient_norm(masters, torch.tensor(1.0), ALONE).isfinite()


@pytest.mark.gpu
def test_a_step_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Weights, gradients and two moments, 16 bytes a weight, as the recipes say and `check_room` counts."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    masters = masters_of(4096, "cuda")
    optimizer = AdamW(masters.masters, CONFIG)
    steps(masters, optimizer, 1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one, no = torch.tensor(1.0, device="cuda"), torch.tensor(False, device="cuda")
    optimizer.apply(1e-3, grad_scale=one, skip=no)
    assert torch.cuda.max_memory_allocated() - before < 4096**2  # a quarter of what one copy takes

    saved = checkpoint.save(tmp_path, step=1, state={}, keep=1, **tensors(masters, optimizer))
    assert saved.exists()
    resumed = masters_of(4096, "cuda")
    again = AdamW(resumed.masters, CONFIG)
    assert checkpoint.load_latest(tmp_path, **tensors(resumed, again)) is not None
    for one, other in zip(steps(resumed, again, 2), steps(masters, optimizer, 2), strict=True):
        assert torch.equal(one, other)
