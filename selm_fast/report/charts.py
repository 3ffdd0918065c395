"""The charts of a report. One run: a colour a metric.  Several: a colour a run, and a panel a metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from selm_fast.report.figures import Chart, XAxis, chart
from selm_fast.report.marks import Line, Mark, Panel, Points
from selm_fast.report.runs import Run
from selm_fast.report.series import by_step, held_out, starts, steps_per_point


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of metrics.jsonl, and what it is called here. held_out: its evaluations are shown too."""

    name: str
    label: str
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class ByStep:
    """A chart over steps. metrics: of one run, in one set of axes.  level: where a horizontal line stands."""

    title: str
    about: str
    metrics: list[Metric]
    percent: bool = False
    level: float | None = None


TRAINING = [
    ByStep(
        "Loss",
        "The preference term, which is 0.693 where policy and reference are one, plus the exploration term.",
        [Metric("loss", "loss"), Metric("loss/preference", "preference term")],
    ),
    ByStep(
        "Exploration term of the loss",
        "The exploration weight times the log-probability that the explored response has gained.",
        [Metric("loss/exploration", "exploration term")],
    ),
    ByStep(
        "Implicit rewards",
        "Beta times the log-probability gained over the reference model, by kind of response.",
        [
            Metric("rewards/chosen", "chosen"),
            Metric("rewards/rejected", "rejected"),
            Metric("rewards/explored", "explored"),
        ],
    ),
    ByStep(
        "Margins",
        "The reward of the chosen response above that of the rejected one; hollow points are held-out pairs.",
        [Metric("rewards/margins", "training", held_out=True)],
    ),
    ByStep(
        "Accuracies",
        "The share of pairs whose chosen response has the higher reward: none where policy and reference are one and "
        "all rewards equal; hollow points are held-out pairs.",
        [Metric("rewards/accuracies", "training", held_out=True)],
        percent=True,
        level=0.5,
    ),
    ByStep(
        "Gradient norm",
        "The norm of the gradient before it is clipped.",
        [Metric("grad_norm", "gradient norm")],
    ),
]
SPEED = [
    ByStep(
        "Groups a second",
        "Prompts with their responses that each second of training takes in.",
        [Metric("groups_per_second", "groups")],
    ),
    ByStep(
        "Tokens a second",
        "Packed tokens that each second of training takes in.",
        [Metric("tokens_per_second", "tokens")],
    ),
    ByStep("Memory", "The most memory used so far, in GiB.", [Metric("memory_gib", "GiB")]),
]


def step_charts(specs: Sequence[ByStep], runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Charts over steps; what was measured nowhere is left out."""
    drawn = (_step_chart(spec, runs, names) for spec in specs)
    return [one for one in drawn if one is not None]


def _step_chart(spec: ByStep, runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    panels = _panel_of_one(spec, runs[0]) if len(runs) == 1 else _panels_of_several(spec, runs, names)
    if not panels:
        return None
    drawn = [
        Panel(title, marks, percent=spec.percent, level=spec.level, borders=_borders(runs)) for title, marks in panels
    ]
    height = 150 if len(drawn) == 1 else 110
    return chart(spec.title, spec.about, drawn, XAxis(label="step", whole=True), panel_height=height)


def how_to_read(runs: Sequence[Run]) -> str:
    """What there is to know of all charts over steps: sentences, or nothing."""
    notes = []
    if _borders(runs):
        notes.append("A dotted line is where the iteration of that number begins.")
    if widths := {steps_per_point(run) for run in runs} - {1}:
        steps = " or ".join(map(str, sorted(widths)))
        notes.append(f"A point is the mean of {steps} steps, the band around it their least and greatest value.")
    return " ".join(notes)


def _borders(runs: Sequence[Run]) -> dict[float, str]:
    """Where iterations begin, by their numbers; none where the runs differ in it."""
    borders = [{float(step): str(number) for number, step in starts(run).items() if step} for run in runs]
    return borders[0] if all(each == borders[0] for each in borders) else {}


def _panel_of_one(spec: ByStep, run: Run) -> list[tuple[str, list[Mark]]]:
    marks: list[Mark] = []
    for look, metric in enumerate(spec.metrics):
        marks += _marks(metric, run, look, metric.label, look + 1, "held-out")
    if len(marks) == 1:  # the chart's title says it
        marks = [dataclasses.replace(marks[0], name="")]
    return [("", marks)] if marks else []


def _panels_of_several(spec: ByStep, runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[Mark]]]:
    panels = []
    for metric in spec.metrics:
        marks: list[Mark] = []
        for look, (run, name) in enumerate(zip(runs, names, strict=True)):
            marks += _marks(metric, run, look, name, look, "")
        if marks:
            panels.append((metric.label if len(spec.metrics) > 1 else "", marks))
    return panels


def _marks(metric: Metric, run: Run, look: int, name: str, held_out_look: int, held_out_name: str) -> list[Mark]:
    marks: list[Mark] = []
    series = by_step(run, metric.name)
    if any(series.known):  # an exploration term of weight 0 is 0 throughout
        marks.append(Line(look, name, series))
    if metric.held_out:
        elsewhere = held_out(run, metric.name)
        if elsewhere.known:
            marks.append(Points(held_out_look, held_out_name, elsewhere, hollow=True))
    return marks
