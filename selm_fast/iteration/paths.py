"""Where the files of a run are, and what each iteration starts from.

RUN/run.json                      settings, and whether the run is done
RUN/prepare/                      model and rows, where `prepare` makes them
RUN/iter-0/evaluate/              the model the run begins with, on the held-out prompts
RUN/iter-K/{rollout,rank,cache,train,evaluate}/
RUN/iter-K/started/STAGE.json     what a stage was begun with;  RUN/iter-K/logs/STAGE.log  what it printed
RUN/model/, RUN/report.html       when all is done
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selm_fast.config import Config, RunConfig


@dataclass(frozen=True)
class Paths:
    """The folder of a run and the settings it has."""

    config: RunConfig

    @cached_property
    def root(self) -> Path:
        assert self.config.output_dir is not None
        return self.config.output_dir.expanduser().absolute()

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def iteration(self, number: int) -> Path:
        return self.root / f"iter-{number}"

    def stage(self, number: int, name: str) -> Path:
        return self.root / name if name == "prepare" else self.iteration(number) / name

    def started(self, number: int, name: str) -> Path:
        return self.iteration(number) / "started" / f"{name}.json"

    def log(self, number: int, name: str) -> Path:
        return self.iteration(number) / "logs" / f"{name}.log"

    @cached_property
    def start(self) -> str:
        """Folder, run or hub name of the model the run begins with."""
        return str(self.root / "prepare/model") if self.config.prepare else str(self.config.model.path)

    @cached_property
    def train_rows(self) -> str:
        """Source of the prompts, with their offline pairs."""
        return str(self.root / "prepare/train.jsonl") if self.config.prepare else str(self.config.data.train)

    @cached_property
    def eval_rows(self) -> str | None:
        """Source of the held-out prompts, None where there are none."""
        return str(self.root / "prepare/eval.jsonl") if self.config.prepare else self.config.data.eval

    @cached_property
    def tokenizer(self) -> str:
        """Folder or name of the tokenizer of every iterate."""
        return self.start if self.config.prepare else str(self.config.tokenizer_source)

    def iterate(self, number: int) -> str:
        """What generates: the exported model of an iteration; 0 is the model the run begins with."""
        if number > 0:
            return str(self.stage(number, "train") / "model")
        exported = Path(self.start) / "model"  # of a run that this one goes on from
        return str(exported) if (exported / "config.json").is_file() else self.start

    def masters(self, number: int) -> str:
        """What training starts from: the run that holds the fp32 masters of an iteration, never its export."""
        return str(self.stage(number, "train")) if number > 0 else self.start

    def train_config(self, number: int) -> Config:
        """The settings of `train` in one iteration."""
        values: dict[str, Any] = self.config.at(number).model_dump(
            include=set(Config.model_fields), exclude_unset=True
        )  # unset ones keep their defaults, and may follow from others
        held_out = self.stage(number, "rank") / "held_out.jsonl"
        values["output_dir"] = self.stage(number, "train")
        values["model"] = {
            **values.get("model", {}),
            "path": self.masters(number - 1),
            "tokenizer": self.tokenizer,
            "reference": self.start if self.config.reference == "base" and number > 1 else None,
        }
        values["data"] = {
            **values.get("data", {}),
            "train": str(self.stage(number, "rank") / "rows.jsonl"),
            "eval": str(held_out) if held_out.is_file() else None,
            "max_cut": 1.0,  # the rollout has counted them, by why they ended
        }
        values["cache"] = {"dir": self.stage(number, "cache")}
        return Config.model_validate(values)
