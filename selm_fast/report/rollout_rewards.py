"""The ranker's scores of rollouts by iteration, and their histograms (SELM, arXiv 2405.19332, Fig. 3)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selm_fast.errors import Refused
from selm_fast.report import files
from selm_fast.report.contents import Manifest
from selm_fast.report.figures import Chart, XAxis, chart
from selm_fast.report.marks import Mark, Panel, Steps
from selm_fast.report.runs import Run

BINS = 24
ROWS = "rows.jsonl"
OWN, BASE = "response ", "base response"  # what candidates are called: the policy's by their number, the base's


@dataclass(slots=True)
class Rollout:
    """Scores of the responses of one iteration's rollout: of the policy, and of the base model where it answered too.

    Arrays, since a Python list of the floats of 60,000 prompts takes five times as much.
    """

    policy: array[float] = field(default_factory=lambda: array("d"))
    base: array[float] = field(default_factory=lambda: array("d"))


def read_rollouts(run: Run) -> dict[int, Rollout]:
    """The scores of each iteration whose responses were ranked, by its number. Raises Refused for a damaged file."""
    found = {}
    for iteration in run.iterations:
        if "rank" not in iteration.manifests:
            continue
        rollout = Rollout()
        path = run.folder / f"iter-{iteration.number}/rank" / ROWS
        for where, names, scores in _scored(path, iteration.manifests["rank"]):
            if len(names) != len(scores):
                raise Refused(f"{where}: {len(names)} candidates and {len(scores)} scores; is it of another program?")
            for name, score in zip(names, scores, strict=True):
                if (value := files.metric(score)) is None:
                    continue
                if str(name).startswith(OWN):
                    rollout.policy.append(value)
                elif name == BASE:
                    rollout.base.append(value)
        if rollout.policy or rollout.base:  # without a rollout the rows' own pairs are trained on
            found[iteration.number] = rollout
    return found


def rollout_histograms(runs: Sequence[Run], letters: Sequence[str], names: Sequence[str]) -> Chart | None:
    """Histograms of the scores of rollouts over common bins, a panel an iteration of a run; None without any."""
    found = [read_rollouts(run) for run in runs]
    everything = [scores for each in found for rollout in each.values() for scores in (rollout.policy, rollout.base)]
    if not everything:
        return None
    edges = np.histogram_bin_edges(np.concatenate(everything), bins=BINS)
    panels = []
    for number in sorted({number for each in found for number in each}):
        for look, (each, letter) in enumerate(zip(found, letters, strict=True)):
            if number not in each:
                continue
            rollout, marks = each[number], list[Mark]()
            if rollout.policy:
                marks.append(_steps(look, names[look] if len(runs) > 1 else "policy", edges, rollout.policy))
            if rollout.base:
                base = "base model" if len(runs) == 1 else "base model of a run"
                marks.append(_steps(1 if len(runs) == 1 else len(runs), base, edges, rollout.base, filled=False))
            title = f"iteration {number}" if len(runs) == 1 else f"{letter}, iteration {number}"
            panels.append(Panel(title, marks, percent=True))
    return chart(
        "Rewards of rollouts",
        "The share of responses by the ranker's score, over the prompts that gave a pair; the dashed line is the mean. "
        "The responses that an iteration trains on are of the model before it.",
        panels,
        XAxis(label="score"),
        panel_height=60,
    )


def _steps(look: int, name: str, edges: Any, scores: array[float], filled: bool = True) -> Steps:
    heights = np.histogram(scores, bins=edges)[0] / len(scores)
    return Steps(look, name, edges.tolist(), heights.tolist(), middle=float(np.mean(scores)), filled=filled)


def _scored(path: Path, manifest: Manifest) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """(place, names of candidates, scores) of each line, read line by line: a file of token ids may have gigabytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                where = f"{path}, line {number}"
                row = files.mapping(line, Path(where))
                names, scores = row.get("candidates"), row.get("scores")
                if not isinstance(names, list) or not isinstance(scores, list):
                    raise Refused(f"{where}: candidates and their scores are expected; is it of another program?")
                yield where, names, scores
    except OSError as error:
        raise files.refusal(path, error) from error
    if ROWS in manifest.files and digest.hexdigest() != manifest.files[ROWS].sha256:
        raise Refused(f"{path}: its sha256 is not the one in its manifest: it was truncated or changed")
