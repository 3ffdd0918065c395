"""The result of a training benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.train import field

COLUMNS = (
    "contestant", "groups/s", "quartiles", "groups/s, reference pass counted in", "groups per CPU second",
    "CPU time in the kernel", "useful tokens/s", "MFU", "peak memory, GiB", "set-up, s", "reference pass, s",
    "epoch, min",
)  # fmt: skip


def train(section: Mapping[str, Any]) -> Iterator[str]:
    """Every contestant in a row, then targets, profile, and how it was measured."""
    shape, rows, settings = section["shape"], section["rows"], section["settings"]
    matmul = section["peaks"]["matmul_flop_per_s"][section["dtype"]]
    yield (
        f"{section['device_name']}, {section['threads']} threads, {section['dtype']}; Llama of {shape['hidden_size']} "
        f"hidden units, {shape['num_hidden_layers']} layers, {shape['vocab_size']:,} tokens of vocabulary; "
        f"{rows['source']} rows, {settings['groups']} groups a step, max_length {settings['max_length']}; medians of "
        f"{section['rounds']} rounds. Between these a large matmul reached {matmul / 1e9:,.0f} GFLOP/s and a copy "
        f"{section['peaks']['copy_bytes_per_s'] / 1e9:,.1f} GB/s: what else the machine was doing shows in them."
    )
    yield ""
    yield from speeds(section)
    yield ""
    yield from outside_kernel(section)
    yield from targets(section)
    yield from profile(section)
    for name, reason in section["missing"].items():
        yield f"Left out: {name}: {reason}"


def outside_kernel(section: Mapping[str, Any]) -> Iterator[str]:
    """The ratio that does not depend on how quickly a machine hands out memory."""
    if section["outside_kernel"]:
        yield (
            f"Of CPU time outside the kernel, which clears the pages that a process takes anew, {field.TRL_SELM} "
            f"spends {section['outside_kernel']:.1f} times as much on a step as {field.OURS}."
        )
        yield ""


def speeds(section: Mapping[str, Any]) -> Iterator[str]:
    """The table."""
    for title, method in (("SELM", "selm"), ("DPO", "dpo")):
        entries = [row for row in section["contestants"] if row["method"] == method]
        if not entries:
            continue
        yield f"| {title}: {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for row in entries:
            yield "| " + " | ".join([row["name"], *cells(row)]) + " |"
        yield ""


def cells(row: Mapping[str, Any]) -> list[str]:
    """The figures of a contestant; nothing where it failed."""
    if row["failed"] is not None or "groups_per_s" not in row:
        return [f"failed: {row['failed']}", *[""] * (len(COLUMNS) - 2)]
    rate, peak = row["groups_per_s"], row["peak_bytes"]
    return [
        f"{rate['median']:.2f}",
        f"{rate['low']:.2f}-{rate['high']:.2f}",
        f"{row['groups_per_s_with_reference']:.2f}",
        f"{row['groups_per_cpu_s']:.2f}",
        f"{sum(row['kernel_s']) / sum(row['cpu_s']):.0%}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['mfu']:.1%}",
        "" if peak is None else f"{peak / 2**30:.2f}",
        f"{row['setup_s']:.1f}",
        f"{row['reference_s']:.1f}",
        f"{row['epoch_s'] / 60:.1f}",
    ]


def targets(section: Mapping[str, Any]) -> Iterator[str]:
    """A line a target."""
    for target in section["targets"]:
        measured = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        verdict = {None: target["why"], True: "met", False: "MISSED"}[target["met"]]
        way = "at least" if target["least"] else "at most"
        yield f"Target {target['target']}: {measured}, {way} {target['bound']:g}: {verdict}"
    if section["targets"]:
        yield ""


def profile(section: Mapping[str, Any]) -> Iterator[str]:
    """Where the time of a step goes, by kind of work, for all that were profiled, and the least it could take."""
    profiled = [row for row in section["contestants"] if row.get("breakdown")]
    if not profiled:
        return
    kinds = list(dict.fromkeys(kind for row in profiled for kind in row["breakdown"]))
    yield f"| ms of a step | {' | '.join(row['name'] for row in profiled)} |"
    yield "|---" * (len(profiled) + 1) + "|"
    for kind in kinds:
        yield f"| {kind} | " + " | ".join(f"{row['breakdown'].get(kind, 0) * 1e3:,.0f}" for row in profiled) + " |"
    yield "| all | " + " | ".join(f"{sum(row['breakdown'].values()) * 1e3:,.0f}" for row in profiled) + " |"
    yield ""
    if section["roofline"]:
        parts = ", ".join(f"{part} {seconds * 1e3:,.0f}" for part, seconds in section["roofline"].items())
        total = sum(section["roofline"].values()) * 1e3
        yield f"The least that this step of selm_fast could take at the machine's peak rates: {parts}: {total:,.0f} ms."
        yield ""
