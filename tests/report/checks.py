"""Writing reports and comparing what they show with the files they are about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selm_fast.report import charts, iteration_charts
from selm_fast.report.page import write_report

from .document import Element, parse

ABSENT = "\N{EN DASH}"
STEPS, PROMPTS = 12, 25  # of each iteration of the run that most tests share
COLUMNS = ["Before training", "Iteration 1", "Iteration 2", "Iteration 3"]


def report(*runs: Path) -> tuple[Element, str]:
    """The report on these runs: parsed, and as it is in its file."""
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    html = out.read_text("utf-8")
    return parse(html), html


def leave_out_other_charts(patch: pytest.MonkeyPatch) -> None:
    """Draw no chart but those that held-out rows add: the others take most of a page's time."""
    for module in (charts, iteration_charts):
        patch.setattr(module, "chart", lambda *_, **__: None)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))


def lines(path: Path) -> list[Any]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def assert_shows(text: str, *values: float) -> None:
    """The numbers of a cell are these, to half of their last digit; at least two digits of each are shown."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?", text.replace("\N{MINUS SIGN}", "-"))
    assert len(found) == len(values), text
    for shown, value in zip(found, values, strict=True):
        plain = shown.replace(",", "").rstrip("%")
        scale = 0.01 if shown.endswith("%") else 1.0
        decimals = len(plain.partition(".")[2])
        assert abs(float(plain) * scale - value) <= 0.5000001 * 10.0**-decimals * scale, (shown, value)
        assert decimals >= 1 or abs(value) >= 10 or value == int(value), (shown, value)


def seconds(text: str) -> float:
    """Seconds of a time as the page writes it."""
    units = {"h": 3600.0, "min": 60.0, "s": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (h|min|s)\b", text))
