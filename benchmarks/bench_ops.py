"""How fast are the ops, and are they right? The head and the loss beside torch and their peers, attention by back end.

    python benchmarks/bench_ops.py                                  # the CPU, or --device cuda
    python benchmarks/bench_ops.py --shape 1024,2048,32000 --dtype fp32 --repeats 7 --json results.json

Every contestant computes on the same random inputs and is held against float64 first, its output and sampled rows of
gradients: none that is wrong has its speed shown, and if it is one of this package's the exit code is 1. Then all take
turns, round after round; a figure is the median of the rounds, of CUDA events or, on a CPU, of CPU time of the process
and of wall time. After the last round this package's must give what was checked again, to the bit, or they count as
wrong. Error: the largest of output and gradients, as a multiple of torch eager's own. GEMMs: time in units of one
matmul of hidden by weight, timed in the same rounds. Roofline: the least time for the contestant's matmuls, or for the
bytes of inputs and outputs, at the peak rates that a large matmul and a large copy showed in the same rounds, as a
share of its own. Extra memory: the peak above inputs and outputs, on a CPU that of a process of its own.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention, cases, machine, measure, targets
from benchmarks.exact import DTYPES, Shape, exact, make_inputs
from benchmarks.judge import Checked, Contestant, NoYardstick, unrepeated
from selm_fast.ops import backends, extension

SHAPES = {"cpu": Shape(1024, 2048, 32000), "cuda": Shape(8192, 4096, 128256)}
DEFAULT_DTYPES = {"cpu": "fp32,bf16", "cuda": "bf16"}
REPEATS = {"cpu": 7, "cuda": 21}


def measure_ops(device: str, shape: Shape, dtype: str, repeats: int, *, memory: bool) -> dict[str, Any]:
    """Check, time and weigh every contestant of every op at one shape and dtype."""
    inputs = make_inputs(shape, dtype, device)
    reference = exact(inputs)
    everyone: list[Checked] = []
    missing: dict[str, str] = {}
    for make in cases.CASES.values():
        case = make(inputs, reference.logps)
        missing |= case.missing
        everyone += cases.check(case, reference, dtype)
    everyone += attentions(device, dtype)
    del reference

    work = measure.peak_functions(device, DTYPES if device == "cuda" else {dtype: DTYPES[dtype]})
    turns: dict[str, Callable[[], object]] = {name: call for name, (call, _) in work.items()}
    logits = torch.empty(shape.N, shape.V, dtype=inputs.hidden.dtype, device=device)
    turns["gemm"] = partial(torch.mm, inputs.hidden, inputs.weight.T, out=logits)
    turns |= {checked.contestant.label: checked.contestant.call for checked in everyone if not checked.problems}
    samples = measure.interleaved(turns, repeats, device)
    peaks = measure.peaks({name: (amount, samples[name]) for name, (_, amount) in work.items()})
    del logits, turns, work
    for checked in everyone:
        if checked.contestant.ours and not checked.problems:
            checked.problems.extend(unrepeated(checked))

    rows = []
    for checked in everyone:
        contestant, row = checked.contestant, described(checked)
        if not checked.problems:
            row |= timings(samples[contestant.label], None if contestant.matmuls is None else samples["gemm"])
            row["roofline"] = measure.roofline_ms(contestant.flops, contestant.moved, peaks, dtype)
            row["roofline"] /= row["wall_ms"]["median"]
            row["extra_bytes"] = extra_bytes(contestant, device, shape, dtype) if memory else None
        rows.append(row)
    run = {
        "device": device,
        "device_name": machine.device_name(device),
        "dtype": dtype,
        "shape": {"N": shape.N, "D": shape.D, "V": shape.V},
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "bf16_in_fp32": device == "cuda" or extension.mm_serves(torch.bfloat16),
        "peaks": {"matmul_flop_per_s": peaks.matmul, "copy_bytes_per_s": peaks.copy},
        "gemm": timings(samples["gemm"], samples["gemm"]),
        "rows": rows,
        "missing": missing,
    }
    return run | {"targets": targets.judge(run)}


def attentions(device: str, dtype: str) -> list[Checked]:
    """Every back end of attention; trouble with them all is one row, and leaves the other ops their results."""
    try:
        return list(attention.check(device, dtype))
    except Exception as error:
        return [attention.unchecked(f"it cannot be checked: {type(error).__name__}: {error}")]


def backends_in_use(device: str) -> dict[str, str]:
    """What serves each op; trouble in finding out is told, and leaves the ops their results."""
    try:
        return backends(device)
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def extra_bytes(contestant: Contestant, device: str, shape: Shape, dtype: str) -> int | None:
    """Peak memory of a contestant above inputs and outputs; on a CPU that of the head's ops only."""
    if device == "cuda":
        return measure.extra_bytes(contestant.call, device)
    if contestant.op not in cases.CASES:
        return None
    alone = (shape, dtype, torch.get_num_threads(), contestant.op, contestant.name, contestant.kind)
    return measure.in_fresh_process(cases.extra_bytes_alone, *alone)


def described(checked: Checked) -> dict[str, Any]:
    """A contestant's row, its figures still empty: they stay so where its results are wrong."""
    contestant = checked.contestant
    return {
        "op": contestant.op,
        "name": contestant.name,
        "kind": contestant.kind,
        "ours": contestant.ours,
        "per_token_gradients": contestant.per_token,
        "matmuls": contestant.matmuls,
        "errors": checked.errors,
        "errors_of_torchs": checked.of_torchs,
        "problems": checked.problems,
        "ms": None,
        "wall_ms": None,
        "gemms": None,
        "gemms_wall": None,
        "roofline": None,
        "extra_bytes": None,
    }


def timings(taken: measure.Samples, gemm: measure.Samples | None) -> dict[str, Any]:
    """Medians and quartiles, and the medians in GEMMs of the same round where it is about GEMMs."""
    return {
        "ms": measure.summary(taken.ms),
        "wall_ms": measure.summary(taken.wall_ms),
        "gemms": None if gemm is None else measure.ratio(taken.ms, gemm.ms),
        "gemms_wall": None if gemm is None else measure.ratio(taken.wall_ms, gemm.wall_ms),
    }


def table(run: dict[str, Any]) -> Iterator[str]:
    """A run as Markdown."""
    shape, peaks = run["shape"], run["peaks"]
    yield f"### {run['device_name']}: N={shape['N']}, D={shape['D']}, V={shape['V']}, {run['dtype']}"
    yield ""
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in peaks["matmul_flop_per_s"].items())
    yield (
        f"Peak rates in this run: {rates}, copy {peaks['copy_bytes_per_s'] / 1e9:.0f} GB/s. One GEMM: "
        f"{run['gemm']['wall_ms']['median']:.2f} ms. Medians of {run['repeats']} rounds."
    )
    yield ""
    on_cpu = run["device"] == "cpu"
    cpu_columns = ("CPU ms", "GEMMs, wall") if on_cpu else ()
    columns = ("op", "contestant", "run", "gradients per token", "wall ms" if on_cpu else "ms", "quartiles")
    columns += (*cpu_columns[:1], "GEMMs", *cpu_columns[1:], "roofline", "extra GiB", "error, of torch's")
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in run["rows"]:
        cells = [row["op"], row["name"], row["kind"], "yes" if row["per_token_gradients"] else "no"]
        if row["ms"] is None:
            cells += ["not shown", *[""] * (len(columns) - 6), "; ".join(row["problems"])]
        else:
            wall = row["wall_ms"]
            cells += [f"{wall['median']:.2f}", f"{wall['low']:.2f}-{wall['high']:.2f}"]
            cells += [f"{row['ms']['median']:.2f}"] if on_cpu else []
            gemms = (row["gemms"], row["gemms_wall"]) if on_cpu else (row["gemms"],)
            cells += ["" if number is None else f"{number:.3f}" for number in gemms]
            cells += [f"{row['roofline']:.0%}"]
            cells += ["" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**30:.3f}"]
            cells += [f"{max(row['errors_of_torchs'].values()):.2f}"]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for name, reason in run["missing"].items():
        yield f"Left out: {name}: {reason}"
    for target in run["targets"]:
        verdict = {None: target["why"], True: "met", False: "MISSED"}[target["met"]]
        figures = (f"{target[key]:.4g}" if target[key] is not None else "-" for key in ("measured", "bound"))
        yield "Target {}: {}, at most {}: {}".format(target["target"], *figures, verdict)
    yield ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; defaults are the shapes of the project's targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="N,D,V (default: 1024,2048,32000 on a CPU, 8192,4096,128256 on a GPU)")
    parser.add_argument("--dtype", help="fp32, bf16 or both, with a comma (default: both on a CPU, bf16 on a GPU)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 7 on a CPU, 21 on a GPU)")
    parser.add_argument("--json", type=Path, help="where results go (default: ops_DEVICE.json in benchmarks/results)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    try:
        args.shape = SHAPES[args.device] if args.shape is None else Shape(*map(int, args.shape.split(",")))
    except (TypeError, ValueError):
        parser.error(f"--shape is {args.shape!r}; expected three whole numbers, N,D,V")
    if min(args.shape.N, args.shape.D, args.shape.V) < 3:
        parser.error("--shape: N, D and V must be 3 or more: a group has three responses")
    args.dtype = (args.dtype or DEFAULT_DTYPES[args.device]).split(",")
    if not set(args.dtype) <= set(DTYPES):
        parser.error(f"--dtype is {','.join(args.dtype)!r}; expected fp32, bf16 or fp32,bf16")
    args.repeats = REPEATS[args.device] if args.repeats is None else args.repeats
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; expected 1 or more")
    args.json = args.json or machine.result_path("ops", args.device)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write -> exit code: 1 where one of this package's own ops is wrong or cannot run."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bench_ops.py", *given]),
        "commit": machine.commit(),
        "machine": machine.machine(args.device),
        "versions": machine.versions(),
        "backends": backends_in_use(args.device),
        "extension": extension.status(),
        "runs": [],
    }
    served = "; ".join(f"{op}: {backend}" for op, backend in results["backends"].items())
    print(f"Back ends: {served}. Extension: {results['extension']}.\n")
    wrong = []
    verdicts: dict[str, bool | None] = {}
    for dtype in args.dtype:
        try:
            run = measure_ops(args.device, args.shape, dtype, args.repeats, memory=not args.no_memory)
        except NoYardstick as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        results["runs"].append(run)
        print("\n".join(table(run)), flush=True)
        wrong += [(row["op"], row["name"], row["problems"]) for row in run["rows"] if row["ours"] and row["problems"]]
        verdicts |= {f"{target['target']} ({dtype})": target["met"] for target in run["targets"]}
        machine.write_json(args.json, results)
    print(f"written: {args.json}")
    if verdicts:
        print(targets.summary(verdicts))
    for op, name, problems in wrong:
        print(f"WRONG: {op}, {name}: {'; '.join(problems)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
