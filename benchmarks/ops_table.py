"""The table of docs/kernels.md, from the results of bench_ops.py:

python benchmarks/ops_table.py benchmarks/results/ops_amd_epyc.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS = "selm_fast"


def table(results: dict[str, Any]) -> str:
    """Wall time (ms), in units of one matmul, and extra memory of the head by every contestant; dtypes side by side."""
    dtypes = [run["dtype"] for run in results["runs"]]
    head = [f"{dtype} {what}" for dtype in dtypes for what in ("no gradient", "forward + backward", "extra memory")]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for name in _contestants(results["runs"]):
        cells = []
        for run in results["runs"]:
            no_grad = _row(run, OURS if name.startswith(OURS) else name, "no-grad")
            both = _row(run, name, "forward + backward")
            extra = both and both["extra_bytes"]
            cells += [_time(no_grad), _time(both), "" if extra is None else f"{extra / 2**20:.0f} MiB"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _contestants(runs: list[dict[str, Any]]) -> list[str]:
    rows = [row for run in runs for row in run["rows"] if row["op"] == "linear_logprob"]
    return list(dict.fromkeys(row["name"] for row in rows if row["kind"] == "forward + backward"))


def _row(run: dict[str, Any], name: str, kind: str) -> dict[str, Any] | None:
    for row in run["rows"]:
        if (row["op"], row["name"], row["kind"]) == ("linear_logprob", name, kind):
            return row
    return None


def _time(row: dict[str, Any] | None) -> str:
    """Nothing for a contestant that was not there, or whose numbers were wrong."""
    if row is None or row["wall_ms"] is None:
        return ""
    return f"{row['wall_ms']['median']:.0f} ms ({row['gemms_wall']:.2f})"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
