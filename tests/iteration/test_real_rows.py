"""Two iterations on real rows: what is trained on is what ranker and files say, row by row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selm_fast.iteration.job import read_manifest
from selm_fast.iteration.paths import Paths

from ..training.harness import read_metrics
from .harness import MakeRun, do_stages, lines, shards

RANKER = """
def score(prompts, candidates):
    return [[len(text) % 500 // 200 for text in texts] for texts in candidates]
"""
NUM_PROMPTS, NUM_HELD_OUT, MAX_LENGTH = 28, 9, 256


def score(text: str) -> int:
    """As RANKER, of one text: 0, 1 or 2."""
    return len(text) % 500 // 200


@pytest.fixture
def real_data() -> Path:
    """Folder of real preference rows beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "offline_train.jsonl").is_file():
        pytest.skip("no real rows beside the repository")
    return folder


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A random model for the tokenizer of these rows."""
    config = LlamaConfig(
        vocab_size=16384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_two_iterations_on_real_rows(make_run: MakeRun, real_data: Path, small_model: Path, tmp_path: Path) -> None:
    for name, count in (("train", NUM_PROMPTS), ("test", NUM_HELD_OUT)):
        text = (real_data / f"offline_{name}.jsonl").read_text("utf-8")
        (tmp_path / f"{name}.jsonl").write_text("".join(text.splitlines(keepends=True)[:count]), "utf-8")
    (tmp_path / "by_length.py").write_text(RANKER)
    config = make_run(
        model__path=str(small_model),
        model__tokenizer=str(real_data / "tokenizer"),
        data={
            "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "test.jsonl"), "max_length": MAX_LENGTH,
            "max_prompt_length": 128, "max_cut": 1.0,
        },
        ranker="python:by_length:score", batch={"groups": 8, "max_tokens": 2048}, optim={"lr": 1e-3},
        rollout={"max_new_tokens": 12, "max_tokens": 2048, "shard_prompts": 8}, rank={"max_skipped": 0.5},
    )  # fmt: skip
    do_stages(config)
    paths = Paths(config)
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizer")
    sources = {"rows": lines(tmp_path / "train.jsonl"), "held_out": lines(tmp_path / "test.jsonl")}
    seen: set[int] = set()
    for number in (1, 2):
        manifest = read_manifest(paths.stage(number, "rank"))
        assert manifest is not None
        said = {
            "rows": shards(paths.stage(number, "rollout"), "policy"),
            "held_out": shards(paths.stage(number - 1, "evaluate"), "policy"),
        }
        assert [len(found) for found in said.values()] == [NUM_PROMPTS // 2, NUM_HELD_OUT]
        seen |= {line["row"] for line in said["rows"]}
        for kind, responses in said.items():
            found = {line["row"]: line for line in lines(paths.stage(number, "rank") / f"{kind}.jsonl")}
            counts = manifest["counts"] if kind == "rows" else manifest["counts"]["held_out"]
            check_rows(found, responses, sources[kind], tokenizer, counts)
        first = next(line for line in read_metrics(paths.stage(number, "train")) if "loss" in line)
        assert first["loss"] == pytest.approx(0.6931471805599453, abs=0)
    assert seen == set(range(NUM_PROMPTS))


def check_rows(
    found: dict[int, dict[str, Any]],
    responses: list[dict[str, Any]],
    source: list[dict[str, Any]],
    tokenizer: Any,
    counts: dict[str, Any],
) -> None:
    """Check ranked rows and their counts against responses, the rows they belong to, and transformers' tokenizer."""
    tied, aliases, best = 0, Counter[str](), Counter[str]()
    for line in responses:
        row, response = source[line["row"]], line["responses"][0]
        prompt = tokenizer.apply_chat_template(row["chosen"][:-1], add_generation_prompt=True, return_dict=False)
        assert line["prompt_ids"] == (prompt if len(prompt) <= 128 else [prompt[0], *prompt[-127:]])  # BOS stays
        candidates = {"response 1": (score(response["text"]), response["ids"])}
        for name in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row[name], return_dict=False)
            assert whole[: len(prompt)] == prompt
            ids = whole[len(prompt) : -1]  # the template ends a turn with a newline
            candidates[f"offline {name}"] = score(row[name][-1]["content"]), ids[: MAX_LENGTH - len(line["prompt_ids"])]
        scores = [value for value, _ in candidates.values()]
        if max(scores) == min(scores):
            tied += 1
            assert line["row"] not in found
            continue
        ranked = found[line["row"]]
        assert ranked["prompt_ids"] == line["prompt_ids"]
        assert ranked["scores"] == scores
        for which, value in (("chosen", max(scores)), ("rejected", min(scores))):
            assert candidates[ranked[f"{which}_is"]] == (value, ranked[f"{which}_ids"])
            assert ranked[f"score_{which}"] == value
            aliases[which] += ranked["reference_response_ids"] == ranked[f"{which}_ids"]
        assert ranked["reference_response_ids"] == response["ids"]
        best[ranked["chosen_is"]] += 1
    assert 0 < tied < len(responses)
    assert len(found) == len(responses) - tied == counts["groups"]
    assert counts["skipped"] == {"all scores tie": tied}
    assert counts["chosen_is"] == best
    assert (counts["explored_is_chosen"], counts["explored_is_rejected"]) == (aliases["chosen"], aliases["rejected"])
    assert aliases["rejected"] > 0
