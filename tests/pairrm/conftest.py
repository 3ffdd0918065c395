"""A tokenizer, and tiny PairRMs with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.pairrm_checkpoint import make_checkpoint, make_tokenizer
from selm_fast.pairrm.ranker import PairRM
from selm_fast.pairrm.rows import Limits
from tests.pairrm.texts import text

SMALL = Limits(source=40, candidate=14)  # so that texts of some words are cut everywhere
Load = Callable[..., PairRM]


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """The models are tiny."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    drawn = random.Random(7)
    return make_tokenizer([text(drawn, 30) for _ in range(300)], 300)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in PairRM's own form, that cuts early."""
    return make_checkpoint(tmp_path_factory.mktemp("pairrm"), tokenizer, hidden=64, layers=2, heads=1, limits=SMALL)


@pytest.fixture(scope="session")
def hf_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of PairRM-hf, that cuts where PairRM does."""
    path = tmp_path_factory.mktemp("pairrm-hf")
    return make_checkpoint(path, tokenizer, hidden=32, layers=2, heads=2, form="PairRM-hf")


def load(folder: Path, *, max_tokens: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PairRM:
    return PairRM.from_pretrained(str(folder), device=torch.device(device), dtype=dtype, max_tokens=max_tokens)
