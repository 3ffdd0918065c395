"""`make gpu-train`: real optimiser steps of Llama-3-8B and of a 1B model on one GPU, in under nine minutes.

    python benchmarks/gpu_train.py                        # every part; results go to benchmarks/results/, or to $OUT
    python benchmarks/gpu_train.py --part 8b --data folder  # one part, on selm_train.jsonl and tokenizer/ of a folder
    python benchmarks/gpu_train.py --wheels folder          # with what this interpreter lacks: nothing is installed

The code is that of `train`: FSDP2 in a world of one, the reference pass over the plan, the trainer's own step; only the
weights are random and made on the device, so that no file and no host memory holds a model. Each part is a process with
a time limit of its own. Checked first: the loss of step 0 is ln 2 to the bit and every reward 0, no step is lost, the
loss falls on repeated groups, and two runs have the same bits; where one is wrong, no speed is shown. A missed target
is told and fails nothing. Exit code: 1 where a value is wrong or a part did not end well; 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_test, machine  # noqa: E402 - from the checkout, installed or not
from benchmarks.wheels import NoWheels, unpacked  # noqa: E402

LIMIT_S = 525.0
# What each part may take (s); what matters most comes first.
LIMITS = {"8b": 200.0, "1b": 130.0, "8b-selective": 190.0}
HIDDEN = {"tiny": 120.0}  # of the tests
# FSDP shards in a world of one, too, where a launcher has started it; on a GPU it does so anyway.
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def cases() -> dict[str, Any]:
    """What each part trains."""
    from benchmarks.train.device_model import Case

    return {
        "8b": Case(name="8b", shape="8b", checkpointing="full", moments="bfloat16"),
        "1b": Case(name="1b", shape="1b", checkpointing="none", moments="float32", twice=True),
        "8b-selective": Case(name="8b-selective", shape="8b", checkpointing="selective", moments="bfloat16"),
        "tiny": Case(
            name="tiny", shape="tiny", checkpointing="full", moments="bfloat16", groups=6, steps=3, max_tokens=128,
            max_length=48, twice=True,
        ),
    }  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*LIMITS, *HIDDEN], metavar="|".join(LIMITS), help="some")
    parser.add_argument("--data", type=Path, help="folder of selm_train.jsonl and tokenizer/ (default: generated rows)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is not installed")
    # The tests': a CPU stands in for the device, and a model of some 100,000 weights for the large ones.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=("tiny",), help=argparse.SUPPRESS)
    # A process of this one's: measure a part and write it there.  also: wheels that it has unpacked.
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--also", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.part = args.part or ([args.shape] if args.shape else list(LIMITS))
    if args.data is not None and not (args.data / "selm_train.jsonl").is_file():
        parser.error(f"--data is {args.data}; expected a folder with selm_train.jsonl and tokenizer/")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write -> exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-train: torch sees no CUDA device here; nothing was run")
        return 2
    if args.into is not None:
        return measure_part(args)
    try:
        with unpacked(args.wheels) as also:
            import_module("benchmarks.train.device_steps")  # what is missing is named before anything is measured
            return measure_all(args, given, also)
    except NoWheels as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; expected its wheel in a folder given as --wheels", file=sys.stderr
        )
    return 2


def measure_part(args: argparse.Namespace) -> int:
    """In a process of its own: one part, into a file -> exit code."""
    sys.path += [args.also] if args.also else []
    from benchmarks.train import device_steps

    if args.device == "cpu":
        os.environ.update(LAUNCHED)
    found = device_steps.run(cases()[args.part[0]], args.device, args.data)
    machine.write_json(args.into, found)
    return 0


def measure_all(args: argparse.Namespace, given: Sequence[str], also: str | None) -> int:
    """Every part in its process, then the result -> exit code."""
    began, parts = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as folder:
        for name in args.part:
            left_s = LIMIT_S - (time.monotonic() - began)
            parts.append(in_process(name, args, also, Path(folder), max(left_s, 1.0)))
    result = machine.described(args.device, shlex.join(["python", "benchmarks/gpu_train.py", *given]))
    section = {
        "device": args.device, "device_name": machine.device_name(args.device), "parts": parts,
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    path = written(result, section)
    print(f"written: {path}; python -m benchmarks.report renders it")
    wrong = [f"{part['name']}: {reason}" for part in parts for reason in part["wrong"]]
    for reason in wrong:
        print(f"WRONG: {reason}")
    return 1 if wrong else 0


def written(result: dict[str, Any], section: dict[str, Any]) -> Path:
    """Judge, print and write a result -> its file, whose figures have no other command's beside them."""
    from benchmarks.train import device_tables

    for part in section["parts"]:
        part["targets"] = device_tables.judge(part, section["device_name"])
    dated = machine.dated_path(result)
    path = dated.with_name(f"gpu_train_{dated.name}")
    machine.write_json(path, result | {"gpu_train": section})
    print("\n".join(device_tables.table(section)), flush=True)
    return path


def in_process(name: str, args: argparse.Namespace, also: str | None, scratch: Path, left_s: float) -> dict[str, Any]:
    """One part -> what it found, with "wrong": what fails the run, in words."""
    into = scratch / f"{name}.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--device", args.device]
    command += ["--into", str(into), *(["--also", also] if also else [])]
    command += ["--data", str(args.data.resolve())] if args.data else []
    part = gpu_test.Part(name=name, command=command, limit_s=(LIMITS | HIDDEN)[name])
    ran = gpu_test.run(part, scratch / f"{name}.log", min(part.limit_s, left_s))
    if not ran["passed"] or not into.is_file():
        why = ran["detail"] or f"it ended with {ran['exit_code']}"
        return {"name": name, "wrong": [why], "output_tail": ran["output_tail"], "checks": [], "speed": None}
    found: dict[str, Any] = json.loads(into.read_text("utf-8"))
    return found | {"wrong": [in_words(check) for check in found["checks"] if not check["passed"]]}


def in_words(check: Mapping[str, Any]) -> str:
    """A check that failed."""
    detail = f" ({', '.join(check['detail'])})" if check["detail"] else ""
    return f"{check['check']}: found {check['measured']!r}, expected {check['expected']!r}{detail}"


if __name__ == "__main__":
    sys.exit(main())
