"""`selm-fast report`: which runs, and where the page goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from selm_fast.cli.main import main

PAGE = "selm_fast.report.page"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    return ["runs/first", "runs/second"]


def test_the_page_of_one_run_goes_into_it_and_that_of_several_here(stand_in, runs: list[str], capsys) -> None:
    calls = stand_in(PAGE, "write_report")
    assert main(["report", runs[0]]) == 0
    assert main(["report", *runs]) == 0
    assert main(["report", runs[1], "--out", "page.html"]) == 0
    assert main(["report", "--out=page.html", *runs]) == 0
    first, second = map(Path, runs)
    assert calls == [
        ([first], Path("runs/first/report.html")),
        ([first, second], Path("report.html")),
        ([second], Path("page.html")),
        ([first, second], Path("page.html")),
    ]
    assert capsys.readouterr().out == "runs/first/report.html\nreport.html\npage.html\npage.html\n"


def test_held_out_rows_are_handed_on(stand_in, runs: list[str]) -> None:
    calls = stand_in(PAGE, "write_report")
    assert main(["report", *runs, "--data", "rows.jsonl"]) == 0
    assert main(["report", runs[0], "--data=NAME:test", "--out", "page.html"]) == 0
    first, second = map(Path, runs)
    assert calls == [
        ([first, second], Path("report.html"), {"data": "rows.jsonl"}),
        ([first], Path("page.html"), {"data": "NAME:test"}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["runs/third"], "runs/third is no folder"),
        (["empty"], "empty has no run.json"),
        (["runs/first", "--ou", "x"], "unrecognized arguments: --ou"),
        (["runs/first", "--out"], "argument --out: expected one argument"),
        (["runs/first", "--data"], "argument --data: expected one argument"),
    ],
)
def test_what_is_no_run_is_refused(runs: list[str], capsys, arguments: list[str], message: str) -> None:
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert not list(Path().rglob("*.html"))
