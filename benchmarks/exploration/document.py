"""The tables and figures of docs/exploration.md, written between its markers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.exploration import figures, page, tables
from benchmarks.exploration.analysis import Results, Table
from selm_fast.report.figures import Chart
from selm_fast.report.styles import PALETTE

DOCUMENT = Path("docs/exploration.md")
FIGURES = Path("docs/exploration")  # a folder of SVG files
_BLOCK = re.compile(r"<!-- table: (?P<name>[a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)


def markdown(table: Table) -> str:
    """A table, and what it says of itself."""
    lines = ["| " + " | ".join(table.head) + " |", "|---" * len(table.head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join(([table.about, ""] if table.about else []) + lines)


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """By name, what stands between the markers."""
    results = Results(result["exploration"])
    found = {table.name: markdown(table) for table in tables.tables(results)}
    facts = page.provenance(result, results)
    return found | {"provenance": "; ".join(f"{name}: {fact}" for name, fact in facts.items()) + "."}


def filled(text: str, result: Mapping[str, Any]) -> str:
    """A document with every block as the results say. Raises ValueError for a block of an unknown name."""
    known = blocks(result)

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise ValueError(f"{DOCUMENT}: no table is called {name}; expected one of {', '.join(known)}")
        return f"<!-- table: {name} -->\n{known[name]}\n<!-- end -->"

    return _BLOCK.sub(fill, text)


def stale(result: Mapping[str, Any]) -> list[str]:
    """The files whose tables or figures are not what the results say."""
    text = DOCUMENT.read_text("utf-8")
    found = [] if filled(text, result) == text else [str(DOCUMENT)]
    for path, drawn in _figures(result, text):
        # By what it shows, in words and numbers: another matplotlib draws the same with other bytes.
        if not path.is_file() or figures.described(drawn) not in path.read_text("utf-8"):
            found.append(str(path))
    return found


def write(result: Mapping[str, Any]) -> None:
    """Fill the document in place, and draw the figures that it shows."""
    text = filled(DOCUMENT.read_text("utf-8"), result)
    DOCUMENT.write_text(text, "utf-8")
    FIGURES.mkdir(exist_ok=True)
    for path, drawn in _figures(result, text):
        path.write_text(figures.svg(drawn, PALETTE), "utf-8")


def _figures(result: Mapping[str, Any], text: str) -> Iterator[tuple[Path, Chart]]:
    """Path and chart of each figure that the document shows."""
    results = Results(result["exploration"])
    for name, draw in figures.CHARTS.items():
        if f"]({FIGURES.name}/{name}.svg)" in text:
            yield FIGURES / f"{name}.svg", draw(results)
