"""What a report shows of implicit rewards: who was asked about what, tables, and charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selm_fast.report.cells import interval, share
from selm_fast.report.contents import Interval
from selm_fast.report.figures import Chart, XAxis, chart
from selm_fast.report.implicit import Difference, Floats, ImplicitRewards, average, difference, is_shown
from selm_fast.report.marks import Line, Mark, Panel, Steps
from selm_fast.report.numbers import MINUS, count, listed, percent
from selm_fast.report.series import MAX_POINTS, Series
from selm_fast.report.settings import setting_text
from selm_fast.report.tables import Cell, Row, Table

BINS = 24
KINDS = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class ImplicitView:
    """The section on implicit rewards. about: sentences.  warning: what keeps the runs from being compared as they are.

    charts: of the rewards, and of their differences where there are several runs.
    """

    about: list[str]
    warning: str | None
    tables: list[Table]
    charts: list[Chart]


def implicit_view(
    found: Sequence[ImplicitRewards], data: str, letters: Sequence[str], names: Sequence[str]
) -> ImplicitView:
    """The section. found: of each run.  data: the rows' source.  letters, names: what runs are called here."""
    shown = [_rewards_table(found, names)]
    drawn = [_histograms(found, letters)]
    if len(found) > 1:
        differences = [difference(one, found[0]) for one in found[1:]]
        titles = [f"{letter} {MINUS} {letters[0]}" for letter in letters[1:]]
        shown.append(difference_table(differences, titles, letters))
        if any(len(one.rows) for one in differences):
            drawn.append(_sorted_chart(differences, titles, letters[0]))
    return ImplicitView(_about(found, data, names), warning(found, letters), shown, drawn)


def _about(found: Sequence[ImplicitRewards], data: str, names: Sequence[str]) -> list[str]:
    whom = [
        f"{name}: {one.model}, against {one.base}; beta {setting_text(one.beta)}."
        for name, one in zip(names, found, strict=True)
    ]
    return [
        f"The implicit reward of a response is beta times the log-probability, in nats, that it has gained since the "
        f"run began: over the model of the beginning, not the iteration before. Rows: {data}.",
        *whom,
    ]


def warning(found: Sequence[ImplicitRewards], letters: Sequence[str]) -> str | None:
    """What keeps the rewards of these runs from being compared as they are; None where nothing does."""
    said = []
    if len({one.base_digest for one in found}) > 1:
        strange = [
            letter for letter, one in zip(letters, found, strict=True) if one.base_digest != found[0].base_digest
        ]
        said.append(
            f"The base models differ: {listed(strange)} began with other weights than {letters[0]}, so that rewards "
            "are gains over different models."
        )
    if len({one.beta for one in found}) > 1:
        said.append("The runs have different betas, by which their rewards are scaled.")
    return " ".join(said) or None


def _rewards_table(found: Sequence[ImplicitRewards], names: Sequence[str]) -> Table:
    def row(name: str, cell: Callable[[ImplicitRewards], Cell]) -> Row:
        return Row(name, [cell(one) for one in found])

    reasons = list(dict.fromkeys(reason for one in found for reason in one.skipped))
    measures = [
        row("reward of chosen", lambda one: interval(average(one.chosen))),
        row("reward of rejected", lambda one: interval(average(one.rejected))),
        row("margin, chosen over rejected", lambda one: interval(average(one.margins))),
        row("accuracy", lambda one: _share(one.accuracy)),
    ]
    rows = [
        row("rows used", lambda one: share(len(one.rows), one.rows_read)),
        *(row(f"skipped: {reason}", _skips(reason)) for reason in reasons),
    ]
    bodies = [("Mean", "Below each its 95% interval over the rows.", measures), ("Rows", "", rows)]
    return Table("Implicit rewards on held-out rows", "", "Measure", list(names), bodies)


def difference_table(differences: Sequence[Difference], titles: Sequence[str], letters: Sequence[str]) -> Table:
    """Mean differences to the first run, a column a run. titles: of the columns."""

    def row(name: str, cell: Callable[[Difference], Cell]) -> Row:
        return Row(name, [cell(one) for one in differences])

    rows = [
        row("reward of chosen", lambda one: _difference(one.chosen)),
        row("reward of rejected", lambda one: _difference(one.rejected)),
        row("margin, chosen over rejected", lambda one: _difference(one.margins)),
        row("rows compared", lambda one: Cell(count(len(one.rows)))),
        row(f"left out: used by {letters[0]} alone", lambda one: Cell(count(one.only_other))),
        row("left out: used by the other alone", lambda one: Cell(count(one.only_this))),
    ]
    about = (
        f"Mean differences to {letters[0]}, the run given first, row by row, with 95% intervals; where an interval "
        "includes zero, a difference is not shown."
    )
    return Table(f"Differences of implicit rewards to {letters[0]}", about, "Measure", list(titles), [("", "", rows)])


def _histograms(found: Sequence[ImplicitRewards], letters: Sequence[str]) -> Chart:
    """Rewards of chosen and rejected over common bins, a panel a run."""
    edges = np.histogram_bin_edges(
        np.concatenate([values for one in found for values in (one.chosen, one.rejected)]), BINS
    )
    panels = []
    for one, letter in zip(found, letters, strict=True):
        marks: list[Mark] = []
        for look, (kind, values) in enumerate(zip(KINDS, (one.chosen, one.rejected), strict=True)):
            heights = np.histogram(values, edges)[0] / len(values)
            mean = float(values.mean())
            marks.append(Steps(look, kind, edges.tolist(), heights.tolist(), middle=mean, filled=look == 0))
        panels.append(Panel(letter, marks, percent=True))
    return chart(
        "Distribution of implicit rewards",
        "The share of held-out rows by the implicit reward of their chosen and of their rejected response; dashed "
        "lines are the means.",
        panels,
        XAxis(label="implicit reward"),
        panel_height=150 if len(found) == 1 else 80,
    )


def _sorted_chart(differences: Sequence[Difference], titles: Sequence[str], first: str) -> Chart:
    """Differences sorted by their size, chosen and rejected each by itself."""
    panels = [
        Panel(
            title,
            [
                Line(look, kind, _sorted(values))
                for look, (kind, values) in enumerate(zip(KINDS, (one.chosen, one.rejected), strict=True))
            ],
            level=0.0,
        )
        for title, one in zip(titles, differences, strict=True)
        if len(one.rows)
    ]
    return chart(
        "Sorted differences of implicit rewards",
        f"The implicit reward under a run's policy less that under {first}'s, of each held-out row, from the least to "
        "the greatest, chosen and rejected each sorted by itself; the dotted line is no difference.",
        panels,
        XAxis(label="share of rows, %"),
        panel_height=150 if len(differences) == 1 else 110,
    )


def _sorted(values: Floats) -> Series:
    """Values in order over the share of rows up to each; as many as a chart has room for, the ends among them."""
    ordered, series = np.sort(values), Series()
    last = len(ordered) - 1
    for place in np.unique(np.linspace(0, last, min(len(ordered), MAX_POINTS)).round().astype(int)).tolist():
        series.add(100 * place / max(1, last), float(ordered[place]))
    return series


def _share(of: Interval) -> Cell:
    return Cell(percent(of.mean), f"{percent(of.low)} to {percent(of.high)}")


def _skips(reason: str) -> Callable[[ImplicitRewards], Cell]:
    return lambda one: Cell(count(one.skipped.get(reason, 0)))


def _difference(values: Floats) -> Cell:
    """A mean difference with its interval, and whether it is one."""
    mean = average(values)
    cell = interval(mean)
    if mean.mean is None or is_shown(mean):
        return cell
    return Cell(cell.text, f"{cell.note}, not shown" if cell.note else "not shown")
