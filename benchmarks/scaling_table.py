"""The tables of docs/scaling.md: an iteration of the paper's Llama-3-8B recipe on 8, 64 and 1024 GPUs, by arithmetic.

    python benchmarks/scaling_table.py

No number in them is measured but the two rates of a GPU, PEAK and BANDWIDTH. FLOPs and bytes of training are those of
`selm_fast.roofline`, GiB those of `selm_fast.memory`, groups are like UltraFeedback's. What training exchanges is what
FSDP2 gathers and reduces (`selm_fast.model.sharding`), in rings, at the same time as it computes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scaling_data import PAPER_ROWS
from benchmarks.scaling_model import LLAMA_3_8B, PEAK
from selm_fast.cli.settings import load_run_config
from selm_fast.cli.shipped import find_recipe
from selm_fast.iteration.estimate import BANDWIDTH_SHARE, PAIRRM_UTILISATION, UTILISATION
from selm_fast.memory import peak
from selm_fast.pairrm import work as pairrm
from selm_fast.roofline import FP32, Settings, Shape, Work, bound, flops, traffic
from selm_fast.training.room import PROMPT, RESPONSE, Plan, assumed_group, scaled

RECIPE = load_run_config(find_recipe("llama3-8b"), []).at(1)
SHAPE = Shape.from_config(LLAMA_3_8B)
GROUP = assumed_group(RECIPE)
PROMPTS = PAPER_ROWS // (RECIPE.portions or RECIPE.iterations)  # of an iteration
GPUS = (8, 64, 1024)
GIB = 139  # of an H200, to torch

BF16 = 2  # bytes
BANDWIDTH = 4.3e12  # bytes/s of a large copy on an H200
NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s of each GPU to the others of its node, each way: NVLink 4
NETWORK = 400e9 / 8  # bytes/s of each GPU's own adapter: InfiniBand NDR
LINK_SHARE = 0.7  # of a link's speed that a collective reaches: assumed
# Seconds of one hop of a ring, as NCCL itself reckons (src/graph/tuning.cc: hwLat of rings, protocol Simple).
HOP, NETWORK_HOP = 3.4e-6, 14e-6

IN_FLIGHT = RECIPE.rollout.concurrency  # requests under way at each server
ORDERED_PAIRS = 6  # of three candidates


def exchange(size: float, collectives: float, gpus: int) -> float:
    """Seconds of collectives in which `size` bytes in all reach every GPU, or are summed from every GPU.

    A ring passes through every GPU: n - 1 hops, of which one less than there are nodes are between two. What a node
    lacks comes in through the adapters of all of its GPUs.
    """
    nodes = -(-gpus // NODE)
    inside = size * (1 - 1 / gpus) / NVLINK
    between = size * (1 - 1 / nodes) / (min(gpus, NODE) * NETWORK)
    return max(inside, between) / LINK_SHARE + collectives * ((gpus - nodes) * HOP + (nodes - 1) * NETWORK_HOP)


def least_seconds(work: Work, settings: Settings, gpus: int) -> float:
    """A step's or a pass's time on one GPU by the roofline, at the assumed shares of its rates."""
    needed, moved = flops(SHAPE, work, settings), traffic(SHAPE, work, settings)
    parts = bound(needed, moved, peak=UTILISATION * PEAK, bandwidth=BANDWIDTH_SHARE * BANDWIDTH)
    return parts["body"] + parts["attention"] + parts["head"] + parts["optimizer"] / gpus


@dataclass(frozen=True)
class Training:
    """The recipe's training with so many groups a step, on so many GPUs."""

    gpus: int
    groups: int

    @cached_property
    def plan(self) -> Plan:
        """As the memory model sees it."""
        batch = RECIPE.batch.model_copy(update={"groups": self.groups})
        return Plan(RECIPE.model_copy(update={"batch": batch}), SHAPE, GROUP, self.gpus)

    @property
    def rounds(self) -> int:
        """Micro-batches of each GPU in a step."""
        return max(1, math.ceil(self.groups * GROUP.tokens / (self.gpus * RECIPE.batch.max_tokens)))

    @property
    def busiest(self) -> Work:
        """What the GPU with the most groups has of a step."""
        return scaled(GROUP, max(1, self.groups / self.gpus))

    @property
    def steps(self) -> int:
        """Optimiser steps of an iteration."""
        return -(-PROMPTS // self.groups)

    @property
    def computing(self) -> float:
        """Seconds of a step's FLOPs."""
        settings = self.plan.settings
        cut = Settings(
            checkpointing=settings.checkpointing,
            head=settings.head,
            compute_bytes=settings.compute_bytes,
            micro_batches=self.rounds,
        )
        return least_seconds(self.busiest, cut, self.gpus)

    @property
    def exchanged(self) -> float:
        """Bytes of a step that reach a GPU: weights of layers twice, of the root once, and gradients in fp32 once."""
        model, size = self.plan.model, self.plan.compute_bytes
        weights = size * (2 * SHAPE.layers * model.layer + model.root)
        return self.rounds * (weights + FP32 * SHAPE.weights)

    @property
    def exchanging(self) -> float:
        """Seconds of a step's collectives: two gathers and a reduction of each layer, one of each of the root."""
        return exchange(self.exchanged, self.rounds * (3 * SHAPE.layers + 2), self.gpus)

    @property
    def seconds(self) -> float:
        """Of an iteration: collectives run beside the computation, and the slower of the two counts."""
        return self.steps * max(self.computing, self.exchanging)

    @property
    def reference_seconds(self) -> float:
        """Of the reference pass over the same micro-batches."""
        needed = flops(SHAPE, self.busiest, Settings(reference=True)).reference / (UTILISATION * PEAK)
        size = self.plan.compute_bytes * SHAPE.weights
        exchanged = exchange(self.rounds * size, self.rounds * (SHAPE.layers + 1), self.gpus)
        return self.steps * max(needed, exchanged)

    @property
    def gib(self) -> float:
        """Of each GPU at the peak."""
        return peak(self.plan.phases)[1].total / 2**30


@dataclass(frozen=True)
class Rollout:
    """One answer to each prompt of an iteration, by so many servers of one GPU each.

    A server has `in_flight` requests under way at a time; where it has few prompts, its longest answer decides.
    """

    servers: int
    in_flight: int = IN_FLIGHT

    @property
    def prompts(self) -> float:
        """Of each server."""
        return PROMPTS / self.servers

    @property
    def together(self) -> float:
        """Requests under way at a server."""
        return min(self.in_flight, self.prompts)

    @property
    def tokens(self) -> float:
        """One after another at each server."""
        return max(self.prompts * RESPONSE / self.together, RECIPE.rollout.max_new_tokens)

    @property
    def token_seconds(self) -> float:
        """Of a token of every request under way: all weights are read, and the keys and values of each request."""
        cached = 2 * BF16 * SHAPE.layers * SHAPE.key_heads * SHAPE.head_size * (PROMPT + RESPONSE / 2)
        reading = (BF16 * SHAPE.weights + self.together * cached) / (BANDWIDTH_SHARE * BANDWIDTH)
        return max(reading, 2 * (SHAPE.body + SHAPE.head) * self.together / (UTILISATION * PEAK))

    @property
    def seconds(self) -> float:
        """The prompts, then token after token."""
        prompts = Work.of_means(self.prompts, PROMPT, 1, 1)
        prefill = flops(SHAPE, prompts, Settings(reference=True)).reference / (UTILISATION * PEAK)
        return prefill + self.tokens * self.token_seconds


def ranking_flops() -> float:
    """Of one prompt by PairRM: each ordered pair of candidates is a row of the encoder, behind the prompt."""
    return pairrm.flops(ORDERED_PAIRS, PROMPT + 2 * RESPONSE, pairrm.deberta_v3_large())


def ranking_seconds(gpus: int = NODE) -> float:
    """Of all prompts, shared out over the GPUs of the node that drives the run."""
    return PROMPTS * ranking_flops() / (gpus * PAIRRM_UTILISATION * PEAK)


def fastest(gpus: int) -> Training:
    """Of the recipe's groups a step on so many GPUs or fewer, in whole nodes."""
    counts = [NODE * 2**power for power in range(int(math.log2(gpus // NODE)) + 1)]
    return min((Training(count, RECIPE.batch.groups) for count in counts), key=lambda found: found.seconds)


def iterations() -> Iterator[list[str]]:
    """A line for each number of GPUs: seconds of each stage of an iteration."""
    for gpus in GPUS:
        training = fastest(gpus)
        stages = (Rollout(gpus).seconds, ranking_seconds(), training.reference_seconds, training.seconds)
        yield [f"{gpus:,}", *(f"{seconds:,.0f}" for seconds in (*stages, sum(stages))), f"{training.gpus:,}"]


def rollouts() -> Iterator[list[str]]:
    """A line for each number of servers, with as many requests under way as is the default, and with more."""
    for found in (Rollout(gpus, in_flight) for in_flight in (IN_FLIGHT, 4 * IN_FLIGHT) for gpus in GPUS):
        yield [
            f"{found.servers:,}", f"{found.in_flight}", f"{found.prompts:,.0f}", f"{found.tokens:,.0f}",
            f"{1e3 * found.token_seconds:.1f}", f"{found.seconds:,.0f}",
        ]  # fmt: skip


def trainings() -> Iterator[list[str]]:
    """A line for each way to train."""
    groups = RECIPE.batch.groups
    for found in (*(Training(gpus, groups) for gpus in (8, 16, 32, 64, 128, 1024)), Training(1024, 1024)):
        yield [
            f"{found.gpus:,}", f"{found.groups:,}", f"{found.groups / found.gpus:g}", f"{found.rounds}",
            f"{found.computing:.2f}", f"{found.exchanged / 1e9:.0f}", f"{found.exchanging:.2f}", f"{found.steps}",
            f"{found.seconds:,.0f}", f"{found.gib:.0f}",
        ]  # fmt: skip


def markdown(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    """A table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def tables() -> list[str]:
    """Those of an iteration, of rollout, and of training."""
    return [
        markdown(["GPUs", "rollout", "ranking", "reference pass", "training", "all", "GPUs that train"], iterations()),
        markdown(
            ["servers", "requests under way", "prompts each", "tokens in a row", "ms a token", "seconds"], rollouts()
        ),
        markdown(
            [
                "GPUs", "groups a step", "groups a GPU", "micro-batches", "computing, s", "exchanged, GB",
                "exchanging, s", "steps", "all steps, s", "GiB a GPU",
            ],
            trainings(),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    print("\n\n".join(tables()))
