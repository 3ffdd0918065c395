"""How fast does selm_fast train, beside its peers? Same weights, token ids, batches, optimiser, precision and machine.

    python benchmarks/bench_train.py                          # the CPU, rows it generates
    python benchmarks/bench_train.py --data ../shared/data    # selm_train.jsonl and tokenizer/ of a folder
    python benchmarks/bench_train.py --device cuda --shape 1b --only "TRL SELM;selm_fast"

A process a contestant. All first compute the loss and gradient norm of the same groups: where one differs from plain
torch (DPO: from TRL), no speed is printed and the exit code is 1. Then all train the same batches, taking turns step by
step, round after round; the first step is not counted. groups/s and tokens/s are of useful tokens: a prompt once, each
distinct response once, whatever a contestant encodes. MFU: useful FLOPs (selm_fast/roofline.py) by the rate of a large
matmul in the same rounds. Memory: the peak above what the process held with the model loaded. Set-up (from token ids to
the first step) and the reference pass are timed apart, and counted in where the column says so.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, measure
from benchmarks.train import field, figures, race, tables
from benchmarks.train.workload import SHAPES, Settings, Workload, bytes_needed, make_workload
from selm_fast.errors import Refused
from selm_fast.ops import extension
from selm_fast.training.machine import memory_bytes

ROUNDS, SECONDS = 2, 330.0  # where nobody asks for more: of rounds, on a slow machine just one
GENERATED = 512
DTYPES = {"cpu": "fp32", "cuda": "bf16"}


class Disagreement(Exception):
    """Who does not compute the same loss, in words."""


def run(args: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    """Measure -> the section "train" of a result.

    Raises Refused for too few rows, and Disagreement before anything is timed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        settings = Settings(max_tokens=args.max_tokens)
        workload = make_workload(
            Path(folder), shape=args.shape, device=args.device, dtype=args.dtype, settings=settings, data=args.data,
            generated=GENERATED,
        )  # fmt: skip
        return compare(workload, args, say)


def compare(workload: Workload, args: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    """The gate, the race and the figures."""
    threads, groups = torch.get_num_threads(), workload.settings.groups
    asked = [entry for entry in field.contestants() if not args.only or entry.name in args.only]
    missing = {entry.name: why for entry in asked if (why := field.missing(entry)) is not None}
    entries = [entry for entry in asked if entry.name not in missing]
    yardsticks = field.yardsticks() if any(entry.name == field.OURS for entry in entries) else []
    began = time.monotonic()
    count, most = len(workload.rows()), max(race.steps_of(entry.name, args.rounds) for entry in [*entries, *yardsticks])
    if count < most * groups:
        raise Refused(
            f"{workload.source}: {count} rows, and {args.rounds} rounds take {most * groups}: give fewer rounds"
        )
    say(f"{len(entries)} contestants, {args.rounds} rounds of {groups} groups, {workload.source} rows")
    rates, rounds = Rates(workload), 0
    if workload.device == "cuda":  # each has the device's memory to itself
        runners = []
        for entry in [*entries, *yardsticks]:
            runners += race.enter([entry], workload, args.rounds, threads, say)
            rounds = race.run(runners[-1:], args.rounds, say)
            rates.sample()
        agree(runners, workload.dtype)
    else:
        runners = race.enter([*entries, *yardsticks], workload, args.rounds, threads, say)
        agree(runners, workload.dtype)
        rounds = race.run(runners, args.rounds, say, rates.sample, args.seconds)
    peaks = rates.peaks()
    rows = workload.rows()
    means = {method: figures.mean_useful_tokens(rows, method == "selm") for method in ("selm", "dpo")}
    peak = peaks.matmul[workload.dtype]
    found = [figures.figures(one, workload, means[one.contestant.method], peak) for one in runners]
    by_name = {row["name"]: row for row in found}
    ours = next((one for one in runners if one.contestant.name == field.OURS and one.breakdown), None)
    explained = None if ours is None else figures.in_rooflines(ours, workload, peaks)
    return {
        "device": workload.device,
        "device_name": machine.device_name(workload.device),
        "dtype": workload.dtype,
        "threads": threads,
        "shape": {"name": workload.shape, **SHAPES[workload.shape]},
        "rows": {"source": workload.source, "count": len(rows), "useful_tokens": means},
        "settings": {name: getattr(workload.settings, name) for name in workload.settings.__slots__},
        "rounds": rounds,
        "extension": extension.status(),
        "peaks": {"matmul_flop_per_s": peaks.matmul, "copy_bytes_per_s": peaks.copy},
        "contestants": [row for row in found if row["name"] not in (field.GEMMS, field.LINEAR_GEMMS)],
        "yardsticks": [row for row in found if row["name"] in (field.GEMMS, field.LINEAR_GEMMS)],
        "missing": missing,
        "roofline": None if ours is None else figures.roofline(ours.next_rows(groups), workload, peaks),
        "outside_kernel": figures.outside_kernel(by_name.get(field.TRL_SELM), by_name.get(field.OURS)),
        "targets": figures.targets(found, workload, machine.device_name(workload.device), threads, explained),
        "seconds": time.monotonic() - began,
    }


def agree(runners: list[race.Runner], dtype: str) -> None:
    """Raise Disagreement where one does not compute the loss; every process is ended then."""
    trainers = [one for one in runners if one.contestant.name not in (field.GEMMS, field.LINEAR_GEMMS)]
    if wrong := race.disagreements(trainers, field.YARDSTICK, dtype):
        for one in runners:
            one.end()
        raise Disagreement("\n".join(wrong))


class Rates:
    """The machine's peak rates, sampled between the rounds."""

    def __init__(self, workload: Workload) -> None:
        self.device = workload.device
        self.work = measure.peak_functions(workload.device, {workload.dtype: workload.compute})
        self.samples = {name: measure.Samples([], []) for name in self.work}

    def sample(self) -> None:
        """Once more."""
        ahead = torch.empty(0, dtype=torch.uint8, device=self.device)
        for name, (call, _) in self.work.items():
            ms, wall_ms = measure.timed(call, self.device, ahead)
            self.samples[name].ms.append(ms)
            self.samples[name].wall_ms.append(wall_ms)

    def peaks(self) -> measure.Peaks:
        """Medians of what was sampled."""
        return measure.peaks({name: (amount, self.samples[name]) for name, (_, amount) in self.work.items()})


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of selm_train.jsonl and tokenizer/ (default: generated rows)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="of the model (default: small on a CPU, 1b on a GPU)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="matmuls (default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--rounds", type=int, help=f"steps that are counted (default: {ROUNDS}, as time allows)")
    parser.add_argument("--max-tokens", type=int, help="selm_fast: packed tokens of a micro-batch")
    parser.add_argument("--only", help="contestants, by name, with semicolons between")
    parser.add_argument("--json", type=Path, help="where the result goes (default: benchmarks/results)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    args.seconds = SECONDS if args.rounds is None else math.inf
    args.rounds = ROUNDS if args.rounds is None else args.rounds
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; expected 1 or more")
    if args.data is not None and not (args.data / "selm_train.jsonl").is_file():
        parser.error(f"--data is {args.data}; expected a folder with selm_train.jsonl and tokenizer/")
    args.shape = args.shape or {"cpu": "small", "cuda": "1b"}[args.device]
    needed, there = bytes_needed(args.shape), memory_bytes(torch.device(args.device))
    if there < needed:
        parser.error(
            f"--shape {args.shape}: weights, reference, gradients and optimiser of a contestant take "
            f"{needed / 2**30:.1f} GiB in fp32, and {args.device} has {there / 2**30:.1f} GiB; expected one of "
            f"{', '.join(name for name in SHAPES if bytes_needed(name) <= there)}"
        )
    args.dtype = args.dtype or DTYPES[args.device]
    args.max_tokens = args.max_tokens or {"cpu": Settings().max_tokens, "cuda": 16384}[args.device]
    if args.only is not None:
        names = {entry.name for entry in field.contestants()}
        args.only = args.only.split(";")
        if unknown := [name for name in args.only if name not in names]:
            parser.error(f"--only names {unknown[0]!r}; expected some of {'; '.join(sorted(names))}")
        args.only += [field.YARDSTICK[entry.method] for entry in field.contestants() if entry.name in args.only]
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write -> exit code: 1 where the contestants do not compute the same."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    try:
        train = run(args, print)
    except Disagreement as error:
        print(f"error: no speed is shown, for not all compute the same:\n{error}", file=sys.stderr)
        return 1
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    command = shlex.join(["python", "benchmarks/bench_train.py", *given])
    result = machine.described(args.device, command) | {"train": train}
    print("\n".join(tables.train(train)))
    path = args.json or machine.dated_path(result)
    machine.write_json(path, result)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
