"""What a run will take, before it begins: prompts, steps, disk and hours of every stage, from settings and rows alone.

Hours are arithmetic, not a promise: the FLOPs of `selm_fast.roofline` over the speed of a matmul measured on the spot,
at a stated utilisation; decoding is bound by reading the weights once a token. What the user's own ranker, or servers
elsewhere, will take is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from selm_fast.config import PAIRRM, RunConfig
from selm_fast.data.sources import count_rows
from selm_fast.errors import Refused
from selm_fast.iteration.facts import CHARACTERS_A_TOKEN, Lengths, Model, Speed, device_speed, mean_lengths, model_size
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import Stage, num_portions
from selm_fast.pairrm import work as pairrm
from selm_fast.roofline import HeadMode, Settings, Work, flops
from selm_fast.training.room import head_mode

UTILISATION: Final = 0.4  # share of a bare matmul's speed that forward and backward passes reach
PAIRRM_UTILISATION: Final = 0.2  # the same of PairRM, whose attention is not fused
BANDWIDTH_SHARE: Final = 0.5  # share of a bare copy's speed at which decoding reads the weights
_JSON_BYTES_A_TOKEN: Final = 7  # of an id with its comma
_CACHE_BYTES_A_SEQUENCE: Final = 24  # a key and a log-prob


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage takes; what cannot be known is None.

    what: in words.  left, peak: bytes on disk when it is done, and while it runs.  seconds: at the speed of one device.
    """

    what: str
    left: float | None
    peak: float | None
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """The costs of a run's stages."""

    config: RunConfig
    num_prompts: int  # 0 where `prepare` has yet to make them
    num_held_out: int
    lengths: Lengths
    model: Model | None
    speed: Speed | None

    def of(self, stage: Stage) -> Cost:
        """The cost of one stage, by its name."""
        if self.num_prompts == 0 and stage.name != "prepare":
            return Cost("known once prepare is done", None, None, None)
        found: Cost = getattr(self, f"_{stage.name}")(stage, stage.settings_of(self.config))
        return found

    def portion(self, number: int) -> int:
        """Prompts of an iteration."""
        portions = num_portions(self.config)
        part = (number - 1) % portions
        return self.num_prompts * (part + 1) // portions - self.num_prompts * part // portions

    @cached_property
    def _prompt(self) -> float:
        return min(self.lengths.prompt, self.config.data.max_prompt_length)

    def _response(self, at: RunConfig) -> float:
        """Tokens of a response: as the offline ones, or half of what it may have."""
        return min(self.lengths.response or at.rollout.max_new_tokens / 2, at.rollout.max_new_tokens)

    def _candidates(self, at: RunConfig) -> int:
        return at.rollout.responses + at.samples_base + 2 * at.rank.offline_pair

    def _groups(self, count: int, at: RunConfig) -> Work:
        """Packed groups of mean lengths: chosen, rejected, and an explored response that is neither."""
        third = 1 - 2 / max(2, self._candidates(at)) if at.exploration_weight != 0 else 0.0
        response = min(self._response(at), self.config.data.max_length - self._prompt)
        return Work.of_means(count, self._prompt, response, 2 + third)

    def _prepare(self, stage: Stage, at: RunConfig) -> Cost:
        return Cost(f"model and rows, by {at.prepare}", None, None, None)

    def _rollout(self, stage: Stage, at: RunConfig) -> Cost:
        prompts = self.portion(stage.iteration)
        copies = at.rollout.responses + at.samples_base
        how = "greedy" if at.rollout.temperature == 0 else f"temperature {at.rollout.temperature:g}"
        what = f"{prompts:,} prompts, {copies} response{'s' * (copies != 1)} each, {how}, "
        what += f"at most {at.rollout.max_new_tokens:,} tokens"
        size = prompts * (self._prompt + copies * self._response(at)) * (_JSON_BYTES_A_TOKEN + CHARACTERS_A_TOKEN)
        return Cost(what, size, size, self._generation(prompts, copies, at))

    def _rank(self, stage: Stage, at: RunConfig) -> Cost:
        prompts, candidates = self.portion(stage.iteration), self._candidates(at)
        what = (
            f"{candidates} candidates for each of {prompts:,} prompts" if at.generates else f"{prompts:,} offline pairs"
        )
        size = prompts * (self._prompt + 3 * self._response(at)) * _JSON_BYTES_A_TOKEN
        if not at.generates:
            return Cost(what, size, 2 * size, 0.0)
        if at.ranker != PAIRRM:
            return Cost(what, size, 2 * size, None)
        rows = prompts * candidates * (candidates - 1)
        seconds = self._scoring(rows, self._prompt + 2 * self._response(at))
        return Cost(f"{what}, {rows:,} rows of PairRM", size, 2 * size, seconds)

    def _cache(self, stage: Stage, at: RunConfig) -> Cost:
        groups = self.portion(stage.iteration)
        size = groups * 3 * _CACHE_BYTES_A_SEQUENCE
        work = self._groups(groups, at)
        return Cost(f"{work.tokens / 1e6:,.1f}M packed tokens", size, size, self._seconds(self._forward(work)))

    def _train(self, stage: Stage, at: RunConfig) -> Cost:
        groups = self.portion(stage.iteration)
        steps = -(-groups // at.batch.groups) * at.epochs
        what = f"{at.method}, {steps:,} steps of {at.batch.groups} groups, lr {at.optim.lr:g}"
        if self.model is None:
            return Cost(what, None, None, None)
        work = self._groups(groups * at.epochs, at)
        settings = Settings(checkpointing=at.model.activation_checkpointing, head=self._head_mode(work, at))
        seconds = self._seconds(flops(self.model.shape, work, settings).total)
        export = self.model.weights * self.model.compute_bytes
        # fp32 masters and two moments; one checkpoint is written while the others are still there.
        moments = 2 if at.optim.moments == "bfloat16" else 4
        checkpoints = (at.checkpoint.keep + 1) * (4 + 2 * moments) * self.model.weights
        return Cost(what, export + 4 * self.model.weights, export + checkpoints, seconds)

    def _evaluate(self, stage: Stage, at: RunConfig) -> Cost:
        prompts = self.num_held_out
        copies = 2 if stage.iteration else 1  # greedy, and a sample for the KL divergences
        size = prompts * (self._prompt + copies * self._response(at)) * (_JSON_BYTES_A_TOKEN + CHARACTERS_A_TOKEN)
        return Cost(f"{prompts:,} held-out prompts", size, size, self._generation(prompts, copies, at))

    def _head_mode(self, work: Work, at: RunConfig) -> HeadMode:
        """What `auto` comes to in a full micro-batch."""
        assert self.model is not None
        rows = work.head_rows / work.tokens * min(at.batch.max_tokens, at.batch.groups * work.tokens / work.groups)
        return head_mode(at, self.model.shape, rows, self.model.compute_bytes)

    def _forward(self, work: Work) -> float:
        """FLOPs of a forward pass."""
        return 0.0 if self.model is None else flops(self.model.shape, work, Settings(reference=True)).reference

    def _seconds(self, needed: float) -> float | None:
        if self.model is None or self.speed is None:
            return None
        return needed / (UTILISATION * self.speed.flops)

    def _scoring(self, rows: int, tokens: float) -> float | None:
        """Seconds of so many rows of PairRM."""
        if self.speed is None:
            return None
        return pairrm.flops(rows, tokens, pairrm.deberta_v3_large()) / (PAIRRM_UTILISATION * self.speed.flops)

    def _generation(self, prompts: int, copies: int, at: RunConfig) -> float | None:
        """Prefill, and one token after another for as many batches as it takes, each as long as it may be.

        A vLLM server has `rollout.concurrency` responses under way and begins the next one where one ends.
        """
        if self.model is None or self.speed is None or at.rollout.engine == "server":
            return None
        if at.rollout.engine == "vllm":
            rounds = max(1.0, prompts * copies / at.rollout.concurrency)
            steps = rounds * self._response(at)
        else:
            batches = prompts * copies * (self._prompt + at.rollout.max_new_tokens) / at.rollout.max_tokens
            steps = max(1.0, batches) * at.rollout.max_new_tokens
        reading = steps * self.model.weights * self.model.compute_bytes / (BANDWIDTH_SHARE * self.speed.bandwidth)
        peak = UTILISATION * self.speed.flops
        prefill = self._forward(Work.of_means(prompts, self._prompt, 1, 1)) / peak
        decoded = Work.of_means(prompts, self._prompt, self._response(at), copies)
        computing = self._forward(decoded) / peak - prefill
        return prefill + max(reading, computing)


def estimate(paths: Paths) -> Estimate:
    """Read the rows and the model's config.json, and measure this machine. Raises Refused where there are no rows."""
    config = paths.config
    if config.prepare is not None and not Path(paths.train_rows).exists():
        return Estimate(config, 0, 0, Lengths(0, 0), None, None)
    num_prompts = count_rows(paths.train_rows)
    if num_prompts < num_portions(config):
        raise Refused(
            f"{paths.train_rows} has {num_prompts} rows; expected at least one for each of "
            f"{num_portions(config)} portions"
        )
    held_out = count_rows(paths.eval_rows) if paths.eval_rows is not None else 0
    limit = config.evaluation.prompts
    model = model_size(paths)
    speed = device_speed(config) if model is not None else None
    lengths = mean_lengths(paths.train_rows, num_prompts, paths.tokenizer)
    return Estimate(config, num_prompts, min(held_out, limit) if limit else held_out, lengths, model, speed)


def describe(found: Estimate, states: list[tuple[Stage, str]], devices: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """A line for each stage: title, state, what it does, disk, time. devices: of stages that have more than one."""
    for stage, state in states:
        cost = found.of(stage)
        seconds = None if cost.seconds is None else cost.seconds / devices.get(stage.name, 1)
        yield stage.title, state, cost.what, show_size(cost.left), show_duration(seconds)


def show_size(size: float | None) -> str:
    """Bytes in words."""
    if size is None:
        return "?"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 2**10:,.1f} KiB"


def show_duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return "?"
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
