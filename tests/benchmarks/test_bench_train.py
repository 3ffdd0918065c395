"""The training benchmark: the same loss by every way to train, the gate that sees to it, figures and targets."""

from __future__ import annotations

import importlib.util
import json
import mmap
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_train, machine, measure
from benchmarks.train import field, figures, gemms, ladder, preload, race, tables, worker, workload
from benchmarks.train.contestant import Contestant, Job, Stopwatch, batches, batches_by_length
from benchmarks.train.workload import Row, Settings, Workload, make_workload, parity_rows
from selm_fast.data.packing import TokenGroup, pack
from selm_fast.model import Policy
from selm_fast.roofline import Settings as StepSettings
from selm_fast.roofline import flops

TINY = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SETTINGS = Settings(groups=4, max_length=64, max_prompt_length=16, max_tokens=128)
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and rows of a few thousand numbers under the name of the small ones."""
    monkeypatch.setitem(workload.SHAPES, "small", TINY)
    monkeypatch.setitem(workload.LENGTHS, "small", (6, 14, 11, 12))


@pytest.fixture
def made(tmp_path: Path) -> Workload:
    """A workload in fp32."""
    return make_workload(
        tmp_path, shape="small", device="cpu", dtype="fp32", settings=SETTINGS, data=None, generated=40
    )


def job_of(made: Workload, tmp_path: Path, alpha: float) -> Job:
    exploring = replace(made, settings=replace(made.settings, alpha=alpha))
    return Job(workload=exploring, rows=parity_rows(made.rows(), 4), reference=made.reference, scratch=tmp_path)


def figures_of(entry: Contestant, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a contestant reports of one step."""
    from selm_fast.ops import attention_choice

    monkeypatch.setattr(attention_choice, "BACKENDS", dict(attention_choice.BACKENDS))
    module = importlib.import_module(entry.module)
    once = worker.Once()
    getattr(module, entry.function)(replace(job, scratch=tmp_path / entry.name), once, **entry.options)
    attention_choice.choose.cache_clear()
    return once.found


ENTRIES = {entry.name: entry for entry in field.contestants()}
NOT_COMPILED = [name for name in ENTRIES if name != field.COMPILED]


@pytest.mark.peer
@pytest.mark.parametrize("name", NOT_COMPILED)
def test_every_contestant_computes_the_same_loss_and_gradient_norm(
    name: str, made: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ENTRIES[name]
    if "trl" in entry.module and not HAS_TRL:
        pytest.skip("trl is not installed (extra: peer)")
    job = job_of(made, tmp_path, workload.PARITY_ALPHA)
    exact = exact_figures(job, entry.method)
    found = figures_of(entry, job, tmp_path, monkeypatch)
    for what, value in exact.items():
        assert found[what] == pytest.approx(value, rel=race.TOLERANCE["fp32"]), what


def exact_figures(job: Job, method: str) -> dict[str, float]:
    """Loss and gradient norm in float64, a sequence at a time, from the formula itself."""
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (job.workload.model, job.workload.reference)
    )
    settings = job.workload.settings
    losses = []
    for row in job.rows:
        ratios = {}
        for role in ("chosen", "rejected", "explored"):
            ids = torch.tensor([row.prompt + getattr(row, role)])
            first = len(row.prompt)
            logps = [
                model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1).gather(1, ids[0, first:, None]).sum()
                for model in (policy, reference)
            ]
            ratios[role] = logps[0] - logps[1].detach()
        loss = -torch.nn.functional.logsigmoid(settings.beta * (ratios["chosen"] - ratios["rejected"]))
        if method == "selm":
            loss = loss + settings.alpha * settings.beta * ratios["explored"]
        losses.append(loss)
    total = torch.stack(losses).mean()
    total.backward()
    norms = [parameter.grad.norm() for parameter in policy.parameters() if parameter.grad is not None]
    return {"loss": total.item(), "grad_norm": torch.stack(norms).norm().item()}


def test_the_gates_loss_depends_on_every_term(made: Workload, tmp_path: Path) -> None:
    """Else a contestant that leaves one out would pass."""
    with_it = exact_figures(job_of(made, tmp_path, workload.PARITY_ALPHA), "selm")
    without = exact_figures(job_of(made, tmp_path, workload.PARITY_ALPHA), "dpo")
    for what in with_it:
        assert abs(with_it[what] - without[what]) > 3 * race.TOLERANCE["bf16"] * without[what], what
    assert abs(without["loss"] - 0.693147) > 0.01  # a wrong sign, or no reference, would show


def test_packs_without_sharing_or_aliases_have_the_log_probs_of_shared_ones(made: Workload) -> None:
    policy = Policy.from_pretrained(made.model)
    rows = parity_rows(made.rows(), 4)
    groups = [TokenGroup(row.prompt, row.chosen, row.rejected, row.explored) for row in rows]
    (shared,) = pack(groups)
    for shares in (False, True):
        apart = ladder.pack_apart(groups, shares)
        assert apart.tokens.numel() > shared.tokens.numel()
        with torch.no_grad():
            known, found = policy.sequence_logps(shared), policy.sequence_logps(apart)
        for role in ("chosen", "rejected", "explored"):
            expected, got = known[getattr(shared.pairs, role)], found[getattr(apart.pairs, role)]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_generated_rows_are_repeatable_within_limits_and_of_all_kinds(made: Workload, tmp_path: Path) -> None:
    rows = made.rows()
    again = make_workload(
        tmp_path / "again", shape="small", device="cpu", dtype="fp32", settings=SETTINGS, data=None, generated=40
    )
    assert again.rows() == rows
    for row in rows:
        assert 2 <= len(row.prompt) <= SETTINGS.max_prompt_length
        for response in (row.chosen, row.rejected, row.explored):
            assert len(row.prompt) + len(response) <= SETTINGS.max_length
            assert response[-1] == 2
    kinds = [row.explored == row.chosen for row in rows], [row.explored == row.rejected for row in rows]
    assert 0.3 < sum(kinds[0]) / len(rows) < 0.7
    assert 0.05 < sum(kinds[1]) / len(rows) < 0.4
    gate = parity_rows(rows, 4)
    for aliases in ([row.explored == row.chosen for row in gate], [row.explored == row.rejected for row in gate]):
        assert set(aliases) == {True, False}


def test_useful_tokens_count_the_prompt_and_equal_responses_once() -> None:
    row = Row(prompt=[5] * 7, chosen=[6] * 4, rejected=[7] * 3, explored=[6] * 4)
    assert row.useful_tokens(True) == row.useful_tokens(False) == 7 + 4 + 3
    assert replace(row, explored=[8] * 9).useful_tokens(True) == 7 + 4 + 3 + 9


def test_batches_sorted_by_length_are_of_like_lengths_from_evenly_spaced_places() -> None:
    rows = [Row(prompt=[1], chosen=[2] * n, rejected=[3], explored=[4]) for n in range(100, 0, -1)]
    found = [len(row.chosen) for row in batches_by_length(rows[::-1], 10, 2, False)]
    assert found == [*range(78, 68, -1), *range(32, 22, -1)]


def test_every_batch_has_a_row_of_each_class_of_lengths() -> None:
    rows = [Row(prompt=[1], chosen=[2] * n, rejected=[3], explored=[2] * n) for n in (5, 80, 40, 6, 44, 81, 41, 7, 82)]
    found = [len(row.chosen) for row in batches(rows, 3, 2)]
    assert found == [5, 40, 80, 6, 44, 81]
    assert batches(rows, 3, 3)[:6] == batches(rows, 3, 2)  # whoever takes more steps has the same first ones
    assert {len(row.chosen) for row in batches(rows, 3, 3)} == {len(row.chosen) for row in rows}


class Paced:
    """A connection to a contestant whose every answer takes so many seconds, on a clock of its own."""

    clock = 0.0

    def __init__(self, seconds: float) -> None:
        self.seconds, self.words = seconds, list[str]()

    def send(self, word: str) -> None:
        self.words.append(word)

    def poll(self, _: float) -> bool:
        return True

    def recv(self) -> tuple[str, dict[str, Any]]:
        Paced.clock += self.seconds
        return "said", {"wall_s": self.seconds, "breakdown": {}, "peak_bytes": 1}

    def close(self) -> None:
        """Nothing is open."""


class Ended:
    """The process behind it."""

    def join(self, _: float) -> None:
        """At once."""

    def is_alive(self) -> bool:
        return False


@pytest.mark.parametrize("seconds, counted", [(50.0, 3), (49.9, 2), (38.0, 2), (37.9, 1), (0.0, 1)])
def test_rounds_go_on_while_there_is_time(
    seconds: float, counted: int, made: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a warm-up of 13 s rounds of 12 s, which end 25, 37 and 49 s after the start; 13 are feared."""
    monkeypatch.setattr(Paced, "clock", 0.0)
    monkeypatch.setattr(race.time, "monotonic", lambda: Paced.clock)
    names = {field.TRL_SELM: 10.0, field.OURS: 1.0, field.COMPILED: 1.0}
    job = Job(workload=made, rows=[], reference=None, scratch=Path())
    runners = [
        race.Runner(ENTRIES[name], job, Ended(), Paced(pace))  # type: ignore[arg-type]
        for name, pace in names.items()
    ]
    assert race.run(runners, 3, print, seconds=seconds) == counted
    trl, ours, compiled = ([step["wall_s"] for step in runner.counted] for runner in runners)
    assert len(trl) == len(compiled) == counted
    assert len(ours) == counted + 3 * field.SPRINT
    assert [len(runner.steps) for runner in runners] == [counted + 1, counted + 1 + 3 * field.SPRINT, counted + 2]
    assert runners[0].connection.words[-2:] == [worker.PROFILE, worker.STOP]  # type: ignore[attr-defined]
    assert worker.PROFILE not in runners[2].connection.words  # type: ignore[attr-defined]


def test_a_contestant_has_rows_for_all_its_steps() -> None:
    assert race.steps_of(field.OURS, 2) == 2 + 2 * field.SPRINT + 1
    assert race.steps_of(field.TRL_SELM, 2) == 3
    assert race.steps_of(field.TRL_DPO, 2) == 2


def runner_of(entry: Contestant, made: Workload, **said: Any) -> race.Runner:
    job = Job(workload=made, rows=made.rows()[:20], reference=None, scratch=Path())
    runner = race.Runner(entry, job, None, None)  # type: ignore[arg-type]
    for name, value in said.items():
        setattr(runner, name, value)
    return runner


def test_whoever_differs_fails_or_lacks_a_yardstick_is_named(made: Workload) -> None:
    good = {"loss": 0.75, "grad_norm": 6.0}
    plain = runner_of(ENTRIES[field.PLAIN], made, parity=good)

    def said(**parity: Any) -> list[str]:
        ours = runner_of(ENTRIES[field.OURS], made, parity=good | parity)
        return race.disagreements([plain, ours], field.YARDSTICK, "fp32")

    assert said() == said(loss=0.75 * (1 + 0.9e-4)) == []
    assert "selm_fast: loss" in said(loss=0.75 * (1 + 1.1e-4))[0]
    assert "selm_fast: grad_norm" in said(grad_norm=6.0 * (1 - 1.1e-4))[0]
    assert said(loss=float("nan")) and said(grad_norm=float("nan"))
    ours = runner_of(ENTRIES[field.OURS], made, parity=good)
    assert "its yardstick, is not there" in race.disagreements([ours], field.YARDSTICK, "fp32")[0]
    ours.failed = "out of memory"
    assert race.disagreements([plain, ours], field.YARDSTICK, "fp32") == ["selm_fast: out of memory"]


@pytest.mark.slow
def test_contestants_are_started_where_the_parent_s_modules_are_found(tmp_path: Path) -> None:
    code = "import sys, benchmarks.train.preload; print(sys.path[-1], 'benchmarks.train.worker' in sys.modules)"
    environment = os.environ | {preload.VARIABLE: os.pathsep.join([*sys.path, str(tmp_path)])}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(tmp_path), "True"]


def test_a_worker_says_how_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_be_quiet", lambda: None)  # it would silence this process for good
    here, there = multiprocessing.Pipe()
    entry = replace(ENTRIES[field.PLAIN], function="no_such_function")
    worker.main(there, entry, None, None, 1)  # type: ignore[arg-type]
    kind, values = here.recv()
    assert kind == "failed"
    assert "no_such_function" in values["why"]


def steps(*walls: float) -> list[dict[str, float]]:
    return [
        {"wall_s": wall, "cpu_s": 2 * wall, "kernel_s": 0.3 * wall, "loss": 0.7, "grad_norm": 1.0} for wall in walls
    ]


def test_figures_of_given_times(made: Workload) -> None:
    setup = {"setup_s": 3.0, "reference_s": 2.0}
    runner = runner_of(ENTRIES[field.OURS], made, setup=setup, steps=steps(99.0, 1.0, 2.0, 4.0), peak_bytes=2**30)
    rows = made.rows()
    tokens = [sum(row.useful_tokens(True) for row in rows[i : i + 4]) for i in (4, 8, 12)]
    row = figures.figures(runner, made, mean_tokens=50.0, peak=1e9)
    rates = [count / wall / 50.0 for count, wall in zip(tokens, (1.0, 2.0, 4.0), strict=True)]
    rate = sorted(rates)[1]
    assert row["groups_per_s"]["median"] == pytest.approx(rate)
    assert row["groups_per_cpu_s"] == pytest.approx(rate / 2)
    assert row["tokens_per_s"] == pytest.approx(rate * 50.0)
    reference = 2.0 / sum(row.useful_tokens(True) for row in rows[:20]) * 50.0  # seconds a group
    assert row["groups_per_s_with_reference"] == pytest.approx(1 / (1 / rate + reference))
    assert row["epoch_s"] == pytest.approx(3.0 + 40 * (1 / rate + reference))
    work = figures.work_of(rows[4:8], True)
    shape = figures.shape_of(made)
    assert 0 < row["mfu"] < 1
    both = flops(shape, work, StepSettings(reference=False))
    assert 0.9 * both.total < row_flops(row, tokens, made) < both.total * 1.01


def row_flops(row: dict[str, Any], tokens: list[int], made: Workload) -> float:
    """FLOPs of the first counted step, from the utilisation of a row whose rates are all equal to it."""
    runner = runner_of(
        ENTRIES[field.OURS], made, setup={"setup_s": 0.0, "reference_s": 0.0}, steps=steps(9.0, 1.0), peak_bytes=0
    )
    return figures.figures(runner, made, mean_tokens=50.0, peak=1.0)["mfu"]


def rows_of(made: Workload, ours: float, trl: float, gemm: float, memory: tuple[int, int]) -> list[dict[str, Any]]:
    setup = {"setup_s": 0.0, "reference_s": 0.0}
    times = {field.OURS: (ours, memory[0]), field.TRL_SELM: (trl, memory[1]), field.CACHED_DPO: (4.0, 8),
             field.OURS_DPO: (0.5, 1)}  # fmt: skip
    found = [
        figures.figures(runner_of(ENTRIES[name], made, setup=setup, steps=steps(9.0, wall, wall), peak_bytes=peak),
                        made, 50.0, 1e9)
        for name, (wall, peak) in times.items()
    ]  # fmt: skip
    yardstick = runner_of(field.yardsticks()[0], made, setup=setup, steps=steps(9.0, gemm, gemm))
    return [*found, figures.figures(yardstick, made, 50.0, 1e9)]


def test_targets_are_met_at_their_bounds_and_missed_beyond_them(made: Workload) -> None:
    def verdicts(*args: Any) -> list[bool | None]:
        return [one["met"] for one in figures.targets(rows_of(made, *args), made, "a processor", 2, None)]

    assert verdicts(1.0, 7.0, 1 / 1.2, (25, 100)) == [True] * 4
    assert verdicts(1.0, 6.9, 0.83, (26, 100)) == [False, False, False, True]
    rows = rows_of(made, 1.0, 7.0, 1 / 1.2, (25, 100))
    assert [one["met"] for one in figures.targets(rows[1:], made, "a processor", 2, None)] == [None, None, None, True]
    threads = figures.targets(rows, made, "a processor", 4, None)
    assert {one["met"] for one in threads} == {None} and "2 threads" in threads[0]["why"]
    assert figures.targets(rows, replace(made, dtype="bf16"), "a processor", 2, None) == []
    on_gpu = [figures.targets(rows, replace(made, device="cuda"), "NVIDIA H200", 2, x) for x in (1.15, 1.16, None)]
    assert [[one["bound"] for one in found] for found in on_gpu] == [[4.0, 1.15]] * 3
    assert [found[1]["met"] for found in on_gpu] == [True, False, None]


def test_cpu_time_outside_the_kernel_is_compared_step_by_step() -> None:
    slow = {"wall_s": [9.0, 9.0], "cpu_s": [10.0, 20.0], "kernel_s": [4.0, 8.0]}
    fast = {"wall_s": [1.0, 1.0, 1.0], "cpu_s": [2.0, 4.0, 99.0], "kernel_s": [0.5, 2.0, 0.0]}
    assert figures.outside_kernel(slow, fast) == pytest.approx((6 / 1.5 + 12 / 2) / 2)
    assert figures.outside_kernel(None, fast) is figures.outside_kernel(slow, {"name": "failed"}) is None


def test_time_in_the_kernel_is_told_apart() -> None:
    watch = Stopwatch()
    for _ in range(8):
        mmap.mmap(-1, 2**26).write(bytes(2**26))  # fresh pages, cleared by the kernel
    wall, cpu, kernel = watch.lap()
    assert wall > 0 and 0 < kernel <= cpu + 0.05
    assert sum(range(10**7)) > 0
    _, cpu, less = watch.lap()
    assert less < cpu / 2 and less < kernel


def test_the_profiled_step_is_the_one_after_those_that_count(made: Workload) -> None:
    runner = runner_of(ENTRIES[field.OURS], made, steps=steps(9.0, 1.0, 2.0))
    assert runner.counted_rows(4) == made.rows()[4:12]
    assert runner.next_rows(4) == made.rows()[12:16]


def test_a_step_in_rooflines_is_the_median_over_the_counted_steps(made: Workload) -> None:
    runner = runner_of(ENTRIES[field.OURS], made, steps=steps(99.0, 1.0, 2.0, 3.0))
    peaks = measure.Peaks(matmul={"fp32": 1e9}, copy=1e30)  # bytes cost nothing: FLOPs alone
    rows = made.rows()
    least = []
    for first in (4, 8, 12):
        work = figures.work_of(rows[first : first + 4], exploring=True)
        least.append(flops(figures.shape_of(made), work, StepSettings()).total / 1e9)
    expected = sorted(wall / seconds for wall, seconds in zip((1.0, 2.0, 3.0), least, strict=True))[1]
    assert figures.in_rooflines(runner, made, peaks) == pytest.approx(expected)
    assert figures.in_rooflines(runner_of(ENTRIES[field.OURS], made, steps=steps(99.0)), made, peaks) is None


def test_weights_go_over_bytes_where_bytes_are_slow(made: Workload) -> None:
    """A roofline of a batch of two micro-batches reads the weights twice."""
    peaks = measure.Peaks(matmul={"fp32": 1e30}, copy=1.0)
    rows = made.rows()[:4]
    tokens = figures.work_of(rows, exploring=True).tokens
    bodies = []
    for most in (tokens, tokens - 1):
        cut = replace(made, settings=replace(made.settings, max_tokens=most))
        bodies.append(figures.roofline(rows, cut, peaks)["body"])
    assert bodies[1] - bodies[0] > 2 * 4 * figures.shape_of(made).body


def test_bare_gemms_are_the_flops_of_the_model(made: Workload, tmp_path: Path) -> None:
    """Counted product by product: those of a training step that keeps everything, but that scores are formed once."""
    job = Job(workload=made, rows=made.rows()[:4], reference=None, scratch=tmp_path)
    total = 0
    for batch in gemms.batches(job.rows, job, "selm"):
        for call in gemms.gemms(batch, job, attention=True):
            if isinstance(call, gemms.Linear):
                total += 3 * 2 * call.rows * call.into * call.out
            else:
                total += 6 * 2 * call.heads * call.queries * call.keys * call.size
    exact = flops(figures.shape_of(made), figures.work_of(job.rows, True), StepSettings())
    expected = exact.total - exact.attention.backward * (0.5 / 2.5)  # two forwards, not two and a half
    assert total == pytest.approx(expected, rel=0.01)


def test_bare_gemms_compute_what_they_say(made: Workload, tmp_path: Path) -> None:
    job = Job(workload=made, rows=made.rows()[:4], reference=None, scratch=tmp_path)
    pools = gemms.Pools(job)
    linear = gemms.Linear(rows=5, into=3, out=7)
    linear.reserve(pools)
    x, weight = pools.view("x", 5, 3).clone(), pools.view("weight", 7, 3).clone()
    linear.run(pools)
    y = x @ weight.T
    torch.testing.assert_close(pools.view("y", 5, 7), y)
    torch.testing.assert_close(pools.view("dx", 5, 3), y @ weight)
    torch.testing.assert_close(pools.view("dweight", 7, 3), y.T @ x)


def test_the_whole_benchmark_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes, gate, rounds, profile, figures, tables, JSON: of contestants that start quickly."""
    path = tmp_path / "result.json"
    only = ";".join([field.PLAIN, field.OURS])
    assert bench_train.main(["--only", only, "--rounds", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text("utf-8"))
    train = result["train"]
    assert [row["name"] for row in train["contestants"]] == only.split(";")
    assert {row["name"] for row in train["yardsticks"]} == {field.GEMMS, field.LINEAR_GEMMS}
    for row in train["contestants"]:
        assert row["failed"] is None
        sprint = 1 + field.SPRINT if row["name"] in field.SPRINTERS else 1
        assert len(row["wall_s"]) == 2 * sprint and min(row["wall_s"]) > 0
        assert row["groups_per_s"]["low"] <= row["groups_per_s"]["median"] <= row["groups_per_s"]["high"]
    ours = train["contestants"][-1]
    assert ours["reference_s"] > 0 and "matmuls" in ours["breakdown"] and train["roofline"]["body"] > 0
    text = "\n".join(tables.train(train))
    assert f"| {field.OURS} | {ours['groups_per_s']['median']:.2f} |" in text
    assert text in capsys.readouterr().out


def test_no_speed_is_shown_where_one_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(ENTRIES["packing"], options={"rungs": ("no alpha",)}, module="tests.benchmarks.broken")
    monkeypatch.setattr(field, "contestants", lambda: [ENTRIES[field.PLAIN], broken])
    path = tmp_path / "result.json"
    assert bench_train.main(["--rounds", "1", "--json", str(path)]) == 1
    out = capsys.readouterr()
    assert "packing: loss is" in out.err
    assert "groups/s" not in out.out and not path.exists()


def test_more_rounds_than_there_are_rows_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert bench_train.main(["--rounds", "10", "--json", str(path)]) == 2
    said = "512 generated: 512 rows, and 10 rounds take 568: give fewer rounds"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds is 0; expected 1 or more"),
        (["--only", "TLR SELM"], "--only names 'TLR SELM'"),
        (["--shape", "8b"], "--shape 8b: weights, reference, gradients and optimiser of a contestant take 149.6 GiB"),
        (["--data", "nowhere"], "--data is nowhere; expected a folder with selm_train.jsonl"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_train, "memory_bytes", lambda _: 100 * 2**30)
    with pytest.raises(SystemExit) as refusal:
        bench_train.main(arguments)
    assert refusal.value.code == 2
    assert said in capsys.readouterr().err
