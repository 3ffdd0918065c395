"""From what the contestants said to the figures of the table: rates, memory, utilisation, ratios, targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from benchmarks import measure
from benchmarks.train import field
from benchmarks.train.race import Runner
from benchmarks.train.workload import Row, Workload
from selm_fast.roofline import GroupLengths, Settings, Shape, Work, bound, flops, traffic, useful_flops

Figures = dict[str, Any]
# Of one step's wall time, and of memory: what the project set itself to reach.
CPU_SELM, CPU_DPO, CPU_GEMMS, CPU_MEMORY, GPU_SELM, GPU_ROOFLINE = 7.0, 4.0, 1.2, 0.25, 4.0, 1.15
THREADS = 2


def figures(runner: Runner, workload: Workload, mean_tokens: float, peak: float) -> Figures:
    """The row of one contestant.

    A rate in groups is one of useful tokens over their mean in a group of the whole workload: batches differ in length.
    mean_tokens: that mean.  peak: FLOP/s of a large matmul in the same rounds.
    """
    entry, groups = runner.contestant, workload.settings.groups
    found: Figures = {
        "name": entry.name, "what": entry.what, "method": entry.method, "ours": entry.ours, "failed": runner.failed,
        "parity": runner.parity, **runner.setup,
    }  # fmt: skip
    if runner.failed is not None or not runner.counted:
        return found
    rows = runner.counted_rows(groups)
    batches = [rows[i : i + groups] for i in range(0, len(rows), groups)]
    tokens = [sum(row.useful_tokens(entry.exploring) for row in batch) for batch in batches]
    shape = shape_of(workload)
    useful = [useful_flops(shape, work_of(batch, entry.exploring)) for batch in batches]
    walls, cpus, kernel = ([step[clock] for step in runner.counted] for clock in ("wall_s", "cpu_s", "kernel_s"))
    per_s = [count / seconds for count, seconds in zip(tokens, walls, strict=True)]
    rate = statistics.median(per_s) / mean_tokens
    all_tokens = sum(row.useful_tokens(entry.exploring) for row in runner.job.rows)
    reference_s = runner.setup["reference_s"] / all_tokens * mean_tokens  # of one group
    count = len(workload.rows())
    return found | {
        "warm_up": entry.warm_up,
        "wall_s": walls,
        "cpu_s": cpus,
        "kernel_s": kernel,
        "useful_tokens": tokens,
        "groups_per_s": {key: value / mean_tokens for key, value in measure.summary(per_s).items()},
        "groups_per_cpu_s": statistics.median(n / s for n, s in zip(tokens, cpus, strict=True)) / mean_tokens,
        "groups_per_s_with_reference": 1 / (1 / rate + reference_s),
        "tokens_per_s": statistics.median(per_s),
        "epoch_s": runner.setup["setup_s"] + count * (1 / rate + reference_s),
        "mfu": statistics.median(n / s for n, s in zip(useful, walls, strict=True)) / peak,
        "peak_bytes": runner.peak_bytes,
        "breakdown": runner.breakdown,
    }


def shape_of(workload: Workload) -> Shape:
    """The model's shape."""
    return Shape.from_config(AutoConfig.from_pretrained(workload.model).to_dict())


def work_of(rows: Sequence[Row], exploring: bool) -> Work:
    """What a step of these rows must compute."""
    return Work.of([lengths(row, exploring) for row in rows])


def lengths(row: Row, exploring: bool) -> GroupLengths:
    """The lengths of a group."""
    return GroupLengths.of(row.prompt, [row.chosen, row.rejected, row.explored if exploring else None])


def mean_useful_tokens(rows: Sequence[Row], exploring: bool) -> float:
    """Useful tokens of a group, on average."""
    return statistics.fmean(row.useful_tokens(exploring) for row in rows)


def roofline(rows: Sequence[Row], workload: Workload, peaks: measure.Peaks) -> dict[str, float]:
    """The least seconds of a SELM step of `selm_fast`, by part: FLOPs or bytes at this machine's rates."""
    work, shape = work_of(rows, exploring=True), shape_of(workload)
    micro_batches = math.ceil(work.tokens / workload.settings.max_tokens)
    settings = Settings(compute_bytes=workload.compute.itemsize, micro_batches=micro_batches)
    return bound(
        flops(shape, work, settings), traffic(shape, work, settings), peak=peaks.matmul[workload.dtype],
        bandwidth=peaks.copy,
    )  # fmt: skip


def in_rooflines(runner: Runner, workload: Workload, peaks: measure.Peaks) -> float | None:
    """The seconds of a step of `selm_fast` by those of its roofline, the median of the counted ones."""
    groups = workload.settings.groups
    rows = runner.counted_rows(groups)
    least = [
        sum(roofline(rows[nth * groups : (nth + 1) * groups], workload, peaks).values())
        for nth in range(len(runner.counted))
    ]
    return measure.ratio([step["wall_s"] for step in runner.counted], least) if least else None


def ratio(slow: Figures | None, fast: Figures | None) -> float | None:
    """How many times as long a step of one takes as the same step of the other: the median over the rounds of both."""
    if not slow or not fast or "wall_s" not in slow or "wall_s" not in fast:
        return None
    common = min(len(row["wall_s"]) for row in (slow, fast))
    return measure.ratio(*(row["wall_s"][:common] for row in (slow, fast)))


def outside_kernel(slow: Figures | None, fast: Figures | None) -> float | None:
    """`ratio` of CPU time outside the kernel, whose clearing of fresh pages is another matter on every machine."""
    if not slow or not fast or "wall_s" not in slow or "wall_s" not in fast:
        return None
    spent = [[cpu - kernel for cpu, kernel in zip(row["cpu_s"], row["kernel_s"], strict=True)] for row in (slow, fast)]
    common = min(map(len, spent))
    return measure.ratio(*(seconds[:common] for seconds in spent))


def targets(
    rows: Sequence[Figures], workload: Workload, device_name: str, threads: int, explained: float | None
) -> list[dict[str, Any]]:
    """The targets that belong to this run -> [{"target", "measured", "bound", "least", "met", "why"}].

    explained: a step of `selm_fast`, in its rooflines.
    least: whether the bound is the least, or the most, that is wanted.  met: None where nothing can be said, and why.
    """
    by_name = {row["name"]: row for row in rows}
    ours, trl = by_name.get(field.OURS), by_name.get(field.TRL_SELM)
    speed = ratio(trl, ours)
    if workload.device == "cuda":
        if "H200" not in device_name:
            return []
        return [
            judged(f"groups/s, times {field.TRL_SELM}", speed, GPU_SELM, least=True),
            judged("a step, in its roofline", explained, GPU_ROOFLINE, least=False),
        ]
    if workload.device != "cpu" or workload.shape != "small" or workload.dtype != "fp32":
        return []
    memory = None
    if ours and trl and ours.get("peak_bytes") and trl.get("peak_bytes"):
        memory = ours["peak_bytes"] / trl["peak_bytes"]
    dpo, cached = by_name.get(field.OURS_DPO), by_name.get(field.CACHED_DPO)
    both = None
    if dpo and cached and "wall_s" in dpo and "wall_s" in cached:
        both = dpo["groups_per_s_with_reference"] / cached["groups_per_s_with_reference"]
    found = [
        judged(f"groups/s, times {field.TRL_SELM}", speed, CPU_SELM, least=True),
        judged("a step, in bare GEMMs", ratio(ours, by_name.get(field.GEMMS)), CPU_GEMMS, least=False),
        judged(f"peak memory above the loaded model, of {field.TRL_SELM}'s", memory, CPU_MEMORY, least=False),
        judged(f"{field.OURS_DPO}: groups/s, times {field.CACHED_DPO}, reference passes counted in", both, CPU_DPO,
                least=True),
    ]  # fmt: skip
    if threads != THREADS:
        why = f"it is about {THREADS} threads; these were {threads}"
        found = [one | {"met": None, "why": why} for one in found]
    return found


def judged(target: str, measured: float | None, bound: float, *, least: bool) -> dict[str, Any]:
    """A figure beside its bound, as `targets` has it."""
    met = None if measured is None else measured >= bound if least else measured <= bound
    why = "not measured" if measured is None else None
    return {"target": target, "measured": measured, "bound": bound, "least": least, "met": met, "why": why}
