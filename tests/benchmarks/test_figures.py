"""The figures of a benchmark: rates, ratios, memory, targets, and where they were measured. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, machine, measure, targets
from benchmarks.exact import Shape
from benchmarks.peers import BACKWARD, NO_GRAD


def test_the_roofline_is_the_slower_of_arithmetic_and_bytes() -> None:
    peaks = measure.Peaks(matmul={"bf16": 800e12, "fp32": 50e12}, copy=4e12)
    three_gemms = 3 * 2.0 * 8192 * 4096 * 128256
    assert measure.roofline_ms(three_gemms, 1e9, peaks, "bf16") == pytest.approx(32.28, abs=0.01)
    assert measure.roofline_ms(three_gemms, 1e9, peaks, "fp32") == pytest.approx(16 * 32.28, abs=0.1)
    assert measure.roofline_ms(1e9, 4e9, peaks, "bf16") == pytest.approx(1.0)


def test_necessary_work_is_the_matmuls_and_the_bytes_of_operands_and_gradients() -> None:
    flops, moved = cases.necessary(Shape(2, 3, 5), 1, NO_GRAD, 2)
    assert (flops, moved) == (2 * 2 * 3 * 5, (2 * 3 + 5 * 3) * 2)
    assert cases.necessary(Shape(2, 3, 5), 4, BACKWARD, 2) == (4 * flops, 3 * moved)


def test_rates_and_ratios_of_given_times() -> None:
    work = {
        "peak matmul fp32": (6e9, measure.Samples([], [2.0, 3.0, 30.0])),
        "peak copy": (8e9, measure.Samples([], [4.0, 4.0, 4.0])),
    }
    peaks = measure.peaks(work)
    assert peaks.matmul == {"fp32": pytest.approx(2e12)}
    assert peaks.copy == pytest.approx(2e12)
    # A slow round is slow for both: the ratio is taken within rounds.
    assert measure.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    assert measure.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert measure.summary([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_contestants_take_turns() -> None:
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = measure.interleaved(functions, 3, "cpu")
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(taken.ms) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_extra_memory_is_the_peak_above_inputs_and_outputs() -> None:
    """32 MiB dropped beside 8 MiB that are returned, after as much was held before: 32 MiB. In a process of its own."""
    extra = measure.in_fresh_process(_extra_of_32_mib)
    if extra is None:
        pytest.skip("this system does not show the peak memory of a process")
    assert 31 * 2**20 < extra < 36 * 2**20


def _extra_of_32_mib() -> int | None:
    def allocate() -> torch.Tensor:
        dropped = torch.ones(2**23)
        return torch.full((2**21,), dropped[-1].item())

    held = torch.ones(2**24)
    before = torch.ones(2**24)
    del before  # an earlier, higher peak is forgotten
    return measure.extra_bytes(allocate, "cpu") if held[0] else None


def targets_of(
    device: str, device_name: str, dtype: str, shape: dict[str, int], *, threads: int = 2, bf16_in_fp32: bool = True,
    **figures: float,
) -> dict[str, Any]:  # fmt: skip
    """Verdicts on a run in which ours take so many ms and GEMMs; torch eager takes 3 ms, a peer 39, a summing one 1."""

    def row(name: str, kind: str, ms: float | None, **more: Any) -> dict[str, Any]:
        shown = {"ours": name.startswith("selm_fast"), "per_token_gradients": True, "extra_bytes": 4e8} | more
        median = None if ms is None else {"median": ms}
        return {"op": "linear_logprob", "name": name, "kind": kind, "ms": median, "gemms": ms} | shown

    rows = [
        row("torch eager", NO_GRAD, 3.0),
        row("torch eager", BACKWARD, 90.0),
        row("selm_fast", NO_GRAD, figures["no_grad"]),
        row("selm_fast keep", BACKWARD, figures["keep"]),
        row("selm_fast recompute", BACKWARD, figures["recompute"]),
        row("a peer", BACKWARD, 39.0),
        row("a wrong peer", BACKWARD, None),
        row("a peer that sums", BACKWARD, 1.0, per_token_gradients=False),
    ]
    run = {"device": device, "device_name": device_name, "dtype": dtype, "shape": shape, "rows": rows}
    verdicts = targets.judge(run | {"threads": threads, "bf16_in_fp32": bf16_in_fp32})
    assert all((verdict["met"] is None) == (verdict["why"] is not None) for verdict in verdicts)
    return {verdict["target"]: verdict["met"] if verdict["why"] is None else verdict["why"] for verdict in verdicts}


def test_targets_of_the_h200() -> None:
    met = targets_of("cuda", "NVIDIA H200", "bf16", targets.H200, no_grad=12.4, keep=38.1, recompute=47.0)
    assert met == {
        "no-grad, ms": True,
        "keep, ms": False,
        "keep, ms, reading the fp32 tile once": False,
        "recompute, ms": True,
        "recompute, extra bytes": True,
        "keep, ms, beside torch eager": True,
        "keep, ms, beside a peer": True,
    }
    met = targets_of("cuda", "NVIDIA H200", "bf16", targets.H200, threads=9, no_grad=12.4, keep=36.1, recompute=47.0)
    assert (met["keep, ms"], met["keep, ms, reading the fp32 tile once"]) == (True, False)
    assert not targets_of("cuda", "NVIDIA A100", "bf16", targets.H200, no_grad=1.0, keep=1.0, recompute=1.0)


def test_targets_of_a_cpu() -> None:
    met = targets_of("cpu", "a CPU", "fp32", targets.CPU, no_grad=1.11, keep=3.44, recompute=4.6)
    assert met == {
        "no-grad, GEMMs": False,
        "keep, GEMMs": True,
        "recompute, GEMMs": True,
        "recompute, extra bytes": False,
    }
    met = targets_of("cpu", "a CPU", "bf16", targets.CPU, no_grad=3.1, keep=89.0, recompute=1.0)
    assert met["no-grad, CPU ms, beside torch eager"] is False
    assert met["keep, CPU ms, beside torch eager"] is True
    assert not targets_of("cpu", "a CPU", "fp32", {"N": 1, "D": 2, "V": 3}, no_grad=1.0, keep=1.0, recompute=1.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_targets_of_two_threads_say_nothing_of_another_number(dtype: str) -> None:
    figures = {"no_grad": 1.0, "keep": 1.0, "recompute": 1.0}
    met = targets_of("cpu", "a CPU", dtype, targets.CPU, threads=1, **figures)
    assert set(met.values()) == {"it is about 2 threads; these were 1"}
    met = targets_of("cpu", "a CPU", dtype, targets.CPU, bf16_in_fp32=False, **figures)
    unserved = {"the extension multiplies no bf16 matrices with fp32 results here"}
    assert (set(met.values()) == unserved) == (dtype == "bf16")


def test_a_summary_names_the_targets_that_are_not_met() -> None:
    assert targets.summary({"a": True, "b": True}) == "2 of 2 targets met"
    found = targets.summary({"a": True, "b, ms": False, "c": None, "d": False})
    assert found == "1 of 4 targets met; missed: b, ms; d; not judged: c"


@pytest.mark.parametrize("given", ["0123abcd", None])
def test_the_environment_names_the_commit_of_a_copy_without_git(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selm_fast").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("SELM_FAST_COMMIT", raising=False)
    if given is not None:
        monkeypatch.setenv("SELM_FAST_COMMIT", given)
    found = machine.commit()
    assert (found["id"], found["dirty"]) == (given, None)
    (tmp_path / ".git").mkdir()  # one that git can say nothing of: no commit is better than one that may be another
    assert machine.commit()["id"] is None


def test_results_hold_no_places_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", Path("/home/ann/work"))
    monkeypatch.setattr(machine.sys, "executable", "/home/ann/work/.venv/bin/python3")
    monkeypatch.setattr(machine.sys, "prefix", "/home/ann/work/.venv")
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("OUT", "/tmp/out")
    given = {
        "/home/ann/work/.venv/bin/python3 /home/ann/work/benchmarks/x.py": "python benchmarks/x.py",
        "g++ -I/home/ann/work/.venv/include -I/home/ann/work": "g++ -IPREFIX/include -I.",
        "--json=/tmp/out/x.json --junitxml /tmp/ab12/0.xml": "--json=$OUT/x.json --junitxml $TMPDIR/ab12/0.xml",
        "in '/home/ann/work'.": "in '.'.",
        "/home/ann/work2/a /home/annie /home/ann/.cache": "~/work2/a /home/annie ~/.cache",
        "https://x.org/tmp/out ops/tmp": "https://x.org/tmp/out ops/tmp",
    }
    machine.write_json(tmp_path / "x.json", {"a": [{"b": text} for text in given]})
    found = json.loads((tmp_path / "x.json").read_text("utf-8"))["a"]
    assert [item["b"] for item in found] == list(given.values())
    monkeypatch.setenv("OUT", "out")  # a relative one names no place
    assert machine.portable("without out") == "without out"


def test_the_digest_of_the_sources_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "selm_fast" / "ops").mkdir(parents=True)
    kernel = tmp_path / "selm_fast" / "ops" / "kernel.py"
    digests = set()
    for text in ("a", "b"):
        kernel.write_text(text)
        digests.add(machine.sources_digest(tmp_path))
    kernel.rename(kernel.with_name("other.py"))
    digests.add(machine.sources_digest(tmp_path))
    assert len(digests) == 3


def test_results_go_where_out_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200 (x)")
    assert machine.result_path("ops", "cuda") == tmp_path / "ops_nvidia_h200_x.json"
    monkeypatch.delenv("OUT")
    assert machine.result_path("ops", "cuda") == machine.ROOT / "benchmarks" / "results" / "ops_nvidia_h200_x.json"
    machine.write_json(tmp_path / "sub" / "x.json", {"a": [1.5, math.nan, (math.inf,)]})
    assert json.loads((tmp_path / "sub" / "x.json").read_text("utf-8")) == {"a": [1.5, None, [None]]}
