"""How does the cost grow? Of a training step by its sizes, of the data path by its rows, of a run by its steps.

    python benchmarks/bench_scaling.py                              # the CPU, or --device cuda for the sweeps
    python benchmarks/bench_scaling.py --only groups,data --quick --json results.json

groups, length, prompt, aliases, vocabulary: forward and backward of `Policy` on generated groups around a base point,
one size changed at a time. First the packed step must give the loss and the gradient norm of its groups one by one, or
no time is shown and the exit code is 1. Then the points take turns, round after round; a figure is the median of the
rounds, of CUDA events or, on a CPU, of CPU time of the process and of wall time. Slopes are least squares: of log cost
by log size (an exponent), or of cost by size, in units of the least cost and over the whole range; the model's are
those of its FLOPs.
data: rows/s tokenised, planned, digested and packed, for 61,135 and 1,000,000 rows; CPU time, and for tokenising, which
uses every core, wall time. Tokenising and packing are measured on a sample.
steps: memory and time of many training steps of a small model; growth is along the median of the slopes between two.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, scaling_data, scaling_steps, scaling_sweeps

PARTS = (*scaling_sweeps.SWEEPS, "data", "steps")
REPEATS = {"cpu": 5, "cuda": 15}
QUICK_REPEATS = 3


def sweep_table(sweep: dict[str, Any], device: str) -> Iterator[str]:
    """A sweep as Markdown."""
    yield f"### Cost of a step by {sweep['what']}"
    yield ""
    if sweep["problems"]:
        yield from (f"WRONG, not shown: {problem}" for problem in sweep["problems"])
        yield ""
        return
    columns = ["x", "groups", "prompt", "response", "aliases", "vocabulary", "tokens", "GFLOP"]
    columns += ["CPU ms", "wall ms"] if device == "cpu" else ["ms"]
    yield "| " + " | ".join([*columns, "GFLOP/s"]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for point in sweep["points"]:
        cells = [f"{point['x']:g}", str(point["groups"]), str(point["prompt"]), str(point["response"])]
        cells += [f"{point['aliased']:.0%}", str(point["vocab"]), f"{point['tokens']:,}", f"{point['gflop']:,.1f}"]
        times = [point["ms"], point["wall_ms"]] if device == "cpu" else [point["ms"]]
        cells += [f"{taken['median']:.1f} ({taken['low']:.1f}-{taken['high']:.1f})" for taken in times]
        yield "| " + " | ".join([*cells, f"{point['gflop'] / point['ms']['median'] * 1e3:,.0f}"]) + " |"
    slopes = sweep["slopes"]
    what = "exponent" if sweep["kind"] == "log-log" else "change over the range, in units of the least"
    wall = f", wall {slopes['wall']:+.3f}" if device == "cpu" else ""
    yield ""
    yield f"Slope ({what}): measured {slopes['time']:+.3f}{wall}, FLOP model {slopes['flops']:+.3f}."
    yield ""


def data_table(data: dict[str, Any]) -> Iterator[str]:
    """The data path as Markdown."""
    tokenized = data["tokenizing"]
    yield "### The data path"
    yield ""
    for sample in tokenized["sample"]:
        rates = f"{sample['rows_per_s']:,.0f} rows/s, {sample['rows_per_cpu_s']:,.0f} a CPU-second"
        yield f"Tokenising {sample['rows']:,} rows: {rates}."
    yield (
        f"At this rate {scaling_data.PAPER_ROWS:,} rows take {tokenized['seconds_of_paper_rows']:,.0f} s and "
        f"{scaling_data.MANY_ROWS:,} rows {tokenized['seconds_of_many_rows']:,.0f} s: a sample is what was measured."
    )
    yield ""
    yield "| rows | tokens a row | plan, rows/s | digest, rows/s | packing, rows/s | share of a step at 8B speed |"
    yield "|---|---|---|---|---|---|"
    for plan in data["planning"]:
        rates = " | ".join(f"{rate:,.0f}" for rate in plan["rows_per_s"].values())
        yield f"| {plan['rows']:,} | {plan['packed_tokens_a_row']:,.0f} | {rates} | {plan['share_of_a_step']:.2%} |"
    yield ""
    yield (
        f"CPU time; packing on a sample of {data['planning'][-1]['packed_rows']:,} rows. A step at 8B speed: "
        f"{scaling_data.TOKENS_PER_SECOND:,} tokens/s on 8 GPUs, one process planning and packing for all."
    )
    yield ""


def steps_table(steps: dict[str, Any]) -> Iterator[str]:
    """The long run as Markdown."""
    took, memory = steps["step_ms"], steps["memory_mib"]
    yield f"### {steps['steps']} training steps"
    yield ""
    yield (
        f"A step took {took['median']:.2f} ms ({took['low']:.2f}-{took['high']:.2f}). Of the last {steps['looked_at']} "
        f"steps, memory was {memory['first']:.1f} MiB at the first and {memory['last']:.1f} MiB at the last. Slopes: "
        f"{steps['growth_bytes_a_step']:+.0f} bytes and {steps['slowing_a_step']:+.4%} of a step's time a step, "
        f"in units of fixed work after each ({steps['fixed_work_ms']['median']:.2f} ms)."
    )
    yield ""


def verdicts(part: dict[str, Any]) -> Iterator[str]:
    """The targets of a part, a line each."""
    for target in part.get("targets", ()):
        verdict = "met" if target["met"] else "MISSED"
        yield f"Target {target['target']}: {target['measured']:.4g}, at most {target['bound']:.4g}: {verdict}"


def measure_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Results of one part."""
    if name == "data":
        return scaling_data.run_data(quick=args.quick)
    if name == "steps":
        return scaling_steps.run_steps(args.steps, args.device)
    return scaling_sweeps.run_sweep(name, args.device, args.repeats, quick=args.quick)


def part_table(name: str, part: dict[str, Any], device: str) -> Iterator[str]:
    """One part as Markdown, with its targets."""
    if name == "data":
        yield from data_table(part)
    elif name == "steps":
        yield from steps_table(part)
    else:
        yield from sweep_table(part, device)
    yield from verdicts(part)
    if "targets" in part:
        yield ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, with a comma between: {','.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer points, rounds, rows and steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, help="rounds (default: 5 on a CPU, 15 on a GPU, 3 with --quick)")
    parser.add_argument("--steps", type=int, help="training steps (default: 500, with --quick 120)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than the idle cores say nothing")
    parser.add_argument(
        "--json", type=Path, help="where results go (default: scaling_DEVICE.json in benchmarks/results)"
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    args.only = list(PARTS) if args.only is None else args.only.split(",")
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only names {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    args.repeats = args.repeats if args.repeats is not None else QUICK_REPEATS if args.quick else REPEATS[args.device]
    args.steps = (
        args.steps if args.steps is not None else scaling_steps.QUICK_STEPS if args.quick else scaling_steps.STEPS
    )
    for name, least in (("repeats", 1), ("steps", 10), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; expected {least} or more")
    args.json = args.json or machine.result_path("scaling", args.device)
    return args


def run(args: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    """Measure the parts -> the section "scaling" of a result, each part's Markdown said as soon as it is there."""
    torch.set_num_threads(args.threads)
    section: dict[str, Any] = {"device": args.device, "quick": args.quick, "repeats": args.repeats, "parts": {}}
    for name in args.only:
        section["parts"][name] = measure_part(name, args)
        say("\n".join(part_table(name, section["parts"][name], args.device)))
    return section


def table(section: dict[str, Any]) -> Iterator[str]:
    """A whole section as Markdown."""
    for name, part in section["parts"].items():
        yield from part_table(name, part, section["device"])


def failures(section: dict[str, Any]) -> list[str]:
    """What is wrong, and which targets are missed."""
    bad = []
    for part in section["parts"].values():
        bad += [f"WRONG: {problem}" for problem in part.get("problems", ())]
        bad += [f"MISSED: {target['target']}" for target in part.get("targets", ()) if not target["met"]]
    return bad


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write -> exit code: 1 where a packed step is wrong or a target is missed."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    section = run(args, print)
    command = shlex.join(["python", "benchmarks/bench_scaling.py", *given])
    machine.write_json(args.json, machine.described(args.device, command) | section)
    print(f"written: {args.json}")
    bad = failures(section)
    print("\n".join(bad or ["all targets met"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
