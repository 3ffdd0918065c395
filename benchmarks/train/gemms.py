"""The bare GEMMs of a step: every matrix product that its mathematics needs, by `torch.mm` and nothing around them.

Forward, and backward by input and weight: three products of every linear layer and of the head, on the rows that
selm_fast packs; for each branch and head of attention two forward and four backward, with keys only as many as a causal
mask leaves on average. Operands and outputs stand in memory already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.train.contestant import Gate, Job
from benchmarks.train.workload import Row
from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack


def run(job: Job, gate: Gate, *, method: str, attention: bool) -> None:
    """Compute the GEMMs of every step, micro-batch by micro-batch. attention: those of attention, too."""
    settings, pools = job.workload.settings, Pools(job)
    steps = [job.rows[i : i + settings.groups] for i in range(0, len(job.rows), settings.groups)]
    calls = [[call for batch in batches(step, job, method) for call in gemms(batch, job, attention)] for step in steps]
    for call in (call for step in calls for call in step):
        call.reserve(pools)
    gate.ready()
    for step in calls:
        for call in step:
            call.run(pools)
        gate.step(0.0, 0.0)


def batches(rows: Sequence[Row], job: Job, method: str) -> list[PackedBatch]:
    """The packs of a step, as selm_fast makes them."""
    groups = [TokenGroup(r.prompt, r.chosen, r.rejected, r.explored if method == "selm" else None) for r in rows]
    return pack(groups, max_tokens=job.workload.settings.max_tokens)


def gemms(batch: PackedBatch, job: Job, attention: bool) -> Iterator[Linear | Attend]:
    """The products of one pack."""
    config = AutoConfig.from_pretrained(job.workload.model)
    width, head_size, inner = config.hidden_size, config.head_dim, config.intermediate_size
    keys, queries = (heads * head_size for heads in (config.num_key_value_heads, config.num_attention_heads))
    layers, rows = config.num_hidden_layers, batch.tokens.shape[0]
    shapes = [(width, queries), *[(width, keys)] * 2, (queries, width), *[(width, inner)] * 2, (inner, width)]
    yield from [Linear(rows, into, out) for into, out in shapes] * layers
    yield Linear(batch.targets.shape[0], width, config.vocab_size)
    if attention:
        for asked, seen in zip(batch.cu_seqlens_q.diff().tolist(), batch.cu_seqlens_k.diff().tolist(), strict=True):
            yield from [Attend(config.num_attention_heads, asked, seen - (asked - 1) // 2, head_size)] * layers


class Pools:
    """Operands and outputs, in memory that all calls share: one place each by its role."""

    def __init__(self, job: Job) -> None:
        self.dtype, self.device = job.workload.compute, job.workload.device
        self.places: dict[str, Tensor] = {}

    def reserve(self, role: str, *shape: int) -> None:
        """Have at least so much room for a role."""
        if role not in self.places or self.places[role].numel() < math.prod(shape):
            self.places[role] = torch.randn(math.prod(shape), device=self.device).to(self.dtype)

    def view(self, role: str, *shape: int) -> Tensor:
        """The place of a role in a shape."""
        return self.places[role][: math.prod(shape)].view(shape)


class Linear(NamedTuple):
    """A linear layer on so many rows."""

    rows: int
    into: int
    out: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By role; y stands for its own gradient, too."""
        x, weight = (self.rows, self.into), (self.out, self.into)
        return {"x": x, "weight": weight, "y": (self.rows, self.out), "dx": x, "dweight": weight}

    def reserve(self, pools: Pools) -> None:
        """Room for it."""
        for role, shape in self.shapes().items():
            pools.reserve(role, *shape)

    def run(self, pools: Pools) -> None:
        """Forward, and backward by input and weight."""
        x, weight, y, dx, dweight = (pools.view(role, *shape) for role, shape in self.shapes().items())
        torch.mm(x, weight.t(), out=y)
        torch.mm(y, weight, out=dx)
        torch.mm(y.t(), x, out=dweight)


class Attend(NamedTuple):
    """One branch of attention: so many heads, queries, and keys that each sees on average."""

    heads: int
    queries: int
    keys: int
    size: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By role; scores and their gradient share a place, and so do all that is as large as keys or queries."""
        many, asked, seen = self.heads, self.queries, self.keys
        return {"scores": (many, asked, seen), "q": (many, asked, self.size), "k": (many, seen, self.size)} | {
            "of queries": (many, asked, self.size), "of keys": (many, seen, self.size),
        }  # fmt: skip

    def reserve(self, pools: Pools) -> None:
        """Room for it."""
        for role, shape in self.shapes().items():
            pools.reserve(role, *shape)

    def run(self, pools: Pools) -> None:
        """S = Q K^T, O = P V; dP = dO V^T, dQ = dS K, dV = P^T dO, dK = dS^T Q."""
        scores, q, k, of_queries, of_keys = (pools.view(role, *shape) for role, shape in self.shapes().items())
        for _ in range(2):
            torch.bmm(q, k.transpose(1, 2), out=scores)
            torch.bmm(scores, k, out=of_queries)
            torch.bmm(scores.transpose(1, 2), q, out=of_keys)
