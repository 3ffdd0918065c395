"""Comparisons with DPO at equal KL to the base model, and after as many queries."""

from __future__ import annotations

from benchmarks.exploration.analysis import Kind, Results
from benchmarks.exploration.statistics import Interval, at, interval


def at_equal_kl(results: Results, kind: Kind) -> tuple[Interval | None, int]:
    """Reward minus that of DPO at the same KL to the base model, seed by seed, and how many seeds have one.

    DPO's is read off the line through its runs of that seed at all learning rates, after as many iterations and
    queries; a seed where SELM is outside of that line is left out.
    """
    lines = [Kind("dpo", 0.0, lr) for lr in results.grid["lrs"]]
    kls, rewards = ([results.of(line, f"held_out/{name}") for line in lines] for name in ("kl", "reward"))
    # Before any training KL and difference are nothing: the line begins at the base model.
    start = results.of(results.dpo, "held_out/reward", 0)
    differences = []
    own = zip(results.of(kind, "held_out/kl"), results.of(kind, "held_out/reward"), strict=True)
    for nth, (kl, reward) in enumerate(own):
        beside = at(kl, [0.0, *(each[nth] for each in kls)], [start[nth], *(each[nth] for each in rewards)])
        if beside is not None:
            differences.append(reward - beside)
    return (interval(differences) if len(differences) > 1 else None), len(differences)


def at_equal_queries(results: Results, kind: Kind, share: float = 1.0) -> tuple[float, Interval]:
    """Queries a prompt, and reward minus that of DPO after as many, seed by seed, on held-out prompts.

    Both are read off the lines through their iterations, at a share of the queries that both have asked.
    """
    every = range(results.iterations + 1)
    lines = [
        [results.of(one, name, n) for n in every]
        for one in (kind, results.dpo)
        for name in ("queries", "held_out/reward")
    ]
    queries, differences = [], []
    for seed in range(len(results.seeds)):
        asked, reward, asked_by_dpo, reward_of_dpo = ([value[seed] for value in line] for line in lines)
        number_asked = share * min(asked[-1], asked_by_dpo[-1])
        here, there = at(number_asked, asked, reward), at(number_asked, asked_by_dpo, reward_of_dpo)
        assert here is not None
        assert there is not None
        queries.append(number_asked)
        differences.append(here - there)
    return sum(queries) / len(queries), interval(differences)
