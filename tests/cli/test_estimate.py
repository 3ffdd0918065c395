"""`selm-fast estimate`: a table of memory, hours, a verdict, and advice that may be pasted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory_table import MODELS
from selm_fast.cli.estimate import Asked, estimate_arguments
from selm_fast.cli.main import main
from selm_fast.config import Config, RunConfig
from selm_fast.errors import Refused

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A bare config.json of Llama-3-8B."""
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({"model_type": "llama"} | MODELS["Llama-3-8B"]))
    return str(path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def row(out: str, name: str) -> list[float]:
    """GiB of a part: load, reference pass, step, optimiser."""
    (line,) = [line for line in out.splitlines() if line.startswith(name.ljust(14))]
    return [float(cell) for cell in line[14:].split()]


def test_what_fits_is_0(llama: str, capsys) -> None:
    assert main(["estimate", "--model.init", llama, "--nproc=8", "--model.activation_checkpointing", "full"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Estimates, not measurements.\nmodel: 8,030,261,248 parameters, bf16 compute\n")
    assert "place: 8 GPUs of 79.0 GiB each (assumed, for this machine has no GPU" in out
    assert "rows: assumed to be like UltraFeedback's, for data.train is not set" in out
    shard = 8.030261248e9 * 4 / 8 / 2**30
    assert row(out, "masters") == [round(shard, 2)] * 4
    assert row(out, "moments") == [0, 0, round(2 * shard, 2), round(2 * shard, 2)]
    parts = [row(out, name) for name in ("masters", "gradients", "moments", "gathered", "reduced", "activations")]
    parts += [row(out, name) for name in ("head", "layer", "attention", "runtime")]
    assert row(out, "total") == pytest.approx([sum(column) for column in zip(*parts, strict=True)], abs=0.06)
    assert f"disk: {8.030261248e9 * 12 / 2**30:.1f} GiB a checkpoint, 15.0 GiB the exported model" in out
    assert re.search(r"speed: [\d.]+ groups/s, [\d,]+ tokens/s at 40% of 790.0 TFLOP/s each \(assumed", out)
    assert "of training on every 10,000 rows" in out
    assert "\nit fits: " in out and out.endswith("of 79.0 GiB (95% of them are planned with)\n")


def test_what_does_not_fit_is_2_and_the_advice_may_be_pasted(llama: str, capsys) -> None:
    asked = ["estimate", "--model.init", llama, "--memory", "139"]
    assert main(asked) == 2
    out, err = capsys.readouterr()
    assert "\nit does not fit: " in out
    assert re.search(r"\n  optim\.moments bfloat16 -> \d+\.\d GiB: fits\n$", out)
    assert err.startswith("error: training would not fit as it is set; it does with --model.activation_checkpointing")
    assert main([*asked, *shlex.split(err.partition("it does with ")[2])]) == 0


def test_what_cannot_fit_says_so(llama: str, capsys) -> None:
    assert main(["estimate", "--model.init", llama, "--memory", "8"]) == 2
    out, err = capsys.readouterr()
    assert out.endswith(": does not fit yet\n")
    assert err == (
        "error: training would not fit, whatever is set: take a smaller model, or more or larger GPUs\n"
    )  # fmt: skip


def test_rows_on_disk_are_counted_and_speed_is_as_given(llama: str, tmp_path: Path, capsys) -> None:
    rows = [
        {"prompt": "p" * 400, "chosen": "c" * 800, "rejected": "r" * 1200, "reference_response": "c" * 800}
        for _ in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["estimate", "--model.init", llama, "--data.train", str(path), "--memory", "500", "--tflops", "1000"]
    assert main([*asked, "--utilisation", "0.5", "--method", "selm", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "rows: 3, prompt 100, response 250 tokens on average, taking 4 characters for a token" in out
    assert "; 599 packed tokens a group" in out  # the explored response is the chosen one
    body, head, attention = 6_979_321_856, 525_336_576, 524_288
    pairs = 99 * 100 / 2 + 2 * (250 * 99 + 250 * 251 / 2)
    seconds = (3 * 2 * body * 599 + 3.5 * attention * pairs + 4 * 2 * head * 500) / 0.5e15
    assert f"speed: {1 / seconds:,.2f} groups/s" in out and "50% of 1,000.0 TFLOP/s each (as given)" in out
    assert f"time: {3 * 2 * seconds:.1f} s of training on 3 rows" in out


def test_a_model_on_disk_on_a_cpu(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    small = ["--batch.max_tokens", "4096", "--tflops", "0.1"]
    assert main(["estimate", "--model.path", str(tmp_path), "--device", "cpu", *small]) == 0
    out = capsys.readouterr().out
    assert "fp32 compute\nplace: 1 process of " in out and "(this machine's memory, shared)" in out
    assert "\ngathered" not in out and "host memory" not in out  # nothing is sharded
    assert main(["estimate", "--model.path", str(tmp_path), "--device", "cpu", "--nproc", "2", *small]) == 0
    out = capsys.readouterr().out
    assert "place: 2 processes of " in out and "\ngathered" in out


def test_recipes_of_train_and_of_run() -> None:
    assert estimate_arguments(["--nproc", "4", "--beta", "0.5"]) == Asked(Config(beta=0.5), 4)
    asked = estimate_arguments(["llama3-8b", "--memory=80", "--batch.max_tokens", "8192"])
    assert isinstance(asked.config, RunConfig) and asked.memory == 80
    assert asked.config.model.activation_checkpointing == "full" and asked.config.batch.max_tokens == 8192


def test_a_recipe_of_train(recipe) -> None:
    asked = estimate_arguments([str(recipe("beta: 0.5\n")), "--model.init", "models/config.json"])
    assert type(asked.config) is Config and asked.config.beta == 0.5
    assert asked.config.model.tokenizer == "models"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "nproc: 0 was given, expected a whole number, at least 1"),
        (["--nproc", "two"], "nproc: 'two' was given, expected a whole number, at least 1"),
        (["--memory", "-1"], "memory: -1.0 was given, expected a finite number, greater than 0"),
        (["--utilisation", "40"], "utilisation: 40.0 was given, expected a share, at most 1"),
        (["--tflops", "inf"], "tflops: inf was given"),
        (["--nproc", "2", "--nproc", "3"], "--nproc is given twice"),
        (["--memroy", "80"], "did you mean --memory?"),
    ],
)
def test_options_out_of_place_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(Refused) as refused:
        estimate_arguments(arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model.path is not set: give the model, or model.init, a config.json"),
        (["--model.path", "nowhere/at-all"], "nowhere/at-all is not on this disk, and an estimate downloads nothing"),
        (["--model.init", "nowhere.json"], "nowhere.json is not on this disk"),
        (["tiny"], "prepare makes this recipe's model: once it is there"),
    ],
)
def test_a_model_that_is_not_at_hand_is_refused(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["estimate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert_of_nobody"}')
    assert main(["estimate", "--model.init", str(tmp_path / "config.json")]) == 2
    assert "has no configuration of a causal language model" in capsys.readouterr().err


def test_a_gpu_of_this_machine_is_measured(llama: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from selm_fast.iteration import facts
    from selm_fast.training import machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 500 * 2**30)
    monkeypatch.setattr(facts, "device_speed", lambda config: facts.Speed("a card", 123e12, 1e12))
    assert main(["estimate", "--model.init", llama]) == 0
    out = capsys.readouterr().out
    assert "500.0 GiB each (a card)" in out and "40% of 123.0 TFLOP/s each (measured, a card)" in out
