"""The README and the pages of docs/ say what is so: snippets run, commands parse, names exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selm_fast.cli.estimate import estimate_arguments
from selm_fast.cli.run import run_arguments
from selm_fast.cli.schema import settings
from selm_fast.cli.settings import load_config, load_run_config, split_recipe
from selm_fast.cli.shipped import find_recipe
from selm_fast.cli.train import train_arguments
from selm_fast.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[list[str]]:
    """Every `selm-fast` command of the README, as words."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("selm-fast ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the snippets name: my-model, rows.jsonl, held_out.jsonl."""
    words = ["yes", "no", "it rains", "the sun shines", "perhaps tomorrow", "ask again"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), num_key_value_heads=2, **shape))
    model.save_pretrained(tmp_path / "my-model")
    fast.save_pretrained(tmp_path / "my-model")
    for name, count in (("rows", 8), ("held_out", 3)):
        rows = [
            {
                "prompt": f"Question {i}: ",
                "chosen": words[i % 6],
                "rejected": words[(i + 1) % 6],
                "reference_response": words[(i + i % 3) % 6],
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    ranker = (
        "def score(prompts, candidates):\n    return [[len(set(text)) for text in texts] for texts in candidates]\n"
    )
    (tmp_path / "my_rewards.py").write_text(ranker, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_python_snippets_run_in_order(folder: Path) -> None:
    assert len(blocks("python")) == 5
    names: dict[str, object] = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert (folder / "runs/python/model/model.safetensors").is_file()
    assert (folder / "runs/recipe/model/model.safetensors").is_file()
    assert "<html" in (folder / "runs/recipe/report.html").read_text("utf-8")
    result = names["result"]
    assert result.steps == 2  # type: ignore[attr-defined]
    assert names["weight"].grad.shape == (1000, 64)  # type: ignore[attr-defined]
    assert next(names["policy"].parameters()).grad is not None  # type: ignore[attr-defined]


def test_command_line_equals_python(folder: Path) -> None:
    from selm_fast.cli.main import main

    flags = "--method selm --beta 0.1 --model.path my-model --data.train rows.jsonl --data.eval held_out.jsonl"
    flags += " --data.max_length 128 --data.max_prompt_length 64 --optim.lr 1e-5 --batch.groups 4"
    assert main(["train", *flags.split(), "--output_dir", "runs/shell"]) == 0
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    shell, python = (folder / "runs" / name / "model/model.safetensors" for name in ("shell", "python"))
    assert shell.read_bytes() == python.read_bytes()


def test_commands_have_settings_that_exist() -> None:
    found = commands()
    assert {words[1] for words in found} == {"run", "report", "validate", "train", "estimate", "export", "doctor"}
    for words in found:
        if words[1] == "run":
            run_arguments(words[2:])
        if words[1] == "train":
            train_arguments(words[2:])
        if words[1] == "estimate":
            estimate_arguments(words[2:])
        if words[1] == "validate":
            recipe, flags = split_recipe(words[2:])
            assert recipe is None
            load_config(None, flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_settings_and_links_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(
        r"`(?:--)?((?:model|data|batch|optim|cache|log|checkpoint|rollout|rank|pairrm|evaluation)\.[a-z_]+)[ `]", text
    ):
        assert name in settings(RunConfig), f"{page.name} names a setting that is not there: {name}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to nothing: {target}"


def measured(benchmark: str) -> tuple[str, dict[str, Any]]:
    """The table that a benchmark makes of its committed results, and these."""
    spec = importlib.util.spec_from_file_location(benchmark, ROOT / f"benchmarks/{benchmark}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text("utf-8"))
    return module.table(results), results


def test_precision_page_holds_what_was_measured() -> None:
    table, results = measured("grid_dither")
    assert table in (ROOT / "docs/precision.md").read_text("utf-8")
    assert all(line["share"] >= 0.95 for line in results["measurements"] if line["dither"])
    assert all(line["share"] < 0.5 for line in results["measurements"] if not line["dither"])


def test_kernels_page_holds_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("ops_table", ROOT / "benchmarks/ops_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((ROOT / "benchmarks/results/ops_amd_epyc.json").read_text("utf-8"))
    page = (ROOT / "docs/kernels.md").read_text("utf-8")
    assert module.table(results) in page
    assert f"torch {results['versions']['torch'].partition('+')[0]})" in page
    assert not results["commit"]["dirty"]
    assert {(run["dtype"], *run["shape"].values()) for run in results["runs"]} == {
        ("fp32", 1024, 2048, 32000),
        ("bf16", 1024, 2048, 32000),
    }
    assert all(target["met"] for run in results["runs"] for target in run["targets"])


def test_readme_holds_what_the_demo_measured() -> None:
    table, results = measured("tiny_seeds")
    assert table in README
    rise = results["rise"]
    said = f"rose by {rise['mean']:.2f} on average, with a spread of {rise['spread']:.2f} between seeds, and by "
    assert f"{said}{rise['least']:.2f} at least." in " ".join(README.split())
    demo = load_run_config(find_recipe("tiny"), [])
    assert [line["seed"] for line in results["measurements"]] == [demo.seed + number for number in range(5)]
    assert results["flags"] == []
    assert max(line["seconds"] for line in results["measurements"]) < 180  # as the README says of the demo
    # "Rises by more than the spread": that of the rise itself, and that of the rewards at either end.
    ends = [[line["reward"][at] for line in results["measurements"]] for at in (0, -1)]
    assert results["rise"]["least"] > max(results["rise"]["spread"], *map(statistics.stdev, ends))


@pytest.mark.parametrize("words", [words for words in commands() if "$DATA/selm_train.jsonl" in words])
@pytest.mark.slow
def test_run_on_real_rows(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's run, whole: it learns, and its first evaluation is ln 2 to the bit."""
    import math

    from selm_fast import train

    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("no real rows beside the project")
    (heredoc,) = re.findall(r"config.json <<'END'\n(.*?)END\n", README, re.S)
    (tmp_path / "config.json").write_text(heredoc, "utf-8")
    monkeypatch.chdir(tmp_path)
    _, flags = split_recipe([word.replace("$DATA", str(data)) for word in words[2:]])
    config = load_config(None, [*flags, "--cache.dir", str(tmp_path / "cache")])
    result = train(config)
    before, after = result.evaluations[0], result.evaluations[result.steps]
    assert before["eval_loss"] == math.log(2)
    assert before["eval_rewards/margins"] == 0.0
    assert after["eval_rewards/margins"] > 0.1
    assert after["eval_rewards/accuracies"] > 0.55
    assert after["eval_loss"] < math.log(2)
