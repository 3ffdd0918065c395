"""The report of a real run shows the figures that its table shows: two readers of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from selm_fast.iteration.paths import Paths
from selm_fast.iteration.summary import iteration_row

from ..report.checks import ABSENT, assert_shows, report
from ..report.document import table
from .harness import Finished, planned

ROWS = {
    "reward": "Reward: greedy responses",
    "win rate": "Win rates: over the base model",
    "margin": "Held-out pairs: margin, chosen over rejected",
    "accuracy": "Held-out pairs: accuracy",
    "chosen": "Held-out pairs: reward of chosen",
    "rejected": "Held-out pairs: reward of rejected",
    "KL": "Distance and length: KL from the base model",
    "tokens": "Distance and length: mean tokens of a response",
    "groups/s": "Training: groups a second",
}


@pytest.fixture
def run_of(finished: Finished, whole: Paths, tmp_path: Path) -> Callable[[str], tuple[Path, Paths]]:
    """A run's folder to make a report of; those of `finished` have no record, which is added."""

    def make(name: str) -> tuple[Path, Paths]:
        folder = tmp_path / "run"
        if name == "whole":
            folder.symlink_to(whole.root)
            return folder, whole
        paths = finished(name)
        folder.mkdir()
        for path in paths.root.glob("iter-*"):
            (folder / path.name).symlink_to(path)
        record = {"config": paths.config.to_json(), "stages": list(planned(paths.config)), "done": True}
        (folder / "run.json").write_text(json.dumps(record))
        return folder, paths

    return make


@pytest.mark.parametrize("name", ["whole", pytest.param("xpo", marks=pytest.mark.slow), "dpo first"])
def test_the_figures_of_every_iteration(run_of: Callable[[str], tuple[Path, Paths]], name: str) -> None:
    folder, paths = run_of(name)
    page, _ = report(folder)
    assert not page.all("p", "missing")
    shown = table(page, "Results by iteration")
    for number in range(paths.config.iterations + 1):
        column = "Before training" if number == 0 else f"Iteration {number}"
        row = iteration_row(paths, number) or {}
        for figure, title in ROWS.items():
            value, text = row.get(figure), shown.get(title, {}).get(column, ABSENT)
            if value is None:
                assert text == ABSENT
            else:
                assert_shows(text.split()[0], value)
