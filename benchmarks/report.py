"""Every figure that the project shows of its speed, rendered from benchmarks/results/: never written by hand.

    python -m benchmarks.report            # writes benchmarks/RESULTS.md, its plots, and the tables of README.md
    python -m benchmarks.report --check    # writes nothing; exit code 1 where one is not what the results say

A result is a JSON file that `make bench` or `make gpu-bench` has written: of each machine the newest is shown. What
`bench_scaling.py` has written on its own, with more points, rows and rounds, stands below it, and below that what
`make gpu-train` has written, of each GPU the newest, and what `bench_rank.py` has written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_rank, bench_scaling, machine
from benchmarks.train import device_tables, field, plots, tables

RESULTS = Path("benchmarks/RESULTS.md")
README = Path("README.md")
BEGIN, END = "<!-- made by benchmarks/report.py from benchmarks/results -->", "<!-- end -->"
README_ROWS = (field.PLAIN, field.TRL_SELM, field.CACHED_SELM, field.OURS)
README_DPO = (field.TRL_DPO, field.CACHED_DPO, "TRL DPO, cached, kept", field.OURS_DPO)


def results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The newest result of each machine, rows and model, by file name."""
    newest: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict) or "train" not in found:
            continue
        train = found["train"]
        key = (train["device_name"], train["shape"]["name"], train["dtype"])
        if key not in newest or _made(found) >= _made(newest[key][1]):
            newest[key] = (path, found)
    return sorted(newest.values(), key=lambda pair: pair[0].name)


def _made(result: Mapping[str, Any]) -> tuple[str, str]:
    return result["date"], result["time"]


def scalings(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What bench_scaling.py has written on its own, by file name."""
    found = [(path, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("scaling_*.json"))]
    return [(path, result) for path, result in found if "parts" in result]


def gpu_trainings(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The newest result of `make gpu-train` on each GPU that there is one of, by file name."""
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("gpu_train_*.json")):
        found = json.loads(path.read_text("utf-8"))
        name = found["gpu_train"]["device_name"]
        if name not in newest or _made(found) >= _made(newest[name][1]):
            newest[name] = (path, found)
    return sorted(newest.values(), key=lambda pair: pair[0].name)


def rankings(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What bench_rank.py has written, a file a machine, by file name."""
    return [(path, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("rank_*.json"))]


def provenance(result: Mapping[str, Any]) -> str:
    """Where a figure comes from: machine, versions, commit, command."""
    facts, versions = result["machine"], result["versions"]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores ({facts['cpu_capability']})"
    names = ("torch", "transformers", "trl", "llm-blender", "python")
    used = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    made = result["commit"]
    source = f"commit {made['id'][:7]}" if made["id"] else f"sources {made['sources'][:7]}"
    return (
        f"{where}; {used}; {source}{' and changes' if made['dirty'] else ''}; {result['date']}; `{result['command']}`"
    )


def page(
    found: Sequence[tuple[Path, Mapping[str, Any]]], scaled: Sequence[tuple[Path, Mapping[str, Any]]] = (),
    on_gpus: Sequence[tuple[Path, Mapping[str, Any]]] = (), ranked: Sequence[tuple[Path, Mapping[str, Any]]] = (),
) -> str:  # fmt: skip
    """RESULTS.md."""
    lines = ["# Results", "", "Made by `python -m benchmarks.report` from the files in `benchmarks/results`.", ""]
    for path, result in found:
        lines += [f"## {result['train']['device_name']}, {result['train']['shape']['name']} model", ""]
        lines += [f"{provenance(result)}; [figures](results/{path.name}).", ""]
        lines += [f"![groups per second](results/{path.stem}.svg)", ""]
        lines += tables.train(result["train"])
        lines += bench_scaling.table(result["scaling"]) if "scaling" in result else []
    for path, result in scaled:
        facts = result["machine"]
        lines += [f"## {facts.get('gpu', facts['cpu'])}, scaling in full", ""]
        lines += [f"{provenance(result)}; [figures](results/{path.name}).", ""]
        lines += bench_scaling.table(result)
    for path, result in on_gpus:
        lines += [*([""] if lines[-1] else []), f"## {result['gpu_train']['device_name']}, steps of large models", ""]
        lines += [f"{provenance(result)}; [figures](results/{path.name}).", ""]
        lines += device_tables.table(result["gpu_train"])
    for path, result in ranked:
        lines += [*([""] if lines[-1] else []), f"## {result['rank']['device_name']}, PairRM", ""]
        lines += [f"{provenance(result)}; [figures](results/{path.name}).", ""]
        lines += bench_rank.table(result["rank"])
    return "\n".join(lines).rstrip() + "\n"


def summary(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """The README's tables: a few contestants of each result, beside the peer that has no other advantage."""
    lines: list[str] = []
    for path, result in found:
        lines += [*_summary(result["train"]), "", *tables.outside_kernel(result["train"])]
        lines += [f"<sub>{provenance(result)}; all figures: [RESULTS.md](benchmarks/RESULTS.md), "
                      f"[{path.name}](benchmarks/results/{path.name}).</sub>", ""]  # fmt: skip
    return "\n".join(lines).strip()


def _summary(train: Mapping[str, Any]) -> Iterator[str]:
    by_name = {row["name"]: row for row in train["contestants"]}
    yield "| | groups/s | reference pass counted in | times TRL's default | peak memory above the model |"
    yield "|---|---|---|---|---|"
    for names, base in ((README_ROWS, field.TRL_SELM), (README_DPO, field.TRL_DPO)):
        for name in names:
            row = by_name.get(name)
            if row is None or "groups_per_s" not in row:
                continue
            rate = row["groups_per_s_with_reference"]
            times = (
                rate / by_name[base]["groups_per_s_with_reference"] if "groups_per_s" in by_name.get(base, {}) else 0
            )
            peak = row["peak_bytes"]
            cells = [f"{row['groups_per_s']['median']:.2f}", f"{rate:.2f}", f"{times:.1f}x" if times else ""]
            cells.append("" if peak is None else f"{peak / 2**30:.2f} GiB")
            yield f"| {name} | " + " | ".join(cells) + " |"


def rendered(root: Path) -> dict[Path, str]:
    """Every file that shows figures, and what it should hold; plots are not text, and left out."""
    folder = root / "benchmarks" / "results"
    found = results(folder)
    text = (root / README).read_text("utf-8")
    pattern = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{README} must have one place between {BEGIN!r} and {END!r}")
    table = f"{BEGIN}\n{summary(found)}\n{END}"
    return {
        root / RESULTS: page(found, scalings(folder), gpu_trainings(folder), rankings(folder)),
        root / README: pattern.sub(lambda _: table, text),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write, or check -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something is out of date")
    args = parser.parse_args(arguments)
    stale = [(path, text) for path, text in rendered(machine.ROOT).items() if _read(path) != text]
    if args.check:
        for path, _ in stale:
            print(f"{path.relative_to(machine.ROOT)} is not what the results say: run python -m benchmarks.report")
        return 1 if stale else 0
    for path, text in stale:
        path.write_text(text, "utf-8")
    for path, result in results(machine.ROOT / "benchmarks" / "results"):
        plots.draw(result["train"], path.with_suffix(".svg"))
    return 0


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
