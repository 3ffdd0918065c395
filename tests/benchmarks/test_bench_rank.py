"""`benchmarks/bench_rank.py` on a tiny checkpoint: what it writes and shows, and that what is wrong has no speed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_rank, machine, report
from selm_fast.pairrm.ranker import PairRM

needs_blender = pytest.mark.skipif(importlib.util.find_spec("llm_blender") is None, reason="needs the extra: blender")
RESULTS = machine.ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """As few words as it takes."""


def write_rows(folder: Path, count: int) -> Path:
    """Rows as the data folder has them; every third prompt has two candidates that are equal."""
    reference, offline = [], []
    for nth in range(count):
        chosen, rejected = (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"answer {side} of {nth}, all of it"}]
            for side in ("one", "two")
        )
        response = f"answer {'one' if nth % 3 == 0 else 'three'} of {nth}, all of it"
        reference.append({"prompt_id": str(nth), "prompt": f"question {nth}", "reference_response": response})
        offline.append({"prompt_id": str(nth), "chosen": chosen, "rejected": rejected})
    for name, rows in (("selm_train", reference), ("offline_train", offline)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def bench(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the benchmark -> exit code and what it wrote."""
    given = [
        "--shape",
        "64,2",
        "--data",
        str(write_rows(folder, 9)),
        "--json",
        str(folder / "rank_some_processor.json"),
    ]
    code = bench_rank.main([*given, *flags])
    return code, json.loads((folder / "rank_some_processor.json").read_text("utf-8"))


@needs_blender
def test_it_checks_measures_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = bench(tmp_path, "--prompts", "5", "--rounds", "2")
    assert code == 0
    assert {"command", "commit", "date", "machine", "time", "versions", "rank"} == result.keys()
    assert result["versions"]["llm-blender"] == "0.0.2"
    section = result["rank"]
    assert section["problems"] == [] and section["difference"] <= bench_rank.TOLERANCE
    assert (section["prompts"], section["rows"]) == (5, 30)
    names = [row["name"] for row in section["contestants"]]
    assert names == ["selm_fast", "llm-blender, batches of 1", "llm-blender, batches of 8"]
    for row in section["contestants"]:
        assert row["cpu_ms"]["median"] > 0 and row["wall_ms"]["median"] > 0 and 0 <= row["padded"] < 1
    assert section["contestants"][0]["times"] == 1 and section["contestants"][1]["padded"] == 0
    assert {target["bound"] for target in section["targets"]} == {1.7} and len(section["targets"]) == 2
    lines = "\n".join(bench_rank.table(section))
    assert lines in capsys.readouterr().out
    shown = report.page([], [], [], report.rankings(tmp_path))
    assert lines.strip() in shown and report.provenance(result) in shown and "llm-blender 0.0.2" in shown


@needs_blender
def test_wrong_scores_have_no_speed_and_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = PairRM.score

    def off(self: PairRM, *given: Any) -> list[list[float]]:
        return [[value + 2e-6 * (nth == 1) for nth, value in enumerate(row)] for row in score(self, *given)]

    monkeypatch.setattr(PairRM, "score", off)
    code, result = bench(tmp_path, "--prompts", "2")
    assert code == 1
    section = result["rank"]
    said = re.match(r"scores differ from llm-blender's by (\S+), at most 1e-06", section["problems"][0])
    assert said is not None and 1.5e-6 < float(said[1]) < 2.5e-6  # and the last bits of either
    assert section["targets"] == [] and all(row.keys() == {"name"} for row in section["contestants"])
    shown = "\n".join(bench_rank.table(section))
    assert shown.startswith("WRONG, so that no speed is shown") and "| selm_fast" not in shown


def test_rows_have_three_distinct_candidates(tmp_path: Path) -> None:
    prompts, candidates = bench_rank.read(write_rows(tmp_path, 9))
    assert prompts == [f"question {nth}" for nth in (1, 2, 4, 5, 7, 8)]
    assert all(len(set(texts)) == 3 for texts in (*candidates, *bench_rank.synthetic(7)[1]))
    assert bench_rank.spread((prompts, candidates), 3) == (prompts[::2], candidates[::2])


@pytest.mark.parametrize("flags", ["--prompts 0", "--shape 100,2", "--shape 64", "--rounds 0"])
def test_a_wrong_flag_is_refused(flags: str) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_rank.main(flags.split())
    assert refused.value.code == 2


def test_what_cannot_be_measured_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_rank.main(["--data", str(tmp_path)]) == 2
    assert "expected selm_train.jsonl and offline_train.jsonl" in capsys.readouterr().err
    assert bench_rank.main(["--data", str(write_rows(tmp_path, 9)), "--prompts", "7"]) == 2
    assert "there are 6 prompts with three distinct candidates; --prompts asks for 7" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "llm_blender.blender.blender", None)
    assert bench_rank.main(["--data", str(tmp_path), "--prompts", "2", "--shape", "64,1"]) == 2
    assert "llm_blender.blender" in capsys.readouterr().err


def test_committed_results_are_whole_and_meet_their_targets() -> None:
    found = report.rankings(RESULTS)
    assert found
    for _, result in found:
        assert result["commit"]["id"] and not result["commit"]["dirty"]
        assert result["rank"]["problems"] == []
        assert [target["met"] for target in result["rank"]["targets"]] == [True, True]
