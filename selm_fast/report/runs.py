"""The runs of a report, read from their folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selm_fast.errors import Refused
from selm_fast.report import files
from selm_fast.report.contents import Evaluation, Manifest, RankCounts, Response, RolloutCounts, TrainCounts
from selm_fast.report.numbers import listed

STAGES = ("prepare", "rollout", "rank", "cache", "train", "evaluate")
_TITLE = re.compile(rf"prepare|iter-(?P<number>0|[1-9]\d{{0,5}})/(?P<stage>{'|'.join(STAGES[1:])})")
Line = dict[str, float | None]  # metrics of a step, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one iteration has left so far; None or empty where a stage is not done. Iteration 0 is the base model.

    steps: a mapping of metrics for each optimiser step.  held_out: one for each evaluation on held-out groups.
    """

    number: int
    manifests: dict[str, Manifest] = field(default_factory=dict)
    rollout: RolloutCounts | None = None
    rank: RankCounts | None = None
    train: TrainCounts | None = None
    evaluation: Evaluation | None = None
    responses: list[Response] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    held_out: list[Line] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Optimiser steps taken so far."""
        return max((int(line["step"] or 0) for line in self.steps), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's folder, read.

    name: of the folder, with as many folders above it as tell it from the other runs.
    stages: (iteration, stage) of all that it does, in order; none where it is a folder of `train` alone.
    folder: where it lies.
    """

    name: str
    config: dict[str, Any]
    versions: dict[str, Any]
    done: bool
    stages: list[tuple[int, str]]
    iterations: list[Iteration]
    folder: Path = Path()

    def setting(self, name: str) -> Any:
        """A setting by its dotted name; None where there is none."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def plain(self) -> bool:
        """Whether it is a folder of `train` alone, which has no rollout and no evaluation."""
        return not self.stages

    @property
    def last_evaluated(self) -> Iteration | None:
        """The latest iteration whose responses there are."""
        return next((iteration for iteration in reversed(self.iterations) if iteration.evaluation), None)

    def missing(self) -> str | None:
        """What an unfinished run lacks, in a sentence or two; None where it is done."""
        if self.done:
            return None
        if self.plain:
            return f"Under way, or stopped, after step {self._steps_of(1)}."
        made = {(iteration.number, stage) for iteration in self.iterations for stage in iteration.manifests}
        left = [stage for stage in self.stages if stage not in made]
        if not left:
            return "Every stage is there; the model is still to be written."
        number, now = left[0]
        steps = f", after step {self._steps_of(number)}" if now == "train" and self._steps_of(number) else ""
        still = [stage for which, stage in left[1:] if which == number and number > 0]
        later = sorted({which for which, _ in left if which > number})
        if later:
            still.append(f"iteration {later[0]}" if len(later) == 1 else f"iterations {later[0]} to {later[-1]}")
        rest = f" Still to come: {listed(still)}." if still else ""
        where = now if now == "prepare" else f"{now} of iteration {number}"
        return f"Under way, or stopped, in {where}{steps}.{rest}"

    def _steps_of(self, number: int) -> int:
        return next((iteration.num_steps for iteration in self.iterations if iteration.number == number), 0)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in this order. Raises Refused where a folder holds none, or a file is damaged."""
    if not paths:
        raise Refused("no run is given: give one or more folders of selm-fast run or selm-fast train")
    folders = [path.expanduser() for path in paths]
    whole = [folder.resolve() for folder in folders]
    for folder, times in Counter(whole).items():
        if times > 1:
            raise Refused(f"{folder} is given {times} times: give each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(whole), strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of these paths that differ from each other."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]).replace("//", "/") for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder: give the folder of a run")
    record_path = folder / "run.json"
    if not record_path.exists():
        raise Refused(f"{folder} has no run.json: give a folder that selm-fast run or selm-fast train has made")
    record = files.read_mapping(record_path)
    config, versions = record.get("config"), record.get("versions", {})
    if not isinstance(config, dict) or not isinstance(versions, dict):
        raise Refused(f"{record_path}: its config is expected to be a mapping of settings; is it of another program?")
    stages = _stages(record.get("stages", []), record_path)
    if stages:
        by_number: dict[int, list[str]] = {}
        for number, stage in stages:
            by_number.setdefault(number, []).append(stage)
        found = [_read_iteration(folder, number, names) for number, names in by_number.items()]
        # One that has left nothing yet is not there.
        iterations = [one for one in found if one.manifests or one.steps or one.held_out]
    else:
        steps, held_out = _lines(folder)
        iterations = [Iteration(number=1, steps=steps, held_out=held_out)]
    return Run(
        name=name,
        config=config,
        versions=versions,
        done=record.get("done") is True,
        stages=stages,
        iterations=iterations,
        folder=folder,
    )


def _stages(titles: Any, path: Path) -> list[tuple[int, str]]:
    """(iteration, stage) of each title of a run's record."""
    found = [_TITLE.fullmatch(title) for title in titles] if isinstance(titles, list) else [None]
    if not all(found):
        raise Refused(f"{path}: its stages are expected to be titles such as iter-1/rank; is it of another program?")
    return [(int(title["number"] or 0), title["stage"] or "prepare") for title in found if title]


def _read_iteration(run: Path, number: int, stages: Sequence[str]) -> Iteration:
    places = {stage: run / ("" if stage == "prepare" else f"iter-{number}") / stage for stage in stages}
    manifests = {stage: found for stage, place in places.items() if (found := files.read_manifest(place))}
    counts: dict[str, Any] = {
        stage: files.checked(model, manifests[stage].counts, places[stage] / "manifest.json")
        for stage, model in (("rollout", RolloutCounts), ("rank", RankCounts), ("train", TrainCounts))
        if stage in manifests
    }
    evaluated: dict[str, Any] = {}
    if "evaluate" in manifests:  # what an unfinished evaluation has written is not whole, and not shown
        evaluate, manifest = places["evaluate"], manifests["evaluate"]
        metrics, responses = (files.read_stage_file(evaluate, name, manifest) for name in _EVALUATION)
        path = evaluate / "metrics.json"
        evaluated["evaluation"] = files.checked(Evaluation, files.mapping(metrics, path), path)
        evaluated["responses"] = files.parse_rows(Response, responses, evaluate / "responses.jsonl")
    steps, held_out = _lines(places["train"]) if "train" in places else ([], [])
    return Iteration(number=number, manifests=manifests, steps=steps, held_out=held_out, **counts, **evaluated)


_EVALUATION = ("metrics.json", "responses.jsonl")


def _lines(train: Path) -> tuple[list[Line], list[Line]]:
    """Metrics of the steps and of the evaluations."""
    lines = files.read_lines(train / "metrics.jsonl")
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
