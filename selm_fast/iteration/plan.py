"""Which stages a run has, and what each one's result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from selm_fast.config import PAIRRM, RunConfig

STAGES: Final = ("rollout", "rank", "cache", "train", "evaluate")
PARALLEL: Final = ("rollout", "rank", "cache")  # run in one process for each GPU
# What a stage's result depends on; whatever is not here (limits, log intervals, processes) may change at any time.
_DATA = ("data.max_length", "data.max_prompt_length", "model.trust_remote_code")
_COMPUTE = ("seed", "device", "dtype", *_DATA)
_GENERATION = ("rollout.engine", "rollout.max_new_tokens", "rollout.max_tokens", "rollout.shard_prompts")
_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "prepare": ("prepare", "seed"),
    "rollout": (
        *_COMPUTE, *_GENERATION, "portions", "rank.offline_pair", "rollout.responses", "rollout.explored",
        "rollout.temperature", "rollout.top_p",
    ),
    "rank": (*_DATA, "seed", "portions", "ranker", "rank.offline_pair", "rank.min_margin", "rollout.responses",
             "rollout.explored", "rollout.shard_prompts"),
    "cache": (*_COMPUTE, "batch", "model.compile"),
    "train": (
        *_COMPUTE, "method", "beta", "alpha", "label_smoothing", "epochs", "grid_dither", "head_mode", "eval_every",
        "batch", "optim", "model.activation_checkpointing", "model.compile",
    ),
    "evaluate": (*_COMPUTE, *_GENERATION, "ranker", "batch.max_tokens", "evaluation"),
}  # fmt: skip
# And where PairRM ranks: the sums of its batches differ in their last bits.
_PAIRRM: Final = ("device", "pairrm.dtype", "pairrm.max_tokens")


@dataclass(frozen=True)
class Stage:
    """One stage of one iteration.

    settings: those its result depends on, by dotted name.  inputs: keys of what it reads, by name.
    """

    name: str
    iteration: int
    settings: dict[str, Any] = field(repr=False)
    inputs: dict[str, str] = field(repr=False)

    @cached_property
    def key(self) -> str:
        """sha256 of everything the result depends on: a stage is done when its manifest has this key."""
        content = [self.name, self.iteration, self.settings, self.inputs]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def settings_of(self, config: RunConfig) -> RunConfig:
        """The settings that the stage runs with: those of its iteration; of the whole run where iterates compare."""
        return config.at(self.iteration) if self.name not in ("prepare", "evaluate") else config

    @property
    def title(self) -> str:
        """`iter-2/train`, as its folder is called."""
        return self.name if self.name == "prepare" else f"iter-{self.iteration}/{self.name}"

    def as_json(self) -> dict[str, Any]:
        """What is written down when the stage is begun."""
        return {
            "stage": self.name,
            "iteration": self.iteration,
            "key": self.key,
            "settings": self.settings,
            "inputs": self.inputs,
        }


def plan_stages(config: RunConfig, sources: Mapping[str, str]) -> list[Stage]:
    """Every stage of a run, in order.

    sources: identities of what the run begins with: `model`, `data`, `eval` where there are held-out prompts, and
    `tokenizer` where it is not the model's; not needed where `prepare` makes them.  `ranker`: of PairRM's checkpoint.
    """
    return list(_stages(config, sources))


def _stages(config: RunConfig, sources: Mapping[str, str]) -> Iterator[Stage]:
    if config.prepare is not None:
        prepare = Stage("prepare", 0, _settings("prepare", config), {})
        yield prepare
        sources = {**sources, **dict.fromkeys(("model", "data", "eval"), prepare.key)}
    models = [sources["model"]]
    # Read by every stage, where it is not the model's own.
    tokenizer = {"tokenizer": sources["tokenizer"]} if "tokenizer" in sources else {}
    ranker = {"ranker": sources["ranker"]} if "ranker" in sources else {}
    evaluations: list[Stage] = []
    if "eval" in sources:
        start = {name: sources[name] for name in ("model", "eval")}
        evaluations.append(Stage("evaluate", 0, _settings("evaluate", config), start | tokenizer | ranker))
        yield evaluations[0]
    for number in range(1, config.iterations + 1):
        at = config.at(number)
        data = {"data": sources["data"]} | tokenizer
        if at.generates:
            models_read = {"model": models[-1]} | ({"base": models[0]} if at.samples_base else {})
            rollout = Stage("rollout", number, _settings("rollout", at), data | models_read)
            yield rollout
            data |= {"rollout": rollout.key}
        held_out = {"held_out": evaluations[-1].key} if evaluations else {}
        explores = {"explores": at.exploration_weight != 0}
        rank = Stage("rank", number, _settings("rank", at) | explores, data | held_out | ranker)
        yield rank
        reference = models[0] if config.reference == "base" else models[-1]
        ranked = {"rank": rank.key, "reference": reference} | tokenizer
        cache = Stage("cache", number, _settings("cache", at), ranked)
        yield cache
        train = Stage("train", number, _settings("train", at), ranked | {"model": models[-1]})
        yield train
        models.append(train.key)
        if evaluations:
            before = {"base": evaluations[0].key} | ({"first": evaluations[1].key} if number > 1 else {})
            inputs = {"model": train.key, "eval": sources["eval"], "reference": reference} | before | tokenizer | ranker
            evaluations.append(Stage("evaluate", number, _settings("evaluate", config), inputs))
            yield evaluations[-1]


def _settings(stage: str, config: RunConfig) -> dict[str, Any]:
    values = config.to_json()
    values["portions"] = num_portions(config)
    found: dict[str, Any] = {}
    ranked_by_pairrm = stage in ("rank", "evaluate") and config.ranker == PAIRRM
    for name in dict.fromkeys((*_SETTINGS[stage], *(_PAIRRM if ranked_by_pairrm else ()))):
        if name == "rollout.max_tokens" and config.rollout.engine != "transformers":
            continue  # servers batch as they like
        section, _, leaf = name.rpartition(".")
        value = values[section][leaf] if section else values[name]
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            found[name] = value
    return found


def num_portions(config: RunConfig) -> int:
    """Parts that the prompts are cut into."""
    return config.portions or config.iterations
