"""How fast is PairRM, and is it right? This package's beside llm-blender 0.0.2 at batch sizes of its own.

    python -m benchmarks.bench_rank --data ../shared/data
    python -m benchmarks.bench_rank --checkpoint llm-blender/PairRM --data ../shared/data --prompts 8

Needs the extra `blender`. The checkpoint is random, of a stated shape, or the one that is given. Rows are three
distinct candidates to each prompt, of a folder with selm_train.jsonl and offline_train.jsonl (the reference response
and the offline pair), or synthetic ones of like lengths. First the scores must be llm-blender's at one prompt a batch,
where they do not depend on the batch, and the ranks equal: else no speed is shown and the exit code is 1. Then all take
turns, round after round. Ratios are of CPU time of the process, which other work on the machine moves less than time on
the wall.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, measure
from benchmarks.blender import Blender
from benchmarks.pairrm_checkpoint import make_checkpoint, make_tokenizer
from benchmarks.train import tables
from benchmarks.train.figures import judged
from selm_fast.errors import Refused
from selm_fast.pairrm.ranker import PairRM
from selm_fast.pairrm.work import num_rows

BATCH_SIZES = (1, 8)  # the one that its scores do not depend on, and its default
TIMES = 1.7
MAX_TOKENS = 16384
VOCABULARY = 8000
TOLERANCE = 1e-6  # of a random checkpoint's scores, which are of the size of 0.1
TOLERANCE_GIVEN = 1e-4  # of trained weights' in fp32: larger scores, more layers

Prompts = tuple[list[str], list[list[str]]]
OURS = "selm_fast"


def blender_name(batch_size: int) -> str:
    return f"llm-blender, batches of {batch_size}"


def spread(everything: Prompts, count: int) -> Prompts:
    """So many prompts, spread over all that there are. Raises Refused where these are fewer."""
    prompts, candidates = everything
    if len(prompts) < count:
        raise Refused(f"there are {len(prompts)} prompts with three distinct candidates; --prompts asks for {count}")
    chosen = [nth * len(prompts) // count for nth in range(count)]
    return [prompts[index] for index in chosen], [candidates[index] for index in chosen]


def read(data: Path) -> Prompts:
    """Every prompt of a folder whose three candidates are distinct. Raises Refused."""
    found: Prompts = ([], [])
    try:
        reference, offline = (
            {row["prompt_id"]: row for row in map(json.loads, (data / name).read_text("utf-8").splitlines())}
            for name in ("selm_train.jsonl", "offline_train.jsonl")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected selm_train.jsonl and offline_train.jsonl, with prompt_id"
        raise Refused(f"--data {data}: {expected}: {error!r}") from error
    for name, row in reference.items():
        if name in offline:
            pair = (offline[name][side][-1]["content"] for side in ("chosen", "rejected"))
            texts = [row["reference_response"], *pair]
            if len(set(texts)) == len(texts):
                found[0].append(row["prompt"])
                found[1].append(texts)
    return found


def synthetic(count: int) -> Prompts:
    """Words of two to nine letters; of each text about as many as real ones have, spread as widely."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(2, 9))) for _ in range(3000)]

    def text(mean: float) -> str:
        return " ".join(drawn.choices(words, k=1 + int(mean * drawn.lognormvariate(-0.25, 0.7))))

    return [text(30) for _ in range(count)], [[text(200) for _ in range(3)] for _ in range(count)]


class Counted:
    """Tokens that an encoder was given. measure: (arguments, keywords) of a call -> (with padding, without)."""

    def __init__(self, encoder: torch.nn.Module, measure: Callable[[Any, Any], tuple[int, int]]) -> None:
        self.computed = self.real = 0
        self._measure = measure
        encoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        computed, real = self._measure(arguments, keywords)
        self.computed += computed
        self.real += real

    @contextmanager
    def share(self, into: dict[str, Any]) -> Iterator[None]:
        """Write what was padded, and how long rows are, while the block runs."""
        self.computed = self.real = 0
        yield
        into |= {"padded": 1 - self.real / self.computed, "tokens": self.real}


def difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The largest of all scores; NaN where one is."""
    one, other = (torch.tensor([score for row in scores for score in row]).double() for scores in (left, right))
    return float((one - other).abs().max())


def measure_rank(folder: str, prompts: Prompts, rounds: int, *, tolerance: float) -> dict[str, Any]:
    """Check, then time every contestant: the section `rank` of a result."""
    ours = PairRM.from_pretrained(folder, device=torch.device("cpu"), dtype=torch.float32, max_tokens=MAX_TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of dataclasses_json, about settings that are not given
        blender = Blender(folder)
    counted = Counted(ours.encoder, lambda given, _: (given[0].numel(), int(given[1].sum())))
    counted_blender = Counted(
        blender.encoder, lambda _, named: (named["attention_mask"].numel(), int(named["attention_mask"].sum()))
    )
    calls: dict[str, Callable[[], list[list[float]]]] = {OURS: lambda: ours.score(*prompts)}
    for size in BATCH_SIZES:
        calls[blender_name(size)] = lambda size=size: blender.scores(*prompts, batch_size=size)  # type: ignore[misc]

    found, expected = calls[OURS](), calls[blender_name(1)]()
    off = difference(found, expected)
    problems = [] if off <= tolerance else [f"scores differ from llm-blender's by {off:.3g}, at most {tolerance:g}"]
    if blender.ranks(found) != blender.ranks(expected):
        problems.append("ranks differ from llm-blender's")
    figures: list[dict[str, Any]] = [{"name": name} for name in calls]
    if not problems:
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for turn in range(rounds):
            for figure in figures[turn % len(figures) :] + figures[: turn % len(figures)]:
                counter = counted if figure["name"] == OURS else counted_blender
                with counter.share(figure):
                    taken[figure["name"]].append(measure.timed(calls[figure["name"]], "cpu", torch.empty(0)))
        for figure in figures:
            cpu, wall = zip(*taken[figure["name"]], strict=True)
            ratio = measure.ratio(list(cpu), [times[0] for times in taken[OURS]])
            figure |= {"cpu_ms": measure.summary(list(cpu)), "wall_ms": measure.summary(list(wall)), "times": ratio}
    section = {
        "device_name": machine.device_name("cpu"),
        "prompts": len(prompts[0]),
        "rows": num_rows(prompts[1]),
        "rounds": rounds,
        "difference": off,
        "tolerance": tolerance,
        "problems": problems,
        "contestants": figures,
    }
    return section | {"targets": [] if problems else judge(section)}


def judge(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How many times as fast as llm-blender at each of its batch sizes."""
    return [
        judged(f"CPU time of {row['name']}, times {OURS}'s", row["times"], TIMES, least=True)
        for row in section["contestants"]
        if row["name"] != OURS
    ]


def table(section: Mapping[str, Any]) -> Iterator[str]:
    """The section as Markdown."""
    if section["problems"]:
        yield f"WRONG, so that no speed is shown: {'; '.join(section['problems'])}"
        return
    rounds = section["rounds"]
    yield (
        f"PairRM on the CPU, fp32: {section['checkpoint']}; {section['prompts']} prompts with three candidates each of "
        f"{section['source']}, {section['rows']} rows; {f'medians of {rounds} rounds' if rounds > 1 else 'one round'}. "
        f"Scores differ from llm-blender's by {section['difference']:.1e} at most, ranks are equal."
    )
    yield ""
    yield "| | rows/s | rows per CPU second | padded share | mean tokens of a row | times selm_fast's CPU time |"
    yield "|---|---|---|---|---|---|"
    for row in section["contestants"]:
        rates = [section["rows"] / row[time]["median"] * 1e3 for time in ("wall_ms", "cpu_ms")]
        cells = [row["name"], *(f"{rate:.2f}" for rate in rates), f"{row['padded']:.1%}"]
        cells += [f"{row['tokens'] / section['rows']:.0f}", f"{row['times']:.2f}"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from tables.targets(section)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name of a PairRM (default: a random one of --shape)")
    parser.add_argument("--shape", default="384,3", help="hidden size, a multiple of 64, and layers (default: 384,3)")
    parser.add_argument("--data", type=Path, help="folder with selm_train.jsonl and offline_train.jsonl")
    parser.add_argument("--prompts", type=int, default=12, help="of three candidates, 6 rows each (default: 12)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: 1)")
    parser.add_argument(
        "--json", type=Path, help="where results go (default: rank_PROCESSOR.json in benchmarks/results)"
    )
    args = parser.parse_args(arguments)
    try:
        args.hidden, args.layers = map(int, args.shape.split(","))
    except ValueError:
        parser.error(f"--shape is {args.shape!r}; expected two whole numbers, HIDDEN,LAYERS")
    if min(args.hidden, args.layers, args.prompts, args.rounds) < 1 or args.hidden % 64:
        parser.error("--shape, --prompts and --rounds: expected 1 or more, and a hidden size that is a multiple of 64")
    args.json = args.json or machine.result_path("rank", "cpu")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write -> exit code: 1 where scores or ranks are wrong, 2 where there is nothing to measure."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    result = machine.described("cpu", shlex.join(["python", "-m", "benchmarks.bench_rank", *given]))
    try:
        everything = read(args.data) if args.data is not None else synthetic(args.prompts)
        prompts = spread(everything, args.prompts)
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.checkpoint
            if folder is None:
                tokenizer = make_tokenizer([text for texts in everything[1] for text in texts], VOCABULARY)
                sizes = {"hidden": args.hidden, "layers": args.layers, "heads": args.hidden // 64}
                folder = str(make_checkpoint(Path(scratch), tokenizer, **sizes))
            tolerance = TOLERANCE if args.checkpoint is None else TOLERANCE_GIVEN
            section = measure_rank(folder, prompts, args.rounds, tolerance=tolerance)
    except (Refused, ImportError) as error:
        print(f"bench_rank: {error}", file=sys.stderr)
        return 2
    section["checkpoint"] = args.checkpoint or f"random weights, {args.hidden} hidden, {args.layers} layers"
    section["source"] = "real answers" if args.data is not None else "synthetic text"
    result["rank"] = section
    print("\n".join(table(section)))
    machine.write_json(args.json, result)
    print(f"written: {args.json}")
    return 1 if section["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
