"""The result of a training benchmark as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

OURS, PEERS = "#0b6e4f", "#8d99ae"


def draw(train: Mapping[str, Any], path: Path) -> None:
    """Write an SVG: groups/s and peak memory of every contestant, the fastest at the top; the same bytes each time."""
    rows = [row for row in train["contestants"] if "groups_per_s" in row]
    rows.sort(key=lambda row: row["groups_per_s_with_reference"])
    names = [row["name"] + (" (DPO)" if row["method"] == "dpo" and "DPO" not in row["name"] else "") for row in rows]
    colours = [OURS if row["ours"] else PEERS for row in rows]
    figure = Figure(figsize=(11, 0.8 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.barh(names, [row["groups_per_s_with_reference"] for row in rows], color=colours)
    left.set_xlabel("groups/s, reference pass counted in")
    right.barh(names, [(row["peak_bytes"] or 0) / 2**30 for row in rows], color=colours)
    right.set_xlabel("peak memory above the loaded model, GiB")
    for axes, form in ((left, "%.2f"), (right, "%.2f")):
        axes.bar_label(axes.containers[0], fmt=form, padding=3, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.suptitle(f"{train['device_name']}, {train['dtype']}, {train['threads']} threads", fontsize=10)
    with matplotlib.rc_context({"svg.hashsalt": "selm_fast", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
