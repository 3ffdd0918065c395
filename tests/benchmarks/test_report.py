"""The figures that are shown are those of the result files, all of them, and of the newest."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_scaling, machine, report
from benchmarks.train import plots

RESULTS = machine.ROOT / "benchmarks" / "results"
FOUND = report.results(RESULTS)


def test_the_pages_hold_what_the_results_say() -> None:
    for path, text in report.rendered(machine.ROOT).items():
        assert path.read_text("utf-8") == text, f"{path.name} is out of date: run python -m benchmarks.report"
    assert report.main(["--check"]) == 0


def test_there_is_a_result_and_each_is_whole() -> None:
    assert FOUND
    for path, result in FOUND:
        assert path.name == machine.dated_path(result).name
        assert result["commit"]["id"] and result["command"].startswith("python benchmarks/")
        train = result["train"]
        assert all(train["missing"].values())
        for row in train["contestants"]:
            assert row["failed"] is None, row["name"]
            assert len(row["wall_s"]) >= train["rounds"] >= 1
        assert all(target["met"] is not None or target["why"] for target in train["targets"])


def test_scaling_in_full_stands_below(tmp_path: Path) -> None:
    path, result = FOUND[0]
    alone = {key: result[key] for key in ("command", "date", "commit", "machine", "versions")} | result["scaling"]
    machine.write_json(tmp_path / "scaling_some_processor.json", alone)
    machine.write_json(tmp_path / "scaling_of_another_kind.json", {"not": "parts"})
    scaled = report.scalings(tmp_path)
    assert [found.name for found, _ in scaled] == ["scaling_some_processor.json"]
    before, after = report.page([(path, result)]), report.page([(path, result)], scaled)
    assert after.startswith(before.rstrip())
    added = after.removeprefix(before.rstrip())
    assert "scaling in full" in added and report.provenance(alone) in added
    assert all(line in added for line in bench_scaling.table(result["scaling"]))


@pytest.mark.parametrize("path", [path for path, _ in FOUND], ids=lambda path: path.stem)
def test_every_plot_is_that_of_its_result(path: Path, tmp_path: Path) -> None:
    plots.draw(json.loads(path.read_text("utf-8"))["train"], tmp_path / "again.svg")
    assert texts(tmp_path / "again.svg") == texts(path.with_suffix(".svg"))


def texts(path: Path) -> list[str]:
    """What is written in an SVG: names and figures; the shapes around them differ between versions of matplotlib."""
    from xml.etree import ElementTree

    return [node.text or "" for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def changed(**figures: Any) -> dict[str, Any]:
    result = copy.deepcopy(FOUND[0][1])
    result["train"]["contestants"][-1] |= figures
    return result


def test_another_figure_is_another_page() -> None:
    path, result = FOUND[0]
    before = report.page([(path, result)])
    assert report.page([(path, changed())]) == before
    for name, value in (("peak_bytes", 7 * 2**30), ("groups_per_s_with_reference", 1234.0), ("mfu", 0.987)):
        assert report.page([(path, changed(**{name: value}))]) != before, name
    assert "1234.00" in report.summary([(path, changed(groups_per_s_with_reference=1234.0))])


def test_every_figure_says_where_it_is_from() -> None:
    for path, result in FOUND:
        said = report.provenance(result)
        facts = (result["machine"]["cpu"], result["versions"]["torch"], result["commit"]["id"][:7], result["command"])
        assert all(fact in said for fact in facts)
        assert said in report.page([(path, result)]) and said in report.summary([(path, result)])


def test_of_two_results_of_a_machine_the_newer_is_shown(tmp_path: Path) -> None:
    older, newer = changed(), changed()
    older["date"], newer["date"] = "2026-01-02", "2026-01-10"
    older["time"], newer["time"] = "23:00:00", "01:00:00"
    for name, result in (("b", older), ("a", newer), ("c", newer | {"time": "00:59:59"})):
        machine.write_json(tmp_path / f"{name}.json", result)
    machine.write_json(tmp_path / "other.json", {"not": "a result of training"})
    assert [path.name for path, _ in report.results(tmp_path)] == ["a.json"]
    older["train"]["dtype"] = "bf16"
    machine.write_json(tmp_path / "b.json", older)
    assert [path.name for path, _ in report.results(tmp_path)] == ["a.json", "b.json"]


def test_a_page_without_its_place_for_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README.md must have one place"):
        report.rendered(tmp_path)
