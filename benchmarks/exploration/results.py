"""The results file: all that the page and the documents show is computed from it, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.exploration.environment import divergence, entropy, expected, make_environment, tilted
from benchmarks.exploration.experiment import BINS
from benchmarks.exploration.grid import DEFAULT_WORLD, Grid, Job, Tuned, base_settings
from benchmarks.exploration.tiny_llama import distribution, untrained
from benchmarks.exploration.work import Work, base_path, rounded

DEFAULT_PATH = Path("benchmarks/results/exploration.json")
POINTS = 101  # of sorted differences
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 200.0)  # of the best policies at a distance
SPARSE = {"train": ("reward",), "held_out": ("reward", "kl")}  # of the other worlds' runs, and `queries`

Outcomes = Mapping[Job, Mapping[str, Any]]


def make(grid: Grid, work: Work) -> dict[str, Any]:
    """Run what is not there yet, tuning first, and put together the `exploration` part of a results file."""
    tuning = work.do("tuning", grid.tuning())
    rewards = {job: outcome["held_out"]["reward"][-1] for job, outcome in tuning.items()}
    tuned = grid.choose(rewards)
    reported = work.do("reported runs", grid.reported(tuned))
    return {
        "grid": grid.to_json(),
        "tuned": {method: asdict(at) for method, at in tuned.items()},
        "tuning": [asdict(job) | {"reward": reward} for job, reward in rewards.items()],
        **_of_base_models(grid, work.bases),
        "bins": rounded(BINS.tolist()),
        "histograms": _histograms(reported),
        "implicit": _implicit(reported, grid, tuned["dpo"]),
        "runs": [asdict(job) | _figures(job, outcome) for job, outcome in reported.items()],
    }


def _figures(job: Job, outcome: Mapping[str, Any]) -> dict[str, Any]:
    if job.world != DEFAULT_WORLD:
        sparse = {part: {name: outcome[part][name] for name in names} for part, names in SPARSE.items()}
        return sparse | {"queries": outcome["queries"]}
    return {name: outcome[name] for name in ("train", "held_out", "queries", "rollouts", "best_seen")}


def _histograms(reported: Outcomes) -> list[dict[str, Any]]:
    """Rewards of greedy responses to held-out prompts, counted over the seeds, by iteration, of the default world."""
    found: dict[tuple[str, float, float], Any] = {}
    for job, outcome in reported.items():
        if job.world == DEFAULT_WORLD:
            counts = np.array(outcome["histograms"])
            kind = job.method, job.alpha, job.lr
            found[kind] = found[kind] + counts if kind in found else counts
    return [
        {"method": method, "alpha": alpha, "lr": lr, "counts": counts.tolist()}
        for (method, alpha, lr), counts in found.items()
    ]


def _implicit(reported: Outcomes, grid: Grid, dpo: Tuned) -> list[dict[str, Any]]:
    """r_SELM - r_DPO on the held-out prompts' chosen and rejected responses, at DPO's learning rate.

    sorted: POINTS quantiles over the responses of all seeds.  means: by seed.
    """
    found = []
    for alpha in grid.ablation:
        line: dict[str, Any] = {"alpha": alpha, "lr": dpo.lr}
        for role in ("chosen", "rejected"):
            differences = [
                np.array(reported[Job(DEFAULT_WORLD, "selm", alpha, dpo.lr, seed)]["implicit"][role])
                - np.array(reported[Job(DEFAULT_WORLD, "dpo", 0.0, dpo.lr, seed)]["implicit"][role])
                for seed in grid.seeds
            ]
            quantiles = np.quantile(np.concatenate(differences), np.linspace(0, 1, POINTS))
            line[role] = rounded({"sorted": quantiles.tolist(), "means": [float(each.mean()) for each in differences]})
        found.append(line)
    return found


def _of_base_models(grid: Grid, bases: Path) -> dict[str, Any]:
    """Of the default world's base models, on held-out prompts, means over the reported seeds.

    best_policies: KL-regularised optima over the base model: the most reward at each distance from it.
    base: its entropy, and how far it is from the prior that it was fitted to, nats.
    """
    settings = grid.worlds[DEFAULT_WORLD].settings
    sums, fits = np.zeros((len(STRENGTHS), 2)), np.zeros(2)
    for seed in grid.seeds:
        environment = make_environment(settings, seed)
        held_out = environment.held_out
        model = untrained(settings, 0)
        model.load_state_dict(load_file(base_path(bases, base_settings(settings), seed)))
        base, rewards = distribution(model, environment)[held_out], environment.rewards[held_out]
        fits += entropy(base).mean(), divergence(environment.prior[held_out], base).mean()
        for row, strength in enumerate(STRENGTHS):
            best = tilted(base, rewards, strength)
            share = expected(best, rewards).mean() / rewards.max(1).mean()
            sums[row] += divergence(best, base).mean(), share
    means = (sums / len(grid.seeds)).tolist()
    best_policies = [
        {"strength": strength, "kl": kl, "reward": reward}
        for strength, (kl, reward) in zip(STRENGTHS, means, strict=True)
    ]
    of_base = dict(zip(("entropy", "kl_of_prior"), (fits / len(grid.seeds)).tolist(), strict=True))
    return {"best_policies": rounded(best_policies), "base": rounded(of_base)}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """As JSON, a run a line."""
    body = json.dumps(result, indent=1, allow_nan=False, default=list)
    for name in ("tuning", "best_policies", "histograms", "implicit", "runs", "bins"):
        rows: Sequence[Any] = result["exploration"][name]
        body = body.replace(
            json.dumps(rows, indent=1, default=list).replace("\n", "\n  "),
            "[\n   " + ",\n   ".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n  ]",
            1,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body + "\n", "utf-8")


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError where it is none."""
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict) or "exploration" not in found:
        raise ValueError(f"{path} is not a results file of benchmarks.exploration")
    return found
