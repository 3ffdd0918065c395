"""MFU: useful FLOPs counted by hand, over what the machine was measured to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan
from selm_fast.roofline import Shape
from selm_fast.training.machine import matmul_flops
from selm_fast.training.utilisation import Utilisation

from .harness import MakeConfig, make_rows, run
from .ranks import in_ranks

SHAPE = Shape.from_config(
    {
        "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 12, "vocab_size": 50,
    }
)  # fmt: skip
BODY = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)  # q, k and v, o, and the three of the gated layer
PROMPT, ONE, OTHER = [1, 2, 3, 4], [5, 6, 7], [8, 9]


def by_hand(prompt: int, *responses: int) -> float:
    """Forward and backward of [prompt + first | second | ...], each without its last token; three forwards in all."""
    tokens = prompt - 1 + sum(responses)
    pairs = prompt * (prompt - 1) / 2  # causal
    for length in responses:
        pairs += sum(prompt + nth for nth in range(length))  # the prompt's last token is of the response's rows
    return 3 * (2 * BODY * tokens + 4 * 3 * 2 * 4 * pairs + 2 * 50 * 8 * sum(responses))


@pytest.mark.parametrize(
    ("explored", "responses"), [(None, (3, 2)), (ONE, (3, 2)), (OTHER, (3, 2)), ([3, 3, 3, 3], (3, 2, 4))]
)
def test_useful_flops_by_hand(explored: list[int] | None, responses: tuple[int, ...]) -> None:
    """A prompt counts once, and a response that serves twice too."""
    plan = Plan([TokenGroup(PROMPT, ONE, OTHER, explored)] * 2, (((0, 1), ()),), 2)
    flops = Utilisation(SHAPE, 2, 1e9).flops_of(plan, 0)
    assert flops == pytest.approx(2 * by_hand(4, *responses), rel=1e-12)


def test_it_is_a_share_of_what_all_devices_could_do() -> None:
    assert Utilisation(SHAPE, 4, 100.0).of(800.0, 5.0) == 0.4
    assert math.isnan(Utilisation(None, 1, 1.0).flops_of(Plan([], ((),)), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_that_of_a_machine(dtype: torch.dtype) -> None:
    peak = matmul_flops(torch.device("cpu"), dtype)
    assert 1e6 < peak < 1e15


def test_it_is_among_the_metrics_of_every_step(make_config: MakeConfig, tmp_path: Path) -> None:
    def logged(name: str) -> list[float]:
        return [line["mfu"] for line in run(make_config(name), make_rows(8)).steps]

    found = [logged("run-0"), in_ranks(2, lambda _: logged("run-2"), tmp_path / "answers")[0]]
    for values in found:
        assert len(values) == 2
        assert all(0 < value < 1 for value in values)
