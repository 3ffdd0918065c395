"""Comparisons with DPO that are made fair: at equal KL to the base model, after as many queries, at every rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt

from benchmarks.exploration.analysis import Kind, Results
from benchmarks.exploration.statistics import Interval, at, interval


def dpo_at_every_rate(results: Results) -> list[Kind]:
    """DPO at each learning rate that there is."""
    return [Kind("dpo", 0.0, lr) for lr in results.grid["lrs"]]


def least(found: Iterable[Interval]) -> Interval:
    """The interval that reaches lowest: where it is above 0, all are."""
    return min(found, key=lambda one: one.low)


def at_equal_kl(results: Results, kind: Kind) -> tuple[Interval | None, int]:
    """Reward minus that of DPO at the same KL to the base model, seed by seed, and how many seeds have one.

    DPO's is read off the line through the base model and DPO's runs of that seed at all learning rates, after as many
    iterations, over the root of the KL: close to the base model, reward grows with that. A seed where the method is
    beyond the line is left out; of DPO itself, its own run is left out of the line.
    """
    lines = [line for line in dpo_at_every_rate(results) if line != kind]
    kls, rewards = ([results.of(line, f"held_out/{name}") for line in lines] for name in ("kl", "reward"))
    start = results.of(results.dpo, "held_out/reward", 0)
    differences = []
    own = zip(results.of(kind, "held_out/kl"), results.of(kind, "held_out/reward"), strict=True)
    for nth, (kl, reward) in enumerate(own):
        beside = at(sqrt(kl), [0.0, *(sqrt(each[nth]) for each in kls)], [start[nth], *(each[nth] for each in rewards)])
        if beside is not None:
            differences.append(reward - beside)
    return (interval(differences) if len(differences) > 1 else None), len(differences)


def at_equal_queries(results: Results, kind: Kind, dpo: Kind, share: float = 1.0) -> tuple[float, Interval]:
    """Queries a prompt, and reward minus that of DPO after as many, seed by seed, on held-out prompts.

    Both are read off the lines through their iterations, at a share of the queries that both have asked.
    """
    every = range(results.iterations + 1)

    def line(of: Kind, name: str) -> list[Sequence[float]]:
        return [results.of(of, name, iteration) for iteration in every]

    lines = [line(of, name) for of in (kind, dpo) for name in ("queries", "held_out/reward")]
    queries, differences = [], []
    for seed in range(len(results.seeds)):
        asked, reward, asked_by_dpo, reward_of_dpo = ([value[seed] for value in one] for one in lines)
        number_asked = share * min(asked[-1], asked_by_dpo[-1])
        here, there = at(number_asked, asked, reward), at(number_asked, asked_by_dpo, reward_of_dpo)
        assert here is not None
        assert there is not None
        queries.append(number_asked)
        differences.append(here - there)
    return sum(queries) / len(queries), interval(differences)
