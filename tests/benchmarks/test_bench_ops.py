"""`benchmarks/bench_ops.py` on a tiny shape: what it writes, and that nothing that is wrong has its speed shown."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, bench_ops, cases, exact, machine, measure, peers
from benchmarks.exact import Shape
from benchmarks.peers import BACKWARD, NO_GRAD, Entrant, eager_forward
from selm_fast.ops import backends, extension, shared_prefix_attention

SHAPE = Shape(48, 16, 130)
ALL_PEERS = dict(peers.PEERS)
FIGURES = ("ms", "wall_ms", "gemms", "gemms_wall", "roofline")
GRADIENTS = ("hidden", "weight of targets", "weight of others")
ROW = {"op", "name", "kind", "ours", "per_token_gradients", "matmuls", "errors", "errors_of_torchs", "problems"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Small peak rates and attention, and no peers: importing one may take seconds."""
    monkeypatch.setitem(measure.PEAK_SIDE, "cpu", 32)
    monkeypatch.setitem(measure.PEAK_COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(peers, "PEERS", {})
    for name, size in {"HEADS": 4, "KEY_HEADS": 2, "HEAD_SIZE": 8, "PROMPT": 16, "RESPONSE": 24}.items():
        monkeypatch.setattr(attention, name, size)


def bench(folder: Path, *flags: str, dtype: str = "fp32") -> tuple[int, dict[str, Any]]:
    """Run the benchmark -> exit code and what it wrote."""
    out = folder / "results.json"
    shape = f"{SHAPE.N},{SHAPE.D},{SHAPE.V}"
    code = bench_ops.main(
        ["--shape", shape, "--dtype", dtype, "--repeats", "2", "--no-memory", "--json", str(out), *flags]
    )
    return code, json.loads(out.read_text("utf-8"))


def wrong_forward(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Right but for one token of many, whose gradient is doubled."""
    logps = eager_forward(hidden, weight, target)
    return logps + torch.cat([(logps[:1] - logps[:1].detach()), torch.zeros_like(logps[1:])])


def test_results_say_what_was_measured_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = bench(tmp_path, dtype="fp32,bf16")
    assert code == 0
    assert set(results) == {"command", "commit", "machine", "versions", "backends", "extension", "runs"}
    assert results["backends"] == backends("cpu")
    assert results["extension"] == machine.portable(extension.status())
    assert not re.search(r"(?<![\w.$~])/\w", results["command"])  # of the JSON's path, the place on this machine
    assert results["command"].startswith("python benchmarks/bench_ops.py --shape 48,16,130 --dtype fp32,bf16")
    assert set(results["commit"]) == {"id", "dirty", "sources"}
    assert results["machine"]["threads"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert [run["dtype"] for run in results["runs"]] == ["fp32", "bf16"]
    for run in results["runs"]:
        assert run["shape"] == {"N": 48, "D": 16, "V": 130}
        assert run["peaks"]["copy_bytes_per_s"] > 0
        assert list(run["peaks"]["matmul_flop_per_s"]) == [run["dtype"]]
        assert {row["op"] for row in run["rows"]} == {*cases.CASES, attention.OP}
        for row in run["rows"]:
            assert set(row) == {*ROW, *FIGURES, "extra_bytes"}
            assert row["problems"] == []
            assert row["extra_bytes"] is None
            gradients = ("q", "k", "v") if row["op"] == attention.OP else GRADIENTS
            assert set(row["errors"]) == ({"output"} if row["kind"] == NO_GRAD else {"output", *gradients})
            assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
            assert row["ms"]["median"] > 0
            assert row["roofline"] > 0
            assert (row["gemms"] is None, row["gemms_wall"] is None) == (row["op"] == attention.OP,) * 2
    printed = capsys.readouterr().out
    assert f"Back ends: linear_logprob: {backends('cpu')['linear_logprob']}; " in printed
    assert "| linear_logprob | selm_fast keep | forward + backward | yes |" in printed
    assert "| fused_preference_loss | selm_fast recompute, fused | forward + backward | yes |" in printed
    assert "| shared_prefix_attention | selm_fast torch | forward + backward | yes |" in printed


def raising_forward(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("error of hidden making")


@pytest.mark.parametrize("forward", [wrong_forward, raising_forward])
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_wrong_contestant_has_no_speed_and_ours_fails_the_run(
    is_ours: bool, forward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entrant = Entrant(name="wrong", forward=forward, matmuls=3, ours=is_ours, kinds=(BACKWARD,))
    monkeypatch.setattr(peers, "PEERS", {"wrong": lambda: entrant})
    code, results = bench(tmp_path)
    assert code == (1 if is_ours else 0)
    (row,) = (row for row in results["runs"][0]["rows"] if row["name"] == "wrong")
    assert any("error of hidden" in problem for problem in row["problems"])
    assert all(row[figure] is None for figure in FIGURES)
    printed = capsys.readouterr().out
    assert "| linear_logprob | wrong | forward + backward | yes | not shown |" in printed
    assert ("WRONG: linear_logprob, wrong" in printed) == is_ours


@pytest.mark.parametrize(
    "flags",
    [["--shape", "1,2"], ["--shape", "a,b,c"], ["--shape", "2,9,9"], ["--dtype", "fp8"], ["--repeats", "0"]],
    ids=" ".join,
)
def test_a_wrong_flag_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_ops.main(flags)
    assert refused.value.code == 2


def test_attention_layout_is_that_of_the_packer() -> None:
    """As `selm_fast.data.packing` lays groups out; it needs more packages than the ops do."""
    packing = pytest.importorskip("selm_fast.data.packing")
    packed = attention.layout(3, "cpu")
    queries, keys = (cu.diff().tolist() for cu in (packed.cu_seqlens_q, packed.cu_seqlens_k))
    groups = []
    for first in range(0, 9, 3):
        prompt = keys[first + 1] - queries[first + 1] + 1
        lengths = [prompt, queries[first] - (prompt - 1), queries[first + 1], queries[first + 2]]
        ids = [[10 * first + nth] * length for nth, length in enumerate(lengths)]
        groups.append(packing.TokenGroup(prompt=ids[0], chosen=ids[1], rejected=ids[2], explored=ids[3]))
    (batch,) = packing.pack(groups)
    for name in attention.Packed._fields:
        got, wanted = getattr(packed, name), getattr(batch, name)
        assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted, name


def test_a_wrong_attention_back_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any, backend: str, **settings: Any) -> torch.Tensor:
        out = shared_prefix_attention(*arguments, backend=backend, **settings)
        return out.roll(1, 1) if backend == "torch" and out.dtype == torch.float32 else out

    monkeypatch.setattr(attention, "shared_prefix_attention", shifted)
    checked = {(held.contestant.name, held.contestant.kind): held.problems for held in attention.check("cpu", "fp32")}
    assert "error of output" in checked.pop(("selm_fast torch", NO_GRAD))[0]
    assert "error of output" in checked.pop(("selm_fast torch", BACKWARD))[0]
    assert len(checked) >= 2
    assert not any(checked.values())


def test_attention_that_cannot_be_checked_fails_the_run_and_leaves_the_head_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "by_branch", broken)
    code, results = bench(tmp_path)
    assert code == 1
    rows = {row["op"]: row for row in results["runs"][0]["rows"]}
    assert rows["linear_logprob"]["ms"] is not None
    assert "no kernel image" in rows[attention.OP]["problems"][0]
    assert "WRONG: shared_prefix_attention, selm_fast: it cannot be checked" in capsys.readouterr().out


def test_one_of_ours_that_does_not_repeat_itself_has_no_speed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = itertools.count()

    def drifting(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logps = eager_forward(hidden, weight, targets)
        return logps * (1.0 + 1e-6 * (next(runs) > 2))  # checked, then timed in three rounds: wrong in the last of them

    for is_ours in (True, False):
        runs = itertools.count()
        entrant = Entrant(name="drifting", forward=drifting, matmuls=1, ours=is_ours, kinds=(NO_GRAD,))
        monkeypatch.setattr(peers, "PEERS", {"drifting": lambda entrant=entrant: entrant})
        code, results = bench(tmp_path)
        (row,) = (row for row in results["runs"][0]["rows"] if row["name"] == "drifting")
        assert code == int(is_ours)
        assert [problem.partition(" after")[0] for problem in row["problems"]] == ["output has other bits"] * is_ours
        assert (row["ms"] is None) == is_ours
        assert ("WRONG: linear_logprob, drifting" in capsys.readouterr().out) == is_ours


def test_back_ends_that_cannot_be_found_out_are_told_and_the_ops_keep_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: str) -> dict[str, str]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bench_ops, "backends", broken)
    code, results = bench(tmp_path)
    assert code == 0
    assert results["backends"] == {"unknown": "RuntimeError: no kernel image"}


IMPORTED_PEERS = [name for name in ALL_PEERS if not name.startswith("torch")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "torch linear_cross_entropy",
        *(pytest.param(name, marks=[pytest.mark.peer, pytest.mark.slow]) for name in IMPORTED_PEERS),
    ],
)
def test_the_adapter_of_a_peer_is_right_where_the_peer_is_installed(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {name: ALL_PEERS[name]})
    inputs = exact.make_inputs(SHAPE, dtype, "cpu")
    reference = exact.exact(inputs)
    case = cases.linear_logprob_case(inputs, reference.logps)
    if case.missing:
        pytest.skip(case.missing[name])
    case.entrants[1:] = case.entrants[-1:]
    checked = {held.contestant.kind: held.problems for held in cases.check(case, reference, dtype)}
    assert case.entrants[1].name == name
    if "cannot run" in "".join(checked[NO_GRAD]):
        pytest.skip(checked[NO_GRAD][0])
    assert checked == {NO_GRAD: [], BACKWARD: []}
