"""`benchmarks/gpu_test.py` where there is no GPU: what it runs, how it judges, and that it ends in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_test, machine, targets
from benchmarks.gpu_test import Part

PYDANTIC = "ModuleNotFoundError: No module named 'pydantic'"


def report(folder: Path, *tests: str) -> Path:
    """pytest's XML report of tests, each given by what stands inside its element."""
    path = folder / "report.xml"
    cases = "".join(f'<testcase name="test_{nth}">{inside}</testcase>' for nth, inside in enumerate(tests))
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", "utf-8")
    return path


def missing(package: str) -> str:
    return f"<error>ModuleNotFoundError: No module named '{package}'</error>"


@pytest.mark.parametrize(
    ("code", "tests", "passed", "words"),
    [
        (0, ["", "", "<skipped/>"], True, "2 passed, 0 failed, 1 skipped"),
        (1, ["", "<failure>E  assert 1 == 2</failure>"], False, "1 passed, 1 failed"),
        (1, ["", f"<error>{PYDANTIC}</error>"], True, r"left out: test_1 (pydantic is not installed)"),
        (1, [f"<error>{PYDANTIC}</error>"], True, "left out: test_0"),
        (1, ["", missing("ruamel.yaml")], True, "left out: test_1 (ruamel is not installed)"),
        (1, ["", missing("selm_fast.ops.x")], False, "1 failed"),
        (1, ["", missing("rich") + missing("transformers")], False, "1 failed"),
        (1, ["", missing("rich")[:-8] + missing("transformers")[7:]], False, "1 failed"),
        (1, ["", missing("transformers")[:-8] + missing("rich")[7:]], False, "1 failed"),
        (1, ["", missing("numpy")], False, "1 failed"),
        (1, ["", f"<failure>{PYDANTIC}</failure>"], False, "1 failed"),
        (1, ["", f"<failure>E  assert 1 == 2</failure><error>{PYDANTIC}</error>"], False, "1 failed"),
        (1, ["", "<error>SyntaxError</error>"], False, "1 failed"),
        (1, ["", f"<error>{PYDANTIC}</error>", "<failure>E  assert 1 == 2</failure>"], False, "1 passed, 1 failed"),
        (0, ["<skipped/>"], False, "0 passed"),
        (5, [], False, "0 passed"),
        (3, [""], False, "1 passed"),
    ],
    ids=[
        "good",
        "failed",
        "left out",
        "all left out",
        "a package's module",
        "ours is missing",
        "missing at set-up and at the end",
        "one is missing after another",
        "the other way round",
        "a package that must be there",
        "a test failed for want of it",
        "failed and left out",
        "broken",
        "failed beside left out",
        "all skipped",
        "none",
        "internal",
    ],
)
def test_tests_pass_when_some_ran_and_none_failed(
    code: int, tests: list[str], passed: bool, words: str, tmp_path: Path
) -> None:
    verdict, detail = gpu_test.judge_tests(code, "", report(tmp_path, *tests), must_run=False)
    assert verdict == passed
    assert words in detail


def test_of_the_ops_some_must_have_passed(tmp_path: Path) -> None:
    left_out = f"<error>{PYDANTIC}</error>"
    assert gpu_test.judge_tests(1, "", report(tmp_path, "", left_out), must_run=True)[0]
    assert not gpu_test.judge_tests(1, "", report(tmp_path, left_out, "<skipped/>"), must_run=True)[0]
    (ops,) = (part for part in gpu_test.parts(tmp_path) if part.name == "gpu tests in tests/ops")
    assert ops.required
    assert not ops.judge(4, f"ImportError while loading conftest '/x/conftest.py'.\nE   {PYDANTIC}")[0]
    (tmp_path / "tests-0.xml").write_bytes(report(tmp_path, left_out).read_bytes())
    assert not ops.judge(1, "")[0]


def test_a_folder_whose_conftest_needs_a_missing_package_is_left_out(tmp_path: Path) -> None:
    output = f"ImportError while loading conftest '/x/conftest.py'.\nE   {PYDANTIC}"
    nothing = tmp_path / "none.xml"
    told = (True, "left out: pydantic is not installed")
    assert gpu_test.judge_tests(4, output, nothing, must_run=False) == told
    assert not gpu_test.judge_tests(4, output.replace("pydantic", "triton"), nothing, must_run=False)[0]
    assert not gpu_test.judge_tests(4, "a crash", nothing, must_run=False)[0]


def test_the_reason_of_a_failed_build_is_told() -> None:
    output = "rows.cpp:3:1: error: expected ';'\n  3 | x\n\n[2/2] g++ mm.cpp\nninja: stopped\nselm_fast: not built\n"
    told = "rows.cpp:3:1: error: expected ';' | ninja: stopped | selm_fast: not built"
    assert gpu_test.judge_build(1, output) == (False, told)
    assert gpu_test.judge_build(1, "") == (False, "")
    assert gpu_test.judge_build(0, output) == (True, "")


def test_missed_targets_are_told_and_fail_nothing() -> None:
    """In the words of the benchmark itself."""
    summed = targets.summary({"keep, ms (bf16)": False, "no-grad, ms (bf16)": True})
    output = f"Target keep, ms: 39, at most 38: MISSED\n\nwritten: x.json\n{summed}\n"
    assert gpu_test.judge_speed(0, output) == (True, "1 of 2 targets met; missed: keep, ms (bf16)")
    wrong = "WRONG: linear_logprob, selm_fast: error of output is nan"
    assert gpu_test.judge_speed(1, f"{output}{wrong}\n") == (False, f"{summed} | {wrong}")


def test_folders_with_gpu_tests_are_found_and_the_ops_come_first(tmp_path: Path) -> None:
    mark = "@pytest.mark." + "gpu\n"  # in two parts: this file has none
    for name, text in {"ops/cases.py": mark, "ops/test_a.py": "", "cli/test_b.py": mark, "data/test_c.py": ""}.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    assert gpu_test.gpu_tests(tmp_path) == ["tests/ops", "tests/cli"]
    assert "tests/ops" in gpu_test.gpu_tests(gpu_test.ROOT)


def test_limits_leave_room_in_eight_minutes_and_commands_name_files_that_are_there(tmp_path: Path) -> None:
    assert gpu_test.LIMIT_S <= 460
    parts = gpu_test.parts(tmp_path)
    names = [part.name for part in parts]
    assert "SELM_FAST_EXTENSION=1" in parts[0].command  # otherwise a build that fails ends well
    assert names[:3] == ["build of the C++ extension", "gpu tests in tests/ops", "speed"]
    assert all(name.startswith("gpu tests in ") for name in names[3:-1])
    assert names[-1] == "compile report"
    assert sum(part.limit_s for part in parts[:3]) <= gpu_test.LIMIT_S - 20  # none of them takes another's time
    for part in parts:
        assert part.limit_s < gpu_test.LIMIT_S / 2
        script = next((word for word in part.command[1:] if word.endswith(".py")), None)
        assert script is None or (gpu_test.ROOT / script).is_file()


@pytest.mark.parametrize("script", ["aot.py", "bench_ops.py"])
def test_scripts_run_where_the_package_is_not_installed(script: str, tmp_path: Path) -> None:
    """From another folder; -S leaves out what the installation of the package put into the interpreter."""
    if script == "aot.py":
        pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(Path(torch.__file__).parents[1])}
    command = [sys.executable, "-S", str(gpu_test.ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_part_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    part = Part(name="slow", command=["sh", "-c", "sleep 60 & echo $!; wait"], limit_s=60)
    result = gpu_test.run(part, tmp_path / "log", 2.0)
    assert not result["passed"]
    assert result["exit_code"] is None
    assert result["detail"] == "not done after 2 s"
    child = int(result["output_tail"])
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.02)
    assert not alive(child)


def test_the_tail_that_is_kept_begins_with_no_rest_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_test, "TAIL", 8)
    part = Part(name="says", command=["echo", f"in {gpu_test.ROOT}/x"], limit_s=60)
    assert gpu_test.run(part, tmp_path / "log", 60)["output_tail"] == "in x\n"


def alive(pid: int) -> bool:
    """Does a process run? A zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, codes: dict[str, tuple[int, bool]]) -> None:
    """Let there be a GPU, and parts that end with these codes: name -> (exit code, required)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(machine, "machine", lambda device: {"gpu": "NVIDIA H200"})
    monkeypatch.setenv("OUT", str(folder))

    def parts(scratch: Path) -> list[Part]:
        return [
            Part(name=name, command=[sys.executable, "-c", f"exit({code})"], limit_s=30, required=required)
            for name, (code, required) in codes.items()
        ]

    monkeypatch.setattr(gpu_test, "parts", parts)


@pytest.mark.parametrize("last", [0, 1])
def test_the_exit_code_and_the_results_say_what_passed(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, tmp_path, {"build": (1, False), "speed": (last, True)})
    assert gpu_test.main([]) == last
    results: dict[str, Any] = json.loads((tmp_path / "gpu_test_nvidia_h200.json").read_text("utf-8"))
    assert results["passed"] == (last == 0)
    assert [(part["name"], part["passed"], part["exit_code"]) for part in results["parts"]] == [
        ("build", False, 1),
        ("speed", last == 0, last),
    ]
    assert {"commit", "machine", "versions", "seconds"} < set(results)
    printed = capsys.readouterr().out
    assert "failed (optional)" in printed
    assert ("FAILED " in printed) == (last == 1)


def test_parts_past_the_limit_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tmp_path, {"speed": (0, True)})
    slow = Part(name="speed", command=[sys.executable, "-c", "import time; time.sleep(5)"], limit_s=30)
    monkeypatch.setattr(gpu_test, "parts", lambda scratch: [slow])
    monkeypatch.setattr(gpu_test, "LIMIT_S", 0.0)
    assert gpu_test.main([]) == 1


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_test.main([]) == 2
    assert capsys.readouterr().out == "gpu-test: torch sees no CUDA device here; nothing was run\n"
