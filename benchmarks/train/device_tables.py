"""The result of `make gpu-train` as Markdown, and its targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.scaling_model import PEAK
from benchmarks.train import tables
from benchmarks.train.figures import judged

HFU = 0.55  # of PEAK, all that is computed, with full checkpointing
OFF = 0.10  # of the memory model's estimate
COLUMNS = (
    "part", "step, s", "groups/s", "reference pass counted in", "packed tokens/s", f"MFU at {PEAK / 1e12:g} TFLOP/s",
    "HFU", "MFU at a bare matmul's", "HFU", "peak allocated, GiB", "reserved", "estimated", "ratio",
)  # fmt: skip


def judge(part: Mapping[str, Any], device_name: str) -> list[dict[str, Any]]:
    """The targets of a part; of speed none where a value is wrong, and none but on the device that they are about."""
    if "H200" not in device_name or not part.get("memory"):
        return []
    found = [
        judged(f"{part['name']}: peak memory of a {name}, off its estimate", off(held), OFF, least=False)
        for name, held in part["memory"].items()
    ]
    waits = None if part["waits"] is None else len(part["waits"])
    found.append(judged(f"{part['name']}: waits for the device in a step", waits, 0, least=False))
    if part["shape"]["name"] == "8b" and part["settings"]["checkpointing"] == "full":
        hfu = part["speed"] and part["speed"]["computed_flop_per_s"]["median"] / PEAK
        found.append(judged(f"{part['name']}: HFU at {PEAK / 1e12:g} TFLOP/s", hfu, HFU, least=True))
    return found


def off(held: Mapping[str, Any]) -> float | None:
    """How far a peak is from its estimate, as a share of that."""
    return None if held["ratio"] is None else abs(held["ratio"] - 1)


def table(section: Mapping[str, Any]) -> Iterator[str]:
    """A row a part, then its targets and what is to be known of it; of a wrong part only what was wrong."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for part in section["parts"]:
        if part["speed"] is not None:
            yield f"| {' | '.join([part['name'], *cells(part)])} |"
    yield ""
    for part in section["parts"]:
        yield from notes(part)
        yield from tables.targets(part)


def cells(part: Mapping[str, Any]) -> list[str]:
    """The figures of a part."""
    speed, held = part["speed"], part["memory"]["step"]
    useful, computed = (speed[f"{kind}_flop_per_s"]["median"] for kind in ("useful", "computed"))
    return [
        f"{speed['step_s']['median']:.3f}",
        f"{speed['groups_per_s']['median']:.2f}",
        f"{speed['groups_per_s_with_reference']:.2f}",
        f"{speed['tokens_per_s']['median']:,.0f}",
        *(f"{rate / peak:.1%}" for peak in (PEAK, speed["matmul_flop_per_s"]) for rate in (useful, computed)),
        *(gib(held[name]) for name in ("allocated", "reserved", "estimated")),
        "" if held["ratio"] is None else f"{held['ratio']:.2f}",
    ]


def notes(part: Mapping[str, Any]) -> Iterator[str]:
    """What was trained, what was changed for it to fit, what waits, and what was wrong."""
    for reason in part.get("wrong", ()):
        yield f"{part['name']}: WRONG, so that no speed is shown: {reason}"
    for line in part.get("told", ()):
        yield f"{part['name']}: {line}"
    for place in dict.fromkeys(part.get("waits") or ()):
        yield f"{part['name']}: waits for the device at {place}"
    if part["speed"] is None:
        yield ""
        return
    speed, rows, settings = part["speed"], part["rows"], part["settings"]
    yield (
        f"{part['name']}: {part['weights'] / 1e9:.2f}e9 random weights in {part['dtype']} over fp32 masters, "
        f"moments in {settings['moments']}, activation checkpointing {settings['checkpointing']}; {rows['source']} "
        f"rows of {rows['mean_tokens']:,.0f} tokens, {settings['groups']} groups a step in micro-batches of up to "
        f"{settings['max_tokens']:,}; medians of {settings['steps']} steps. A bare matmul reached "
        f"{speed['matmul_flop_per_s'] / 1e12:,.3g} TFLOP/s; the reference pass {speed['reference_groups_per_s']:,.1f} "
        f"groups/s. Loss of step 0: ln 2 to the bit; on repeated groups {part['repeated'][0]:.3f} to "
        f"{part['repeated'][-1]:.3f}."
    )
    yield ""


def gib(count: float | None) -> str:
    """Bytes in GiB."""
    return "" if count is None else f"{count / 2**30:.2f}"
