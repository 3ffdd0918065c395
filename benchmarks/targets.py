"""What the project set itself to reach, and whether a run reached it."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import BACKWARD, NO_GRAD

H200 = {"N": 8192, "D": 4096, "V": 128256}
CPU = {"N": 1024, "D": 2048, "V": 32000}
OURS = {"no-grad": "selm_fast", "keep": "selm_fast keep", "recompute": "selm_fast recompute"}
EAGER = "torch eager"

# In milliseconds of CUDA events; in GEMMs of the same run (CPU time); bytes beyond inputs and outputs.
H200_MS = {"no-grad": 12.5, "keep": 38.0, "recompute": 47.0}
H200_KEEP_ONE_READ_MS = 36.0  # of a row kernel that reads the fp32 tile once, as this package's does
H200_RECOMPUTE_BYTES = 500_000_000
CPU_GEMMS = {"no-grad": 1.1, "keep": 3 * 1.15, "recompute": 4 * 1.15}
CPU_RECOMPUTE_BYTES = 64 * 2**20
CPU_THREADS = 2


def judge(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that belong to a run's device, shape and dtype -> [{"target", "measured", "bound", "met", "why"}].

    `met` is None where nothing can be said, and `why` says why: there is no number, for the check failed or memory was
    not measured, or the run is not one that the target is about.
    """
    rows = {(row["name"], row["kind"]): row for row in run["rows"] if row["op"] == "linear_logprob"}
    mine = {mode: rows[name, NO_GRAD if mode == "no-grad" else BACKWARD] for mode, name in OURS.items()}
    if run["device"] == "cuda" and "H200" in run["device_name"] and run["shape"] == H200 and run["dtype"] == "bf16":
        found = [_at_most(f"{mode}, ms", _median(mine[mode]), bound) for mode, bound in H200_MS.items()]
        one_read = "keep, ms, reading the fp32 tile once"
        found.append(_at_most(one_read, _median(mine["keep"]), H200_KEEP_ONE_READ_MS))
        found.append(_at_most("recompute, extra bytes", mine["recompute"]["extra_bytes"], H200_RECOMPUTE_BYTES))
        return [*found, *_ahead_of_peers(mine["keep"], run["rows"])]
    if run["device"] == "cpu" and run["shape"] == CPU:
        memory = _at_most("recompute, extra bytes", mine["recompute"]["extra_bytes"], CPU_RECOMPUTE_BYTES)
        other = f"it is about {CPU_THREADS} threads; these were {run['threads']}"
        reason = None if run["threads"] == CPU_THREADS else other
        if run["dtype"] == "fp32":
            gemms = [_at_most(f"{m}, GEMMs", mine[m]["gemms"], bound) for m, bound in CPU_GEMMS.items()]
            return _unless(reason, [*gemms, memory])
        eager = {"no-grad": rows[EAGER, NO_GRAD], "keep": rows[EAGER, BACKWARD]}
        ahead = [
            _at_most(f"{mode}, CPU ms, beside torch eager", _median(mine[mode]), _median(row))
            for mode, row in eager.items()
        ]
        if not run["bf16_in_fp32"]:
            reason = "the extension multiplies no bf16 matrices with fp32 results here"
        return _unless(reason, [*ahead, memory])
    return []


def summary(verdicts: dict[str, bool | None]) -> str:
    """In a line: how many targets are met, and which are not."""
    words = f"{sum(met is True for met in verdicts.values())} of {len(verdicts)} targets met"
    for what, verdict in (("missed", False), ("not judged", None)):
        names = "; ".join(name for name, met in verdicts.items() if met is verdict)
        words += f"; {what}: {names}" if names else ""
    return words


def _ahead_of_peers(keep: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`keep` against every peer whose tokens have upstream gradients of their own."""
    return [
        _at_most(f"keep, ms, beside {row['name']}", _median(keep), _median(row))
        for row in rows
        if row["op"] == "linear_logprob"
        and row["kind"] == BACKWARD
        and row["per_token_gradients"]
        and not row["ours"]
        and row["ms"] is not None
    ]


def _median(row: dict[str, Any]) -> float | None:
    return None if row["ms"] is None else row["ms"]["median"]


def _at_most(target: str, measured: float | None, bound: float | None) -> dict[str, Any]:
    met = None if measured is None or bound is None else measured <= bound
    why = "not measured" if met is None else None
    return {"target": target, "measured": measured, "bound": bound, "met": met, "why": why}


def _unless(reason: str | None, verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts, or where there is a reason against them the numbers alone."""
    return verdicts if reason is None else [verdict | {"met": None, "why": reason} for verdict in verdicts]
