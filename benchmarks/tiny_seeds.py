"""Does the recipe `tiny` learn? Its true reward by iteration, over seeds.

    python benchmarks/tiny_seeds.py --seeds 5 --out benchmarks/results/tiny_seeds.json

Each seed is a whole run of its own: another model, other prompts, another order. The first is the recipe's, which
`make demo` runs, and the others follow it. The true reward is the share of a
prompt's constraints that the greedy response meets, on prompts that nothing was trained on. Spread is the standard
deviation over seeds; the rise is taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import selm_fast
from selm_fast import run
from selm_fast.cli.settings import load_run_config
from selm_fast.cli.shipped import find_recipe


def measure(seed: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """One run: the reward of every iteration, and how long it took (s)."""
    output = ["--output_dir", str(folder / f"seed-{seed}"), "--seed", str(seed)]
    began = time.perf_counter()
    result = run(load_run_config(find_recipe("tiny"), [*flags, *output]))
    seconds = time.perf_counter() - began
    return {"seed": seed, "seconds": round(seconds, 1), "reward": [row["reward"] for row in result.iterations.values()]}


def table(results: dict[str, Any]) -> str:
    """Mean and spread of the reward by iteration as a Markdown table; the README holds it."""
    by_iteration = list(zip(*(line["reward"] for line in results["measurements"]), strict=True))
    lines = [
        "| | " + " | ".join(f"iteration {number}" for number in range(len(by_iteration))) + " |",
        "|---" * (len(by_iteration) + 1) + "|",
        "| mean over seeds | " + " | ".join(f"{statistics.mean(values):.3f}" for values in by_iteration) + " |",
        "| spread over seeds | " + " | ".join(f"{statistics.stdev(values):.3f}" for values in by_iteration) + " |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every seed and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    chosen, flags = parser.parse_known_args()
    if chosen.seeds < 2:
        parser.error(f"--seeds is {chosen.seeds}; expected 2 or more, which have a spread")
    with tempfile.TemporaryDirectory() as folder:
        first = load_run_config(find_recipe("tiny"), flags).seed
        measurements = [measure(first + number, flags, Path(folder)) for number in range(chosen.seeds)]
    rises = [line["reward"][-1] - line["reward"][0] for line in measurements]
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"selm_fast": selm_fast.__version__, "torch": str(torch.__version__)},
        "flags": flags,
        "measurements": measurements,
        "rise": {"mean": statistics.mean(rises), "spread": statistics.stdev(rises), "least": min(rises)},
    }
    chosen.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
