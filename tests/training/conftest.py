"""A tokenizer, models and rows small enough that a whole run takes a fraction of a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.config import Config
from selm_fast.model import Policy
from selm_fast.training.loop import Trainer
from selm_fast.training.signals import StopFlag

from .harness import Live, MakeConfig, make_rows, override, write_model, write_rows

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Every test asks for `one_thread`: a forked child finds no lost thread pool, too."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync takes milliseconds and matters to a power cut alone; that it is called is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model most tests train: fp32, untied."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with tied embeddings."""
    return write_model(tmp_path_factory.mktemp("tied"), seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16, as models come."""
    return write_model(tmp_path_factory.mktemp("bf16"), seed=2, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than `tiny_model`: a reference of its own."""
    return write_model(tmp_path_factory.mktemp("other"), seed=3)


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Held-out rows, enough for some micro-batches; equal ones meet different neighbours."""
    return str(write_rows(tmp_path_factory.mktemp("eval") / "eval.jsonl", make_rows(9, seed=100, duplicates=4)))


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> MakeConfig:
    """Settings of a tiny run in `tmp_path / name`; `optim__lr=1e-4` sets optim.lr.

    12 groups at 4 a step make 3 steps; 120 tokens make two or more micro-batches of a step.
    """

    def make(name: str = "run", **overrides: Any) -> Config:
        settings: dict[str, Any] = {
            "output_dir": tmp_path / name,
            "beta": 0.1,
            "alpha": 0.01,
            "device": "cpu",
            "model": {"path": str(tiny_model)},
            "data": {"max_length": 64, "max_prompt_length": 40},
            "batch": {"groups": 4, "max_tokens": 120},
            "optim": {"lr": 1e-3, "warmup": 0.0},
            "cache": {"dir": tmp_path / "cache"},
            "checkpoint": {"every": 2},
            "timeout_s": 60,  # of several processes: a fault is not to take ten minutes
        }
        return Config.model_validate(override(settings, overrides))

    return make


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Gives the stop flag and the trainer of the run under way."""
    seen = Live()
    make_flag, run_trainer = StopFlag.__init__, Trainer.run

    def made(self: StopFlag) -> None:
        make_flag(self)
        seen.stop = self

    def ran(self: Trainer) -> None:
        seen.trainer = self
        run_trainer(self)

    monkeypatch.setattr(StopFlag, "__init__", made)
    monkeypatch.setattr(Trainer, "run", ran)
    return seen


@pytest.fixture
def reference_forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, ...]]:
    """The sequence keys of each reference forward, in order; forwards of training and evaluation are left out."""
    seen: list[tuple[bytes, ...]] = []
    sequence_logps, forward = Policy.sequence_logps, Policy.forward
    in_loss = False

    def counted(self: Policy, batch: Any) -> Tensor:
        if not in_loss:
            seen.append(batch.sequence_keys)
        return sequence_logps(self, batch)

    def marked(self: Policy, *arguments: Any, **settings: Any) -> Any:
        nonlocal in_loss
        in_loss = True
        try:
            return forward(self, *arguments, **settings)
        finally:
            in_loss = False

    monkeypatch.setattr(Policy, "sequence_logps", counted)
    monkeypatch.setattr(Policy, "forward", marked)
    return seen
