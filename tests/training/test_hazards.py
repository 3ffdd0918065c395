"""What a run refuses before any work, and what it does when a step goes wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from selm_fast.cli.main import main
from selm_fast.config import Config
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.training import machine
from selm_fast.training.loop import Trainer
from selm_fast.training.machine import choose_device
from selm_fast.training.run_train import train

from .harness import (
    TEMPLATE,
    Live,
    MakeConfig,
    assert_same_run,
    assert_same_tensors,
    count_forwards_of,
    groups_of,
    make_rows,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    run,
    write_model,
    write_recipe,
    write_rows,
    write_tokenizer,
)

ROWS = make_rows(9, seed=51)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file of a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def refused_without_a_trace(config: Config, match: str) -> Iterator[None]:
    """The block raises Refused with this message and leaves output folder and cache as they are."""
    folders = [folder for folder in (config.output_dir, config.cache.dir) if folder is not None and folder.exists()]
    before = [contents(folder) for folder in folders]
    with pytest.raises(Refused, match=match):
        yield
    assert [contents(folder) for folder in folders] == before
    for folder in (config.output_dir, config.cache.dir):
        assert folder is None or folder in folders or not folder.exists()


def refuse(config: Config, match: str, rows: Any = ROWS) -> None:
    with refused_without_a_trace(config, match):
        train(config, rows=rows)


# 25: the machine.


def test_hazard_25_a_gpu_is_asked_for_and_there_is_none(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(make_config(device="cuda"), "device is cuda and this machine has no usable NVIDIA GPU: .*set device to cpu")


def test_hazard_25_the_command_exits_with_2(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    recipe = write_recipe(make_config(device="cuda", data__train=rows), tmp_path / "recipe.yaml")
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err.startswith("error: device is cuda")


def test_hazard_25_a_gpu_without_bf16(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(Refused, match="this GPU has none .*set dtype to float32"):
        choose_device(make_config(device="cuda", dtype="bfloat16"))
    assert choose_device(make_config(device="cuda", dtype="float32")) == (torch.device("cuda"), torch.float32)
    assert choose_device(make_config(device="cpu", dtype="bfloat16")) == (torch.device("cpu"), torch.bfloat16)


def test_compiling_in_bf16_on_a_cpu_needs_a_torch_that_rounds_as_eager(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    compiled = make_config(device="cpu", dtype="bfloat16", model__compile=True)
    with pytest.raises(Refused, match=r"needs torch 2.13 or newer and this is 2.12.1\+cpu.*set model.compile to false"):
        choose_device(compiled)
    choose_device(make_config(device="cpu", dtype="float32", model__compile=True))
    choose_device(make_config(device="cpu", dtype="bfloat16"))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu"))
    assert choose_device(compiled) == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_device_and_dtype_by_themselves(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    expected = (torch.device("cuda"), torch.bfloat16) if has_gpu else (torch.device("cpu"), torch.float32)
    assert choose_device(make_config(device="auto")) == expected
    assert choose_device(make_config(device="cpu")) == (torch.device("cpu"), torch.float32)


# 26: disk.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hazard_26_too_little_disk_for_a_checkpoint_and_the_model(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The bound is tight: one byte less than it says is refused, and the files of a run do take about that much."""
    config = make_config(dtype=dtype, checkpoint__every=100)
    count = sum(weight.numel() for weight in Policy.from_pretrained(str(config.model.path)).parameters())
    needed = count * (12 + (4 if dtype == "float32" else 2))
    asked: list[Path] = []

    def usage(path: Any) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = needed - 1
    refuse(config, r"output_dir .* has 0.0 GiB free; one checkpoint and the exported model take 0.0 GiB: free space")
    assert asked[-1] == config.output_dir.parent  # the nearest folder that exists
    free = needed
    run(config, ROWS)
    weights = [path.stat().st_size for path in config.output_dir.rglob("*.safetensors")]
    assert 0.8 < sum(weights) / needed < 1.3


# 27: the output folder.


def test_hazard_27_other_settings_are_named_with_both_values(make_config: MakeConfig) -> None:
    run(make_config(), ROWS)
    config = make_config(optim__lr=0.5, beta=0.25, batch__groups=2, model__compile=True)
    refuse(config, "holds a run with other settings")
    with pytest.raises(Refused, match="holds a run with other settings; choose another output_dir") as caught:
        train(config, rows=ROWS)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "batch.groups: 4 there, 2 here", "beta: 0.1 there, 0.25 here", "model.compile: False there, True here",
        "optim.lr: 0.001 there, 0.5 here",
    ]  # fmt: skip


def test_hazard_27_a_folder_with_other_files(make_config: MakeConfig) -> None:
    config = make_config()
    config.output_dir.mkdir()
    (config.output_dir / "thesis.tex").write_text("precious")
    refuse(config, "is not empty and holds no run of this program: choose an empty or a new folder")


def test_hazard_27_an_empty_folder_is_fine(make_config: MakeConfig) -> None:
    config = make_config()
    config.output_dir.mkdir()
    assert run(config, ROWS).steps


def test_hazard_27_a_damaged_record(make_config: MakeConfig) -> None:
    config = make_config()
    run(config, ROWS)
    record = config.output_dir / "run.json"
    record.write_bytes(record.read_bytes()[:-20])
    refuse(config, "run.json.*this run cannot be gone on with: choose another output_dir")


@pytest.mark.parametrize(
    ("what", "done"),
    [
        ("rows", True), ("rows", False), ("held-out rows", False), ("tokenizer", True), ("weights", False),
        ("reference", False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("held-out rows", True), ("tokenizer", False))),
    ],
)  # fmt: skip
def test_hazard_27_the_same_settings_on_other_data(
    make_config: MakeConfig, tmp_path: Path, what: str, done: bool
) -> None:
    """Same settings, same paths, and something else lies there now."""
    model, reference = write_model(tmp_path / "model"), write_model(tmp_path / "reference", seed=3)
    held_out = write_rows(tmp_path / "eval.jsonl", make_rows(4, seed=1))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = make_config(
        model__path=str(model), model__reference=str(reference), data__train=str(rows), data__eval=str(held_out),
        cache__dir=tmp_path / "cache-of-its-own",
    )  # fmt: skip
    train(config)
    if not done:
        record = config.output_dir / "run.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"done": False}))
    if what == "rows":
        write_rows(rows, ROWS[:-1] + make_rows(1, seed=99))
    elif what == "held-out rows":
        write_rows(held_out, make_rows(4, seed=2))
    elif what == "tokenizer":
        write_tokenizer(model, TEMPLATE + " ")
    else:
        folder, seed = (model, 8) if what == "weights" else (reference, 9)
        shutil.rmtree(folder)
        write_model(folder, seed=seed)  # a finished run is reported as finished before any model is loaded
    expected = {"rows": "training rows", "weights": "initial weights", "reference": "weights of the reference model"}
    before = contents(config.output_dir)
    with pytest.raises(Refused, match=f"the same settings on other {expected.get(what, what)}: put them back"):
        train(config)
    assert contents(config.output_dir) == before


def test_a_refusal_leaves_the_folder_free(make_config: MakeConfig) -> None:
    """After a refusal another command may use the same output folder."""
    refuse(make_config(cache__require=True), "cache.require is set")
    run(make_config(), ROWS)


def test_a_finished_run_says_so_and_does_nothing(
    make_config: MakeConfig, eval_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data__eval=eval_file)
    first = train(config, rows=ROWS)
    before = contents(config.output_dir)
    capsys.readouterr()
    results = []
    assert count_forwards_of(lambda: results.append(train(config, rows=ROWS))) == 0
    assert "holds this run, finished; nothing to do" in capsys.readouterr().out
    assert contents(config.output_dir) == before
    assert results[0].steps == first.steps == 3
    assert results[0].model_dir == first.model_dir == config.output_dir / "model"
    assert results[0].evaluations == first.evaluations
    assert sorted(first.evaluations) == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None}, "output_dir is not set"),
        ({"model": {}}, "model.path is not set"),
        ({"model__path": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"model__reference": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"batch__max_tokens": 10}, "batch.max_tokens is too small: .* takes .* tokens and a batch holds 10"),
        ({"data__max_prompt_length": 4, "data__max_length": 8, "data__max_cut": 0.0}, "explored responses"),
        ({"data__eval": "/nowhere/eval.jsonl"}, "/nowhere/eval.jsonl"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_work_are_refused_before_any_work(
    make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    refuse(make_config(**changes), message)


def test_no_rows_given(make_config: MakeConfig) -> None:
    refuse(make_config(), "data.train is not set", rows=None)


# 29: a loss or gradient that is not finite.


class Broken:
    """Spoils the loss or the gradient of some forwards of training, counted from 0; notes the rows of those steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, value: float, spoiled: set[int]) -> None:
        self.rows: list[list[int]] = []
        self.before: list[dict[str, Tensor]] = []
        forward, train_step = Policy.forward, Trainer._train_step
        step = -1

        def broken_step(trainer: Trainer) -> bool:
            nonlocal step
            step = trainer.position.step
            if step in spoiled:
                self.rows.append([])
                self.before.append(state_of(trainer))
            return train_step(trainer)

        def broken_forward(policy: Policy, batch: Any, *arguments: Any, **settings: Any) -> Any:
            loss, metrics = forward(policy, batch, *arguments, **settings)
            if torch.is_grad_enabled() and step in spoiled:
                self.rows[-1] += batch.row_ids
                if kind == "loss":
                    loss = loss * value
                elif len(self.rows[-1]) == len(batch.row_ids):  # in the first micro-batch of the step alone
                    loss.register_hook(lambda grad: grad * value)
            return loss, metrics

        monkeypatch.setattr(Policy, "forward", broken_forward)
        monkeypatch.setattr(Trainer, "_train_step", broken_step)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of masters, compute weights and optimiser state."""
    found = {f"master {name}": master.detach().clone() for name, master in trainer.masters.masters.items()}
    found |= {f"weight {name}": weight.detach().clone() for name, weight in trainer.policy.model.named_parameters()}
    return found | {name: value.clone() for name, value in trainer.optimizer.tensors().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_hazard_29_a_step_that_is_not_finite_is_not_applied(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str, value: float
) -> None:
    config = make_config(dtype=dtype, epochs=2)
    broken = Broken(monkeypatch, kind, value, {2})
    after: list[dict[str, Tensor]] = []
    train_step = Trainer._train_step

    def step(trainer: Trainer) -> bool:
        done = train_step(trainer)
        after.append(state_of(trainer))
        assert all(master.grad is None for master in trainer.masters.masters.values())
        return done

    monkeypatch.setattr(Trainer, "_train_step", step)
    trace = run(config, ROWS)
    assert len(trace.steps) == 6
    assert_same_tensors(after[2], broken.before[0])
    assert not torch.equal(after[3]["master lm_head.weight"], after[2]["master lm_head.weight"])
    lines = [json.loads(line) for line in (config.output_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3]
    assert lines[0]["row_ids"] == broken.rows[0]
    plan_rows = {group.row_id for group in groups_of(config, ROWS)}
    assert set(lines[0]["row_ids"]) <= plan_rows
    assert [line["bad_steps"] for line in trace.steps] == [0, 0, 1, 1, 1, 1]
    for line in read_metrics(config.output_dir):  # null in the file, for JSON has no NaN
        assert line["grad_norm"] is None if line["step"] == 3 else line["grad_norm"] > 0
    for weight in read_checkpoint(newest_checkpoint(config.output_dir)).masters.values():
        assert weight.isfinite().all()


def test_hazard_29_the_run_is_given_up_after_some_such_steps_in_a_row(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two, one good, then three: the third in a row is the end. Weights before are intact, and the run can go on."""
    config = make_config(epochs=4, checkpoint__every=1)
    with pytest.MonkeyPatch.context() as patch:
        broken = Broken(patch, "gradient", math.nan, {1, 2, 4, 5, 6})
        with pytest.raises(RunFailed, match="3 steps in a row .* not applied; their rows are in .*bad_steps.jsonl"):
            run(config, ROWS)
    assert [line["step"] for line in read_metrics(config.output_dir)] == [1, 2, 3, 4, 5, 6, 7]
    found = read_checkpoint(newest_checkpoint(config.output_dir))
    assert found.step == 7
    last_good = {name.removeprefix("master "): t for name, t in broken.before[2].items() if name.startswith("master ")}
    assert_same_tensors(found.masters, last_good)
    lines = [json.loads(line) for line in (config.output_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["row_ids"]) for line in lines] == list(zip([2, 3, 5, 6, 7], broken.rows, strict=True))
    trace = run(config, ROWS)
    assert [line["step"] for line in trace.steps] == [8, 9, 10, 11, 12]
    assert trace.steps[-1]["bad_steps"] == 5


def test_hazard_29_bad_from_the_first_step_on(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step was applied, so the optimiser's state is all zeros: the checkpoint is written and read all the same."""
    config = make_config(max_bad_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, "loss", math.nan, {0, 1})
        with pytest.raises(RunFailed, match="2 steps in a row"):
            run(config, ROWS)
    state = read_checkpoint(newest_checkpoint(config.output_dir)).optimizer
    assert state
    assert not any(value.any() for value in state.values())
    assert [line["step"] for line in run(config, ROWS).steps] == [3]


def test_hazard_29_the_command_exits_with_1(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Broken(monkeypatch, "loss", math.nan, {0})
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    recipe = write_recipe(make_config(max_bad_steps=1, data__train=rows), tmp_path / "recipe.yaml")
    assert main(["train", str(recipe)]) == 1
    assert "error: 1 steps in a row" in capsys.readouterr().err


def test_hazard_29_a_bad_step_survives_a_stop(make_config: MakeConfig, live: Live, tmp_path: Path) -> None:
    """The count of bad steps is part of what is resumed."""
    settings: dict[str, Any] = {"epochs": 2, "max_bad_steps": 3}
    whole = make_config("whole", cache__dir=tmp_path / "one", **settings)
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, "loss", math.nan, {1, 2})
        run(whole, ROWS)
    config = make_config("stopped", cache__dir=tmp_path / "two", **settings)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            assert live.stop is not None
            live.stop.request()

    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, "loss", math.nan, {1, 2})
        with pytest.raises(Stopped):
            train(config, rows=ROWS, on_log=stop)
        run(config, ROWS)
    assert_same_run(whole.output_dir, config.output_dir)


def test_hazard_25_more_processes_than_gpus(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    refuse(make_config(device="cuda"), "process 3 on a machine of 2 GPUs; each takes one: start fewer")


def test_hazard_26_too_little_memory_for_the_weights(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda _device: 1000)
    refuse(make_config(), r"cpu has 0\.0 GiB of memory; weights, gradients and optimiser of this model take")
