"""Real preference rows: our ids are those of transformers' own tokenizer, and the sizes are those measured before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selm_fast.config import DataConfig
from selm_fast.data.dataset import load_groups
from selm_fast.data.tokenizer import load_tokenizer


def test_one_iteration_of_selm_packs_to_a_third(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizer"))
    source = str(real_data / "selm_train.jsonl")
    report = load_groups(source, DataConfig(), tokenizer, vocab_size=16384, wants_explored=True).report
    assert (report.rows_read, report.rows_used, dict(report.skipped)) == (705, 705, {})
    aliases = (report.explored_is_chosen + report.explored_is_rejected) / report.rows_used
    assert aliases == pytest.approx(0.68, abs=0.01)
    assert report.packed_tokens == pytest.approx(440_000, rel=0.01)


def test_ids_are_those_of_transformers(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizer"))
    source = real_data / "selm_test.jsonl"
    groups = load_groups(
        str(source), DataConfig(max_length=4096, max_prompt_length=2048), tokenizer, wants_explored=True
    )
    apply = tokenizer.hf.apply_chat_template
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == len(groups.groups) == 100
    for row, group in zip(rows, groups.groups, strict=True):
        prompt = row["chosen"][:-1]
        assert group.prompt == apply(prompt, add_generation_prompt=True, return_dict=False)
        answers = {
            "chosen": row["chosen"][-1]["content"],
            "rejected": row["rejected"][-1]["content"],
            "explored": row["reference_response"],
        }
        for name, text in answers.items():
            whole = apply([*prompt, {"role": "assistant", "content": text}], return_dict=False)
            newline = whole[len(group.prompt) + len(getattr(group, name)) :]
            assert group.prompt + getattr(group, name) == whole[: len(whole) - 1]
            assert tokenizer.hf.decode(newline) == "\n"
