"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_uppercase

from selm_fast.errors import Refused, RunFailed
from selm_fast.report import charts, iteration_charts, measures, row_measures
from selm_fast.report.cells import interval
from selm_fast.report.figures import Chart
from selm_fast.report.implicit_view import ImplicitView, implicit_view
from selm_fast.report.numbers import ABSENT, listed, percent
from selm_fast.report.prompts import prompts
from selm_fast.report.rollout_rewards import rollout_histograms
from selm_fast.report.runs import Run, read_runs
from selm_fast.report.settings import changed_settings, setting_text
from selm_fast.report.tables import tables
from selm_fast.report.template import page
from selm_fast.training import storage


@dataclass(frozen=True, slots=True)
class Head:
    """A run at the top of the page. letter: what it is called in charts, where there are several."""

    letter: str
    name: str
    facts: dict[str, str]
    headline: str | None
    missing: str | None


def write_report(runs: Sequence[Path], out: Path, *, data: str | None = None) -> None:
    """Write one HTML file about one run, or several beside each other.

    runs: folders of `selm-fast run` or `selm-fast train`, finished or not.
    data: held-out rows, in any format of `data.train`: implicit rewards on them are shown too, for which the models
    are loaded and passed over the rows, and the scores of rollouts.
    Raises Refused where a folder is no run, a file in it is damaged, or `out` cannot be written, and, with `data`,
    for what `implicit_rewards` refuses; Stopped after a signal while it computes.
    """
    found = read_runs(runs)
    out = out.expanduser()
    if out.is_dir():
        raise Refused(f"{out} is a folder: give the name of the HTML file to write, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise Refused(f"{out.parent} is no folder: make it first, or give another --out")
    html = render(found) if data is None else _render_with_data(found, data)
    try:
        storage.write_atomic(out, html.encode())
    except OSError as error:
        raise RunFailed(f"{out} was not written: {error.strerror}") from error


def _render_with_data(runs: Sequence[Run], data: str) -> str:
    from selm_fast.report.log_probs import implicit_rewards  # brings torch, which no other report waits for

    letters, names = _called(runs)
    rollouts = rollout_histograms(runs, letters, names)  # first: what is damaged is refused before any work
    found = implicit_rewards(runs, data)
    return render(runs, implicit=implicit_view(found, data, letters, names), rollouts=rollouts)


def render(runs: Sequence[Run], *, implicit: ImplicitView | None = None, rollouts: Chart | None = None) -> str:
    """The page about these runs."""
    letters, names = _called(runs)
    differ, same = changed_settings(runs)
    return page(
        "page.html.j2",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        heads=[_head(run, letter) for run, letter in zip(runs, letters, strict=True)],
        differ=differ,
        same=same,
        letters=letters,
        results=tables("Results by iteration", measures.results(), runs, names),
        how_to_read=charts.how_to_read(runs),
        training=_shown(charts.step_charts(charts.TRAINING, runs, names)),
        evaluation=_shown(
            [
                iteration_charts.reward_chart(runs, names),
                *iteration_charts.win_rate_charts(runs, names),
                iteration_charts.reward_histograms(runs, names, letters),
                iteration_charts.length_chart(runs, names),
                iteration_charts.mean_length_chart(runs, names),
                iteration_charts.divergence_chart(runs, names),
            ]
        ),
        implicit=implicit,
        rollouts=_shown([rollouts]),
        speed=charts.step_charts(charts.SPEED, runs, names),
        time=_shown([iteration_charts.time_chart(runs, letters)]),
        seconds=tables("Time of each stage", measures.seconds(), runs, names),
        skipped=tables("Skipped rows by stage and reason", row_measures.skipped(runs), runs, names),
        sources=tables("Where chosen and rejected come from", row_measures.sources(runs), runs, names),
        prompts=prompts(runs, names),
        several=len(runs) > 1,
    )


def _head(run: Run, letter: str) -> Head:
    method = run.setting("method")
    own = run.setting("iteration")
    exceptions = [
        f"iteration {number} {changes['method']}"
        for number, changes in (own.items() if isinstance(own, dict) else ())
        if isinstance(changes, dict) and "method" in changes
    ]
    facts = {
        "model": run.setting("model.path") or run.setting("model.init") or run.setting("prepare"),
        "method": f"{method} ({listed(exceptions)})" if exceptions else method,
        "beta": setting_text(run.setting("beta")),
        "alpha": None if method == "dpo" else setting_text(run.setting("alpha")),
        "ranker": run.setting("ranker"),
        "iterations": None if run.plain else run.setting("iterations"),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())),
    }
    return Head(
        letter, run.name, {name: str(fact) for name, fact in facts.items() if fact}, _headline(run), run.missing()
    )


def _headline(run: Run) -> str | None:
    """What the run has come to, in a sentence."""
    last = run.last_evaluated
    if last is None or last.number == 0 or last.evaluation is None:
        return None
    plural = "s" * (last.number > 1)
    first = next((iteration.evaluation for iteration in run.iterations if iteration.number == 0), None)
    before, after = (interval(found.reward if found else None).text for found in (first, last.evaluation))
    if after == ABSENT:
        return None
    if before != ABSENT:
        text = (
            f"In {last.number} iteration{plural} the mean reward of greedy responses to held-out prompts went from "
            f"{before} to {after}"
        )
    else:
        text = f"After {last.number} iteration{plural} the mean reward of greedy responses is {after}"
    base = last.evaluation.win_rate.get("base")
    if base is not None and None not in base.length_controlled:
        rate, low, high = base.length_controlled
        between = f"{percent(low)} to {percent(high)}"
        text += f"; their win rate over the base model, at equal length, is {percent(rate)} (95% interval {between})"
    return f"{text}."


def _shown(drawn: Sequence[Chart | None]) -> list[Chart]:
    return [one for one in drawn if one is not None]


def _called(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Letters and names of the runs; one that is alone has no letter."""
    letters = _letters(len(runs)) if len(runs) > 1 else [""]
    return letters, [f"{letter} {run.name}".strip() for letter, run in zip(letters, runs, strict=True)]


def _letters(wanted: int) -> list[str]:
    """A, B, ..., Z, AA, AB, ..."""
    names = (*ascii_uppercase, *map("".join, product(ascii_uppercase, repeat=2)))
    return list(names[:wanted])
