"""The learning rate is that of transformers' schedules of the same names, at every step."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from selm_fast.training.schedule import learning_rate

NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 70, 239])
def test_every_step_is_that_of_transformers(total: int, warmup: float, schedule: str) -> None:
    """With its rounding of the warm-up: 70 * 0.1 is a little more than 7, and 8 steps rise."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-7)
    scheduler = get_scheduler(NAMES[schedule], optimizer, math.ceil(total * warmup), total)
    for step in range(total):
        expected = scheduler.get_last_lr()[0]
        got = learning_rate(step, peak=5e-7, total=total, warmup=warmup, schedule=schedule)
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-22), step
        optimizer.step()
        scheduler.step()


def test_the_warm_up_is_rounded_as_transformers_does(tmp_path: object) -> None:
    pytest.importorskip("accelerate")  # TrainingArguments asks for it
    from transformers import TrainingArguments

    for total in (1, 7, 10, 30, 70, 99, 239):
        for warmup in (0.0, 0.03, 0.1, 0.5):
            arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, use_cpu=True, report_to=[])
            rising = arguments.get_warmup_steps(total)
            rates = [
                learning_rate(step, peak=1.0, total=total, warmup=warmup, schedule="constant") for step in range(total)
            ]
            assert sum(rate < 1.0 for rate in rates) == rising


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(KeyError):
        learning_rate(5, peak=1.0, total=10, warmup=0.0, schedule="polynomial")
