"""The driver of `make bench` and `make gpu-bench`: parts, one result, wheels."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, bench_scaling, bench_train, machine
from benchmarks.train import field


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, argparse.Namespace]:
    """What each benchmark was asked for; none is run."""
    found: dict[str, argparse.Namespace] = {}

    def train(args: argparse.Namespace, _: Any) -> dict[str, Any]:
        found["train"] = args
        return json.loads(next(machine.ROOT.glob("benchmarks/results/*_20*.json")).read_text("utf-8"))["train"]

    def scaling(args: argparse.Namespace, _: Any) -> dict[str, Any]:
        found["scaling"] = args
        return {"device": "cpu", "parts": {}}

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_train, "run", train)
    monkeypatch.setattr(bench_scaling, "run", scaling)
    return found


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert path.name == machine.dated_path(result).name
    return result


def test_all_parts_go_into_one_result(asked: dict[str, Any], tmp_path: Path) -> None:
    assert bench.main(["--rounds", "5"]) == 0
    assert asked["train"].only is None
    assert asked["train"].rounds == 5
    assert asked["scaling"].steps == 500
    assert {"command", "date", "commit", "machine", "versions", "train", "scaling"} <= set(written(tmp_path))


def test_a_part_is_added_to_the_result_of_its_day_and_commit(asked: dict[str, Any], tmp_path: Path) -> None:
    assert bench.main(["--part", "scaling"]) == 0
    assert "train" not in written(tmp_path)
    assert bench.main(["--part", "peers"]) == 0
    assert {"train", "scaling"} <= set(written(tmp_path))
    peers = set(asked["train"].only)
    assert field.OURS in peers and field.TRL_SELM in peers and "packing" not in peers
    assert bench.main(["--part", "ladder"]) == 0
    ladder = set(asked["train"].only)
    assert {"packing", field.OURS, field.PLAIN} <= ladder and field.TRL_SELM not in ladder


def test_parts_of_one_race_are_one_table() -> None:
    equal = {"shape": 1, "dtype": "bf16", "rows": 2, "settings": 3}

    def section(names: str, target: float | None) -> dict[str, Any]:
        rows = [{"name": name, "rate": target} for name in names]
        return equal | {"contestants": rows, "yardsticks": [], "targets": [{"target": "t", "measured": target}]}

    both = bench.merged(section("ab", 1.0), section("bc", None))
    assert [(row["name"], row["rate"]) for row in both["contestants"]] == [("a", 1.0), ("b", None), ("c", None)]
    assert both["targets"] == [{"target": "t", "measured": 1.0}]
    assert bench.merged(section("a", 1.0), section("a", 2.0))["targets"] == [{"target": "t", "measured": 2.0}]
    other = section("c", None) | {"dtype": "fp32"}
    assert bench.merged(section("ab", 1.0), other) == other


def test_a_disagreement_writes_nothing(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disagree(*_: Any) -> None:
        raise bench_train.Disagreement("selm_fast: loss is 1")

    monkeypatch.setattr(bench_train, "run", disagree)
    assert bench.main([]) == 1
    assert "selm_fast: loss is 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_wheels_are_found_behind_what_is_installed(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer_from_a_wheel.py", "FOUND = True\n")
        wheel.writestr("torch.py", "raise ImportError('a wheel replaced torch')\n")
    seen = []

    def measure(*_: Any) -> int:
        seen.append(importlib.import_module("a_peer_from_a_wheel").FOUND)
        return 0

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main(["--wheels", str(tmp_path)]) == 0
    assert seen == [True]
    assert Path(sys.path[-1]).name == "site-packages"
    assert importlib.util.find_spec("torch").origin != str(Path(sys.path[-1]) / "torch.py")  # type: ignore[union-attr]


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("pydantic", "tyro", "rich", "trl", "datasets")))  # as if not installed
sys.argv[0] = "bench.py"
from benchmarks import bench
sys.exit(bench.main(sys.argv[1:]))
"""


def bench_without_pydantic(*flags: str) -> subprocess.CompletedProcess[str]:
    """The driver in a process that has torch and transformers, as a borrowed GPU machine has, and little else."""
    command = [sys.executable, "-c", WITHOUT, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=machine.ROOT)


def test_what_is_not_installed_is_named_before_anything_is_measured() -> None:
    done = bench_without_pydantic("--part", "ladder", "--part", "scaling")
    assert done.returncode == 2
    assert "pydantic is not installed; expected its wheel in a folder given as --wheels" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_the_ladder_needs_neither_pydantic_nor_peers() -> None:
    done = bench_without_pydantic("--part", "ladder", "--rounds", "0")  # refused, once everything is imported
    assert done.returncode == 2
    assert "--rounds is 0" in done.stderr


def test_a_folder_without_wheels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        bench.main(["--wheels", str(tmp_path)])
    assert refusal.value.code == 2
    assert "expected a folder of .whl files" in capsys.readouterr().err
