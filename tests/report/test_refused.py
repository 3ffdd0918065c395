"""Folders that are no run and files that are damaged are refused, each with its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from selm_fast.errors import Refused
from selm_fast.report.page import write_report

from .synthetic import write_run, write_train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("refused") / "run", steps=3, prompts=3, iterations=1)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def refusal(out: Path, *runs: Path) -> str:
    """The message; and nothing was written."""
    with pytest.raises(Refused) as caught:
        write_report(runs, out)
    assert not out.is_file()
    return str(caught.value)


def edited(path: Path, edit: Callable[[str], str]) -> None:
    """Change a file's text."""
    path.write_text(edit(path.read_text("utf-8")), "utf-8")


def test_a_whole_run_is_taken(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    (
        ("run.json", lambda text: text[:40], "not JSON"),
        ("run.json", lambda text: "[" * 100_000, "not JSON"),
        ("run.json", lambda text: "[1]", "a JSON mapping is expected, and this is list"),
        ("run.json", lambda text: '{"config": 3}', "mapping of settings"),
        ("run.json", lambda text: text.replace("iter-1/rank", "iter-1/rang"), "titles such as iter-1/rank"),
        ("iter-1/rank/manifest.json", lambda text: text[: len(text) // 2], "not JSON"),
        ("iter-1/rank/manifest.json", lambda text: text.replace('"groups": ', '"groups": -'), "groups: "),
        ("iter-1/train/manifest.json", lambda text: text.replace('"counts"', '"cunts"'), "steps: Field required"),
        ("iter-1/evaluate/manifest.json", lambda text: '{"files": {"a": {}}}', "files.a.sha256"),
        ("iter-1/evaluate/metrics.json", lambda text: text.replace("0.1", "0.2"), "sha256"),
        ("iter-1/evaluate/responses.jsonl", lambda text: "\n".join(text.splitlines()[:-1]), "truncated or changed"),
        ("iter-1/train/metrics.jsonl", lambda text: text.replace("{", "{{", 2), "metrics.jsonl, line 1: not JSON"),
        (
            "iter-1/train/metrics.jsonl",
            lambda text: '{"loss": 1}\n' + text,
            "line 1: a mapping of metrics with its step",
        ),
    ),
)
def test_damage_is_named(run: Path, tmp_path: Path, name: str, edit: Callable[[str], str], said: str) -> None:
    edited(run / name, edit)
    message = refusal(tmp_path / "report.html", run)
    assert message.startswith(str(run / name)) and said in message
    assert "run it again" in message or "another program" in message


def test_damage_in_a_file_without_a_hash(run: Path, tmp_path: Path) -> None:
    manifest = run / "iter-1/evaluate/manifest.json"
    edited(manifest, lambda text: json.dumps(json.loads(text) | {"files": {}}))
    rows = run / "iter-1/evaluate/responses.jsonl"
    edited(rows, lambda text: text.replace('"prompt"', '"promt"', 2).replace('"promt"', '"prompt"', 1))
    assert refusal(tmp_path / "report.html", run).startswith(f"{rows}, line 2: prompt: Field required")
    edited(rows, lambda text: text[:-30])
    edited(rows, lambda text: text.replace('"promt"', '"prompt"'))
    assert f"{rows}, line 3: not JSON" in refusal(tmp_path / "report.html", run)


def test_missing_files_are_named(run: Path, tmp_path: Path) -> None:
    (run / "iter-1/evaluate/responses.jsonl").unlink()
    message = refusal(tmp_path / "report.html", run)
    assert message.startswith(f"{run / 'iter-1/evaluate/responses.jsonl'}: No such file")


def test_what_is_no_run(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "no run is given" in refusal(out)
    assert f"{tmp_path / 'none'} is no folder" in refusal(out, tmp_path / "none")
    assert f"{tmp_path / 'file'} is no folder" in refusal(out, tmp_path / "file")
    assert f"{tmp_path / 'empty'} has no run.json" in refusal(out, tmp_path / "empty")


def test_the_same_run_twice(tmp_path: Path) -> None:
    run = write_train(tmp_path / "run", steps=2)
    assert f"{run} is given 2 times" in refusal(tmp_path / "report.html", run, tmp_path / "empty/../run")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    run = write_train(tmp_path / "run", steps=2)
    assert f"{tmp_path} is a folder" in refusal(tmp_path, run)
    assert f"{tmp_path / 'none'} is no folder" in refusal(tmp_path / "none/report.html", run)


def test_an_old_report_stays_when_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    (run / "run.json").write_text("{")
    with pytest.raises(Refused):
        write_report([run], out)
    assert out.read_text() == "old"
