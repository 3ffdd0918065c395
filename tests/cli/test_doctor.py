"""The doctor finds what is too old or broken, and its floors are those of the package."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import selm_fast.ops
from selm_fast.cli import doctor, tryouts
from selm_fast.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Pretends that packages have other versions, or None for packages that are not installed."""

    def put(versions: dict[str, str | None]) -> None:
        def pretended(name: str) -> str:
            found = versions.get(name, version(name) if name not in versions else None)
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(doctor, "version", pretended)

    return put


@pytest.fixture(autouse=True)
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Collectives that work, without processes of their own; gives what was tried."""
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(tryouts, "loop_back", lambda *one: calls.append(one))
    return calls


def row(out: str, name: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.split("\t")[1:2] == [name]]
    return line.split("\t")


def requirements(lines: list[str]) -> dict[str, str]:
    parts = [re.match(r"([\w.-]+?)(?:>=|==)([\d.]+)$", line) for line in lines]
    return {part[1]: part[2] for part in parts if part}


def test_this_machine_can_train(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert row(out, "torch")[2] == version("torch")
    assert row(out, "cpu")[0] == "devices" and "threads" in row(out, "cpu")[2]
    assert "GiB" in row(out, "memory")[2]
    assert {row(out, op)[0] for op in selm_fast.ops.backends()} == {"back ends"}
    assert out.endswith("this machine can train\n")


def test_a_required_package_below_its_floor_is_a_problem(pretend, capsys) -> None:
    pretend({"torch": "2.10.9+cu130"})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert row(out, "torch") == ["versions", "torch", "2.10.9+cu130", "problem", "2.11.0 or newer is needed"]
    assert out.endswith("this machine cannot train: torch: 2.11.0 or newer is needed\n")


def test_a_missing_required_package_is_a_problem_and_an_optional_one_is_not(pretend, capsys) -> None:
    pretend({"trl": None, "datasets": "3.0.0"})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert row(out, "trl")[2:4] == ["not installed", "ok"]
    assert row(out, "datasets")[2:4] == ["3.0.0", "note"]
    pretend({"safetensors": None})
    assert main(["doctor"]) == 1
    assert row(capsys.readouterr().out, "safetensors")[2:4] == ["not installed", "problem"]


def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    assert "cannot be imported" in capsys.readouterr().out


def test_ops_that_cannot_be_used_are_a_problem(monkeypatch, capsys) -> None:
    def broken(*_: str) -> dict[str, str]:
        raise RuntimeError("no kernel for this machine\nand more")

    monkeypatch.setattr(selm_fast.ops, "backends", broken)
    assert main(["doctor"]) == 1
    assert row(capsys.readouterr().out, "selm_fast.ops")[4] == "RuntimeError: no kernel for this machine"


def test_a_gpu_that_does_not_compute_is_a_problem(monkeypatch, capsys) -> None:
    import torch

    def broken(index: int) -> None:
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert main(["doctor"]) == 1
    assert row(capsys.readouterr().out, "cuda:0")[2:4] == ["does not compute", "problem"]


@pytest.mark.gpu
def test_a_gpu_is_shown_with_its_memory_and_driver(capsys) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    main(["doctor"])  # where other packages are missing this machine cannot train, and the GPU is shown all the same
    found = row(capsys.readouterr().out, "cuda:0")
    assert torch.cuda.get_device_name(0) in found[2] and "capability" in found[2] and found[3] == "ok"


def test_a_terminal_gets_a_table(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "┃" in out and "\t" not in out


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("3.11", (3, 11)), ("2.12.0rc1", (2, 12, 0)), ("", ()), ("unknown", ())],
)
def test_versions_are_compared_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor._numbers(text) == numbers


def test_the_floors_are_written_down_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = requirements(project["dependencies"])
    extras = project["optional-dependencies"]
    optional = {name: floor for extra in extras for name, floor in requirements(extras[extra]).items()}
    assert floors == {name: floor for name, floor in doctor.REQUIRED.items() if floor}
    shown = {name: floor for name, floor in doctor.OPTIONAL.items() if floor}
    assert shown == {name: optional[name] for name in shown}
    assert project["requires-python"] == f">={doctor.PYTHON_FLOOR}"

    pinned = requirements((ROOT / "constraints-floor.txt").read_text().splitlines())
    tested = {
        name: floor
        for extra in ("datasets", "tensorboard", "test")
        for name, floor in requirements(extras[extra]).items()
    }
    assert {name: pinned.get(name) for name in floors | tested} == floors | tested


def test_every_direct_dependency_is_pinned_at_or_above_its_floor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    pinned = requirements((ROOT / "constraints.txt").read_text().splitlines())
    for name, floor in requirements(lines).items():
        assert doctor._numbers(pinned[name]) >= doctor._numbers(floor), name


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(doctor, "_gpu", lambda index, driver: doctor.Finding("devices", f"cuda:{index}", "a GPU"))


def test_collectives_are_tried_on_the_cpu_and_on_every_gpu(monkeypatch, tried, capsys) -> None:
    import torch

    pretend_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    main(["doctor"])
    out = capsys.readouterr().out
    assert sorted(tried) == [("gloo", "cpu"), ("nccl", "cuda:0"), ("nccl", "cuda:1")]
    assert row(out, "nccl")[2:] == ["2.27.5", "ok"]
    assert row(out, "nccl cuda:1")[2:] == ["works", "ok"]


def test_a_collective_that_fails_stands_in_the_way_of_gpus_alone(monkeypatch, capsys) -> None:
    import torch

    monkeypatch.setattr(tryouts, "loop_back", lambda backend, device: f"{backend} hung for 90 s")
    assert main(["doctor"]) == 0
    found = row(capsys.readouterr().out, "gloo cpu")
    assert found[2:] == ["fails", "note", "gloo hung for 90 s; one process trains without it"]
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert main(["doctor"]) == 1
    assert row(capsys.readouterr().out, "nccl cuda:0")[2:] == ["fails", "problem", "nccl hung for 90 s"]


def test_a_torch_without_nccl_is_a_problem_where_there_are_gpus(monkeypatch, capsys) -> None:
    import torch

    def missing() -> None:
        raise AttributeError("no nccl")

    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda.nccl, "version", missing)
    assert main(["doctor"]) == 1
    assert row(capsys.readouterr().out, "nccl")[2:4] == ["not in this torch", "problem"]


def test_back_ends_of_attention_tell_why_or_how_they_serve(monkeypatch, capsys) -> None:
    from selm_fast.ops import attention_choice

    main(["doctor"])
    out = capsys.readouterr().out
    assert row(out, "varlen, fp32, bf16")[2:] == ["cannot serve", "ok", "needs an NVIDIA GPU; the tensors are on cpu"]
    assert row(out, "torch, fp32, bf16")[2:4] == ["serves", "ok"]
    assert row(out, "flash_cpu, fp32, bf16")[2:4] == ["passes its self-test", "ok"]

    def broken(name: str, case: attention_choice.Case) -> str | None:
        return "error of the dq is 0.5 of its size" if case.dtype.itemsize == 2 else None

    monkeypatch.setattr(attention_choice, "failure", broken)
    assert [finding.name for finding in tryouts.attention("cpu")].count("flash_cpu, bf16") == 1
    found = {finding.name: finding for finding in tryouts.attention("cpu")}
    assert found["flash_cpu, fp32"].found == "passes its self-test"
    assert found["flash_cpu, bf16"].state == "note"
    assert found["flash_cpu, bf16"].remark == "error of the dq is 0.5 of its size; it is not used"


def test_a_self_test_that_raises_is_a_finding(monkeypatch) -> None:
    from selm_fast.ops import attention_choice

    def raises(*_: object) -> None:
        raise OSError("libcuda.so.1 is missing\nand more")

    monkeypatch.setattr(attention_choice, "failure", raises)
    found = {finding.name: finding for finding in tryouts.attention("cpu")}
    assert found["flash_cpu, fp32, bf16"].remark == "OSError: libcuda.so.1 is missing; it is not used"
