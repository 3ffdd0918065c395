"""One run of one method: iterations of asking, caching reference log-probs and training, by the trainer's own code."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.exploration.control import ControlPolicy
from benchmarks.exploration.environment import Environment, Floats, annotate, summary
from benchmarks.exploration.methods import METHODS, Method, ask, greedy, offline_pairs
from benchmarks.exploration.tiny_llama import distribution, untrained
from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import plan_epoch
from selm_fast.model.fused_layers import fuse
from selm_fast.training.loop import Trainer
from selm_fast.training.masters import Masters
from selm_fast.training.optimizer import AdamW
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.signals import StopFlag
from selm_fast.training.utilisation import Utilisation
from selm_fast.training.world import World

MAX_TOKENS = 4096  # of a micro-batch: a step is one
BINS = np.linspace(-1.25, 1.25, 26)  # of a greedy response's reward, over the mean of the highest rewards
WORLD = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a run trains, beside its method, alpha and learning rate."""

    iterations: int = 6
    groups: int = 32  # of an optimiser step
    beta: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of each iteration, which begins its optimiser anew
    warmup: float = 0.1  # share of an iteration's steps: of six, the first one, at learning rate 0
    offline: bool = True  # whether the offline pair is among the candidates


@dataclass(slots=True)
class Outcome:
    """What a run came to: a list over iterations by name, from the base model on.

    train, held_out: `environment.summary` of each, by name.  queries: pairs compared so far, a prompt.
    rollouts: different responses of the policy's own so far, a prompt.  best_seen: share of the training prompts whose
    best response has been a candidate.  histograms: of the rewards of greedy responses to held-out prompts.
    implicit: beta (log pi - log pi_base) of the last policy on the held-out prompts' chosen and rejected responses.
    """

    train: dict[str, list[float]] = field(default_factory=dict)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    queries: list[float] = field(default_factory=list)
    rollouts: list[float] = field(default_factory=list)
    best_seen: list[float] = field(default_factory=list)
    histograms: list[list[int]] = field(default_factory=list)
    implicit: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)


def run(
    method_name: str,
    environment: Environment,
    base_weights: Mapping[str, Tensor],
    *,
    alpha: float,
    lr: float,
    seed: int,
    training: Training,
) -> Outcome:
    """Train by a method from the base model; equal arguments give equal bits.

    alpha: exploration coefficient; of the trainer's `method`, so that XPO's weight is alpha and SELM's alpha * beta.
    """
    method = METHODS[method_name]
    base_model = model_of(environment, base_weights)
    base = distribution(base_model, environment)
    base_policy = ControlPolicy(base_model, method, environment, base)
    policy = ControlPolicy(model_of(environment, base_weights), method, environment, base)
    outcome = Outcome()
    prompts = environment.settings.train_prompts
    own = np.zeros((prompts, len(environment.responses)), bool)
    seen = own.copy()
    best = environment.rewards[environment.train].argmax(1)
    queries = 0
    _measure(outcome, environment, base, base)
    _count(outcome, 0.0, own, seen, best)
    previous = base
    for iteration in range(training.iterations):
        policy.previous = torch.from_numpy(previous)
        config = settings_of(method, alpha, lr, seed, training)
        asked = ask(
            method, environment, previous, base,
            seed=seed, iteration=iteration, offline=training.offline, with_explored=config.exploration_weight != 0,
        )  # fmt: skip
        train_iteration(policy, base_policy if method.reference_is_base else policy, config, asked.groups, iteration)
        for prompt, numbers in enumerate(asked.candidates):
            own[prompt, numbers[: asked.own]] = True
            seen[prompt, numbers] = True
        queries += asked.queries
        previous = distribution(policy.model, environment)
        _measure(outcome, environment, previous, base)
        _count(outcome, queries / prompts, own, seen, best)
    chosen, rejected = held_out_pairs(environment, base, seed)
    for name, numbers in (("chosen", chosen), ("rejected", rejected)):
        ratio = _of(previous, environment, numbers) - _of(base, environment, numbers)
        outcome.implicit[name] = (training.beta * ratio).tolist()
    outcome.weights = {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}
    return outcome


def settings_of(method: Method, alpha: float, lr: float, seed: int, training: Training) -> Config:
    """The trainer's settings; what is not named here is its default. DPO is its `method: dpo`."""
    return Config(
        method=method.setting,
        beta=training.beta,
        alpha=0.0 if method.setting == "dpo" else alpha,
        seed=seed,
        device="cpu",
        optim={"lr": lr, "schedule": training.schedule, "warmup": training.warmup},  # type: ignore[arg-type]
        batch={"groups": training.groups, "max_tokens": MAX_TOKENS},  # type: ignore[arg-type]
        checkpoint={"every": 10**9, "keep": 1},  # type: ignore[arg-type]
    )


def train_iteration(
    policy: ControlPolicy, reference: ControlPolicy, config: Config, groups: list[TokenGroup], iteration: int
) -> None:
    """Pack, cache and train, in place: what `selm-fast train` does between reading its rows and writing its model.

    Raises RuntimeError where the first step's loss is not ln 2 to the bit, though reference and policy are one.
    """
    plan = plan_epoch(
        groups, groups_per_step=config.batch.groups, max_tokens=MAX_TOKENS, seed=config.seed, epoch=iteration
    )
    losses: list[float] = []
    # Not entered: signals are for the process that hands out the runs, and end this one as they end any other.
    stop = StopFlag()
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        # In a folder of its own a cache has nothing to be mistaken for.
        cache = ReferenceCache(folder.path / "cache", {"iteration": iteration})
        values = cache.fill(plan, reference, world=WORLD, stop=stop)
        masters = Masters(policy.model, torch.float32)
        Trainer(
            config, WORLD, folder, policy, masters, AdamW(masters.masters, config), [plan], values, None, None,
            Utilisation(None, 1, math.nan), Display(quiet=True), stop,
            lambda metrics: losses.append(metrics["loss/preference"]),
        ).run()  # fmt: skip
    if reference is policy and losses[0] != math.log(2):
        raise RuntimeError(f"the first step's preference loss is {losses[0]!r}; expected ln 2 to the bit")


def held_out_pairs(environment: Environment, base: Floats, seed: int) -> tuple[list[int], list[int]]:
    """Chosen and rejected of each held-out prompt: two samples of the base model as the annotator orders them."""
    likes = annotate(environment, seed, 10**6)  # an iteration that no run has
    pairs = offline_pairs(base, seed)
    ordered = [sorted(pairs[row], key=lambda number: -likes[row, number]) for row in range(len(pairs))]
    of_held_out = ordered[environment.held_out]
    return [int(pair[0]) for pair in of_held_out], [int(pair[1]) for pair in of_held_out]


def model_of(environment: Environment, weights: Mapping[str, Tensor]) -> Any:
    """The small Llama with these weights, its layers fused as the trainer fuses them."""
    model = untrained(environment.settings, 0)
    model.load_state_dict(weights)
    fuse(model)
    return model


def _of(logps: Floats, environment: Environment, numbers: list[int]) -> Floats:
    """Log-probs of a response to each held-out prompt."""
    return np.take_along_axis(logps[environment.held_out], np.array(numbers)[:, None], 1)[:, 0]


def _measure(outcome: Outcome, environment: Environment, logps: Floats, base: Floats) -> None:
    likeliest = greedy(logps, environment)
    for into, prompts in ((outcome.train, environment.train), (outcome.held_out, environment.held_out)):
        for name, value in summary(environment, logps, base, likeliest, prompts).items():
            into.setdefault(name, []).append(value)
    rewards = environment.rewards[environment.held_out]
    of_greedy = np.take_along_axis(rewards, likeliest[environment.held_out][:, None], 1)[:, 0]
    counts, _ = np.histogram(np.clip(of_greedy / rewards.max(1).mean(), BINS[0], BINS[-1]), BINS)
    outcome.histograms.append(counts.tolist())


def _count(outcome: Outcome, queries: float, own: Any, seen: Any, best: Any) -> None:
    outcome.queries.append(queries)
    outcome.rollouts.append(float(own.sum(1).mean()))
    outcome.best_seen.append(float(seen[np.arange(len(best)), best].mean()))
