"""Hazard 26 for sharded runs: what cannot fit is refused with the setting to change, what may not is warned of."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory_table import MODELS
from selm_fast.config import Config
from selm_fast.errors import Refused
from selm_fast.roofline import Shape
from selm_fast.training import machine
from selm_fast.training.machine import check_room
from selm_fast.training.room import Plan, assumed_group

GIB = 2**30
CUDA = torch.device("cuda")


def plan_of(ranks: int, device: Any = "cuda", **settings: Any) -> Plan:
    config = Config.model_validate(settings)
    return Plan(config, Shape.from_config(MODELS["Llama-3-8B"]), assumed_group(config), ranks, device)


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """Pretends a device of so many GiB, and a disk with so many free."""

    def put(memory: float, disk: float = 1000) -> None:
        monkeypatch.setattr(machine, "memory_bytes", lambda device: int(memory * GIB))
        usage = shutil._ntuple_diskusage(2000 * GIB, 0, int(disk * GIB))  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    return put


def check(plan: Plan, device: torch.device = CUDA) -> None:
    check_room(Path("runs/one"), plan.shape.weights, device, torch.bfloat16, plan)


def test_what_fits_passes_in_silence(has, caplog) -> None:
    has(80)
    check(plan_of(8, model={"activation_checkpointing": "selective"}))
    assert caplog.records == []


def test_hazard_26_a_state_that_does_not_fit_is_refused(has) -> None:
    has(80)
    expected = (
        r"cuda has 80\.0 GiB of memory for each process, and this run is estimated to take \d+\.\d GiB, 121\.2 GiB of "
        r"them for weights, gradients and optimiser: train a smaller model, or on more or larger devices"
    )
    with pytest.raises(Refused, match=expected):
        check(plan_of(1, model={"activation_checkpointing": "full"}))


def test_hazard_26_activations_that_cannot_fit_are_refused_with_the_setting_to_change(has) -> None:
    has(80)
    with pytest.raises(Refused, match="set model.activation_checkpointing to selective; selm-fast estimate tells more"):
        check(plan_of(8))


def test_what_may_not_fit_is_warned_of(has, caplog) -> None:
    has(112)
    with caplog.at_level(logging.WARNING):
        check(plan_of(8))
    (record,) = caplog.records
    assert "set model.activation_checkpointing to selective" in record.getMessage()


def test_processes_on_a_cpu_share_its_memory(has) -> None:
    has(60)
    with pytest.raises(Refused, match=r"cpu has 30\.0 GiB of memory for each process"):
        check(plan_of(2, "cpu"), torch.device("cpu"))


def test_hazard_26_too_little_disk_for_a_checkpoint(has) -> None:
    has(200, disk=100)
    with pytest.raises(Refused, match=r"has 100\.0 GiB free; one checkpoint and the exported model take 104\.7"):
        check(plan_of(8))
    check(plan_of(8, optim={"moments": "bfloat16"}))  # 59.8 and 15.0 GiB
