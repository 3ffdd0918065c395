"""`make bench` and `make gpu-bench`: every benchmark of training, into one result.

    python benchmarks/bench.py                                   # the CPU: under 10 minutes on two cores
    python benchmarks/bench.py --device cuda --part peers        # one GPU, a part a call: peers, ladder or scaling
    python benchmarks/bench.py --device cuda --wheels folder     # peers from wheels: nothing is installed

A part that is measured later at the same commit on the same day goes into the same file, benchmarks/results/
MACHINE_DATE_COMMIT.json, which benchmarks/report.py renders. Exit code: 1 where a contestant computes something else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.wheels import NoWheels, unpacked  # noqa: E402 - from the checkout, installed or not

PARTS = ("peers", "ladder", "scaling")


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts that are asked for -> exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--shape", help="of the model (default: small on a CPU, 1b on a GPU)")
    parser.add_argument("--data", type=Path, help="folder of selm_train.jsonl and tokenizer/ (default: generated rows)")
    parser.add_argument(
        "--rounds", type=int, help="steps of each contestant that are counted (default: 2, as time allows)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is not installed")
    args = parser.parse_args(given)
    try:
        with unpacked(args.wheels):
            return measured(parser, args, given)
    except NoWheels as error:
        parser.error(str(error))


def measured(parser: argparse.ArgumentParser, args: argparse.Namespace, given: Sequence[str]) -> int:
    """`measure`, or a refusal where a package is not there; nothing is measured before all are imported."""
    try:
        return measure(args, given)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; expected its wheel in a folder given as --wheels (make: WHEELS=)")


def measure(args: argparse.Namespace, given: Sequence[str]) -> int:
    """Run the parts, print, write -> exit code."""
    # Not at the top: these import what may be in the wheels.
    from benchmarks import bench_train, machine
    from benchmarks.train import field, tables
    from selm_fast.errors import Refused

    parts, section = args.part or PARTS, {}
    scaling = import_module("benchmarks.bench_scaling") if "scaling" in parts else None
    result = machine.described(args.device, shlex.join(["python", "benchmarks/bench.py", *given]))
    path = machine.dated_path(result)
    options = ["--device", args.device]
    if not {"peers", "ladder"}.isdisjoint(parts):
        options_of_train = [*options, *(["--shape", args.shape] if args.shape else [])]
        options_of_train += ["--data", str(args.data)] if args.data else []
        options_of_train += ["--rounds", str(args.rounds)] if args.rounds is not None else []
        if not {"peers", "ladder"} <= set(parts):
            rungs = {entry.name for entry in field.ladder()} | {field.OURS, field.COMPILED}
            names = [entry.name for entry in field.contestants() if (entry.name in rungs) == ("ladder" in parts)]
            names += [field.OURS] if "peers" in parts else []
            options_of_train += ["--only", ";".join(names)]
        try:
            section["train"] = bench_train.run(bench_train.parse(options_of_train), print)
        except bench_train.Disagreement as error:
            print(f"error: no speed is shown, for not all compute the same:\n{error}", file=sys.stderr)
            return 1
        except Refused as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print("\n".join(tables.train(section["train"])), flush=True)
    if scaling is not None:
        section["scaling"] = scaling.run(scaling.parse([*options, "--quick", "--steps", "500"]), print)
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if "train" in before and "train" in section:
        section["train"] = merged(before["train"], section["train"])
    machine.write_json(path, before | result | section)
    print(f"written: {path}; python -m benchmarks.report renders it")
    return 0


def merged(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two sections "train" as one: of a contestant that is in both, and of what is equal for all, the later."""
    same = ("shape", "dtype", "rows", "settings")
    if any(before[key] != after[key] for key in same):
        return after
    found = dict(after)
    for key, name in (("contestants", "name"), ("yardsticks", "name"), ("targets", "target")):
        later = {row[name]: row for row in after[key] if row.get("measured", 0) is not None}
        found[key] = [later.pop(row[name], row) for row in before[key]] + list(later.values())
    return found


if __name__ == "__main__":
    sys.exit(main())
