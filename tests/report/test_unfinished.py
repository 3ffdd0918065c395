"""Runs that are under way or were stopped, and folders of `train` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selm_fast.report.runs import read_runs

from .checks import ABSENT, COLUMNS, STEPS, assert_shows, lines, read, report
from .document import chart, points, table
from .synthetic import write_run, write_train


def test_stopped_in_training(tmp_path: Path) -> None:
    page, _ = report(write_run(tmp_path / "run", steps=STEPS, prompts=5, stop=(2, "train")))
    (missing,) = page.all("p", "missing")
    assert missing.words == (
        "Unfinished. Under way, or stopped, in train of iteration 2, after step 6. "
        "Still to come: evaluate and iteration 3."
    )
    shown = table(page, "Results by iteration")
    assert list(shown["Training: steps"].values()) == [ABSENT, str(STEPS), str(STEPS // 2)]
    assert shown["Reward: greedy responses"]["Iteration 1"] != ABSENT
    assert shown["Reward: greedy responses"]["Iteration 2"] == ABSENT
    assert sum(map(len, points(chart(page, "Gradient norm"), "--s0"))) == STEPS - 1 + STEPS // 2
    assert [one.words for one in page.all("article")[0].all("h4")] == [*COLUMNS[:2], "Reference answer"]


@pytest.mark.parametrize(
    ("stop", "settings", "said"),
    (
        ((0, "evaluate"), {}, "in evaluate of iteration 0. Still to come: iterations 1 to 3."),
        ((2, "cache"), {}, "in cache of iteration 2. Still to come: train, evaluate and iteration 3."),
        ((3, "evaluate"), {}, "in evaluate of iteration 3."),
        (
            (0, "prepare"),
            {"prepare": "python:a:b", "model": {}, "data": {}},
            "in prepare. Still to come: iterations 1 to 3.",
        ),
        (
            (1, "rank"),
            {"iteration": {1: {"method": "dpo", "rollout": {"responses": 0}}}},
            "in rank of iteration 1. Still to come: cache, train, evaluate and iterations 2 to 3.",
        ),
        (
            (2, "train"),
            {"data": {"train": "rows.jsonl"}},
            "in train of iteration 2, after step 1. Still to come: iteration 3.",
        ),
    ),
)
def test_says_what_is_missing(tmp_path: Path, stop: tuple[int, str], settings: dict[str, Any], said: str) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", steps=2, prompts=2, stop=stop, **settings)])
    assert run.missing() == f"Under way, or stopped, {said}"


def test_what_is_no_part_of_the_run_any_more_is_not_shown(tmp_path: Path) -> None:
    """As after fewer iterations were asked for: the folders of the others stay, and may be taken up again."""
    whole = write_run(tmp_path / "run", steps=2, prompts=2)
    record = read(whole / "run.json")
    record["stages"] = [title for title in record["stages"] if not title.startswith("iter-3/")]
    (whole / "run.json").write_text(json.dumps(record), "utf-8")
    (run,) = read_runs([whole])
    assert [one.number for one in run.iterations] == [0, 1, 2]
    assert report(whole)[0].words.count("In 2 iterations the mean reward") == 1


def test_all_but_the_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, prompts=2, iterations=1)
    record = read(run / "run.json")
    (run / "run.json").write_text(json.dumps(record | {"done": False}), "utf-8")
    assert read_runs([run])[0].missing() == "Every stage is there; the model is still to be written."


def test_an_evaluation_under_way_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, prompts=2, iterations=1, stop=(1, "rollout"))
    (run / "iter-0/evaluate/manifest.json").unlink()
    (run / "iter-0/evaluate/responses.jsonl").write_text('{"row": 0, "pro', "utf-8")
    page, _ = report(run)
    assert not page.all("table", "numbers") and not page.all("figure") and not page.all("article")


def test_one_training(tmp_path: Path) -> None:
    run = write_train(tmp_path / "dpo", steps=STEPS, method="dpo", beta=0.1)
    page, _ = report(run)
    metrics = lines(run / "metrics.jsonl")
    shown = table(page, "Results by iteration")
    assert {column for row in shown.values() for column in row} == {"Training"}
    assert_shows(shown["Held-out pairs: margin, chosen over rejected"]["Training"], metrics[-1]["eval_rewards/margins"])
    rates = [line["groups_per_second"] for line in metrics if "loss" in line]
    assert_shows(shown["Training: groups a second"]["Training"], len(rates) / sum(1 / rate for rate in rates))
    titles = [figure.all("h3")[0].words for figure in page.all("figure")]
    assert titles[:2] == ["Loss", "Implicit rewards"] and titles[-1] == "Memory"  # no exploration: no such chart
    assert [one.words for one in chart(page, "Implicit rewards").all("li")] == ["chosen", "rejected"]
    assert not page.all("article") and not page.all("p", "missing")


def test_under_way(tmp_path: Path) -> None:
    run = write_train(tmp_path / "run", steps=STEPS, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # being written
    page, _ = report(run)
    assert page.all("p", "missing")[0].words == "Unfinished. Under way, or stopped, after step 6."
    assert table(page, "Results by iteration")["Training: steps"]["Training"] == "6"


def test_nothing_yet(tmp_path: Path) -> None:
    run = write_train(tmp_path / "run", done=False)
    (run / "metrics.jsonl").unlink()
    page, _ = report(run)
    assert page.all("p", "missing")[0].words == "Unfinished. Under way, or stopped, after step 0."
    assert not page.all("figure")
