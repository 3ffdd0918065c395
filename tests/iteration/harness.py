"""What the tests of the iteration share: runs so small that all their stages take a second, inside this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

from selm_fast.config import RunConfig
from selm_fast.iteration.job import Job
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import PARALLEL, Stage, plan_stages
from selm_fast.iteration.run import drive
from selm_fast.iteration.sources import identities
from selm_fast.iteration.stages import do_part, finish
from selm_fast.training.progress import Display
from selm_fast.training.signals import StopFlag

from ..training.harness import make_rows, override, write_rows

# A reward that differs between most responses and depends on nothing but the text.
RANKER = """
import hashlib

def score(prompts, candidates):
    with open(__file__ + ".calls", "a") as log:
        log.writelines(prompt.replace("\\n", " ") + "\\n" for prompt in prompts)
    return [[reward(text) for text in texts] for texts in candidates]

def reward(text):
    return round(int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 65535, 2)
"""


@dataclass
class Inline:
    """Stages one after the other in this process; `calls` are those that were done."""

    paths: Paths
    stop: StopFlag = field(default_factory=StopFlag)
    processes: int = 1
    calls: list[str] = field(default_factory=list)

    def parts(self, stage: Stage) -> int:
        return self.processes if stage.name in PARALLEL else 1

    def run(self, stage: Stage, *, seconds: float | None) -> None:
        config = self.paths.config
        here = stage.settings_of(config)
        of = self.parts(stage)
        for index in range(of if seconds is None else 1):
            job = Job(self.paths, stage, here, Display(quiet=True), self.stop, index, of)
            if seconds is None:
                self.calls.append(stage.title)
                do_part(job)
            else:
                finish(job, seconds)


MakeRun = Callable[..., RunConfig]


def write_inputs(folder: Path) -> None:
    """What `settings` name: 12 prompts with offline pairs, 5 held out, and the ranker, which `sys.path` must reach."""
    (folder / "the_ranker.py").write_text(RANKER, "utf-8")
    write_rows(folder / "prompts.jsonl", make_rows(12, seed=5))
    write_rows(folder / "held_out.jsonl", make_rows(5, seed=6))


def settings(folder: Path, model: Path, name: str = "run", **overrides: Any) -> RunConfig:
    """Two iterations over two portions of the prompts in `folder`; `optim__lr=1e-4` sets optim.lr."""
    values: dict[str, Any] = {
        "output_dir": folder / name,
        "method": "selm",
        "beta": 0.1,
        "alpha": 0.01,
        "device": "cpu",
        "iterations": 2,
        "ranker": "python:the_ranker:score",
        "model": {"path": str(model)},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "eval": str(folder / "held_out.jsonl"),
            "max_length": 64,
            "max_prompt_length": 40,
            "max_cut": 1.0,
        },
        "batch": {"groups": 3, "max_tokens": 240},
        "optim": {"lr": 1e-2, "warmup": 0.0},
        "rollout": {"max_new_tokens": 8, "max_tokens": 200, "shard_prompts": 2},
        "rank": {"batch_prompts": 2, "max_skipped": 0.9},
    }
    return RunConfig.model_validate(override(values, overrides))


def run_inline(config: RunConfig, *, until: str | None = None, redo: bool = False, processes: int = 1) -> Inline:
    """Run with every stage in this process; -> what did them."""
    paths = Paths(config)
    launcher = Inline(paths, processes=processes)
    drive(paths, launcher, Display(quiet=True), launcher.stop, until=until, redo=redo)
    return launcher


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def planned(config: RunConfig) -> dict[str, Stage]:
    """The stages of a run by title, as `drive` plans them."""
    sources, _ = identities(Paths(config), {})
    return {stage.title: stage for stage in plan_stages(config, sources)}


def job_of(
    config: RunConfig,
    title: str,
    *,
    index: int = 0,
    count: int = 1,
    stop: StopFlag | None = None,
    display: Display | None = None,
    vllm_python: str | None = None,
) -> Job:
    """The job of one stage, or of one process's part of it."""
    stage = planned(config)[title]
    here = stage.settings_of(config)
    display, stop = display or Display(quiet=True), stop or StopFlag()
    return Job(Paths(config), stage, here, display, stop, index, count, vllm_python=vllm_python)


def do_stages(config: RunConfig, *, last: str | None = None, processes: int = 1) -> Inline:
    """Stages in order up to the one called `last`, and no report behind them; -> what did them."""
    launcher = Inline(Paths(config), processes=processes)
    for title, stage in planned(config).items():
        launcher.run(stage, seconds=None)
        launcher.run(stage, seconds=1.0)
        if title == last:
            break
    return launcher


def reward(text: str) -> float:
    """What `RANKER` gives for a text."""
    namespace: dict[str, Any] = {}
    exec(RANKER, namespace)
    return float(namespace["reward"](text))


def shards(folder: Path, stem: str) -> list[dict[str, Any]]:
    """Every line of the shards of one pass, in order."""
    return [line for path in sorted(folder.glob(f"{stem}-*.jsonl")) for line in lines(path)]


def end_often(model: Path) -> Path:
    """Make a model of `write_model` say EOS every few tokens: its logit varies more than the others'."""
    path = model / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["lm_head.weight"][1] *= 2.5
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return model


class StopAfter(StopFlag):
    """Asks for a stop once it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self._looks -= 1
        return self._looks < 0


# Runs that several tests look at, by name: settings that differ from those of `settings`.
SCENARIOS: dict[str, dict[str, Any]] = {
    "selm": {},
    "xpo": {"method": "xpo", "reference": "base", "rollout__explored": "base", "batch__max_tokens": 100},
    "dpo first": {
        "data__eval": None,
        "iteration": {
            1: {"method": "dpo", "rollout": {"responses": 0}},
            2: {"rollout": {"responses": 3, "temperature": 1.0}, "rank": {"offline_pair": False}},
        },
    },
}
Finished = Callable[[str], Paths]
