"""A small model, groups of known lengths, and their work, for the tests of the FLOP and memory models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.model import Policy
from selm_fast.roofline import Work

TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def policy(*, mode: Any = "keep", **changes: Any) -> Policy:
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(LlamaConfig(**TINY | changes)), head_mode=mode)


def some_groups(count: int, vocab: int = 300) -> list[TokenGroup]:
    """Distinct responses of 20, 30 and 25 tokens; in every other group the explored is the chosen."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    found = [TokenGroup(ids(10), ids(20), ids(30), ids(25)) for _ in range(count)]
    return [replace(group, explored=list(group.chosen)) if i % 2 else group for i, group in enumerate(found)]


def work_of(batches: Sequence[PackedBatch]) -> Work:
    works = [
        Work.of_branches(
            batch.cu_seqlens_q.tolist(),
            batch.cu_seqlens_k.tolist(),
            head_rows=batch.targets.shape[0],
            groups=batch.num_groups,
        )
        for batch in batches
    ]
    names = ("tokens", "head_rows", "pairs", "keys", "groups")
    return Work(**{name: sum(getattr(work, name) for work in works) for name in names})


def reference_of(batch: PackedBatch) -> torch.Tensor:
    return torch.full((len(batch.sequence_keys),), -50.0, dtype=torch.float64)
