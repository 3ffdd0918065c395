"""`selm-fast validate`: shows what training would see, refuses what training would refuse, and needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selm_fast.cli.validate import embedding_rows, validate
from selm_fast.config import Config, ModelConfig
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused

Write = Callable[..., str]


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows whose explored response is in turn the chosen one, the rejected one, and another."""
    found = []
    for number in range(count):
        ask = {"role": "user", "content": f"Why [bold]{number}[/bold]?"}
        chosen, rejected = f"So {number}.", f"No {number}."
        explored = (chosen, rejected, "\x1b[31mred")[number % 3]
        answers = {
            name: [ask, {"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        found.append({"prompt": ask["content"], **answers, "reference_response": explored})
    return found


def config(tokenizer: Tokenizer, train: str | None, **data: Any) -> Config:
    return Config(model=ModelConfig(tokenizer=tokenizer.source), data={"train": train, **data})


def test_output_shows_counts_lengths_tokens_and_aliases(
    chat: Tokenizer, write_rows: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**rows(1)[0], "chosen": []}
    validate(config(chat, write_rows([*rows(), bad]), eval=write_rows(rows(2), "eval.jsonl"), max_skipped=0.5))
    out = capsys.readouterr().out
    for expected in (
        "rows: 9 read, 8 used, 1 skipped",
        "1  empty chosen (first: row 9)",
        "8; 3 are the chosen one, 3 the rejected one (75% need no encoding of their own)",
        "data.eval: ",
        "rows: 2 read, 2 used, 0 skipped",
        "texts by length",
        "######## 8",
        "group of row 1: ",
        "group of row 3: ",
        "not trained:",
        "trained, ends with EOS <|eos|>:",
        "explored: is the chosen response, encoded once",
        "explored: is the rejected response, encoded once",
        "|<|bos|>|<|user|>|",
    ):
        assert expected in out, expected
    assert "group of row 4: " not in out
    assert "Why [bold]0[/bold]?" in out.replace("|", ""), "brackets of the data are no markup"
    assert "\x1b" not in out, "neither colours in a pipe nor control characters of the data"
    assert r"\x1b[31mred" in out.replace("|", "")


def test_a_cut_response_is_shown_as_such(
    chat: Tokenizer, write_rows: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    long = rows(1)[0]
    long["chosen"][1]["content"] = "The sky is blue. " * 200
    validate(config(chat, write_rows([long]), max_length=300, max_prompt_length=100))
    out = capsys.readouterr().out
    assert "trained, no EOS (it was cut):" in out and "1  chosen responses cut by max_length" in out
    assert "more ...|" in out


def test_refusals(chat: Tokenizer, write_rows: Write, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"data\.train is not set"):
        validate(config(chat, None))
    with pytest.raises(Refused, match=r"eval\.jsonl: line 1, byte 1: broken JSON"):
        (tmp_path / "eval.jsonl").write_text("?")
        validate(config(chat, write_rows(rows()), eval=str(tmp_path / "eval.jsonl")))
    path = write_rows([{**row, "reference_response": None} for row in rows()], "none.jsonl")
    with pytest.raises(Refused, match="no row has a reference_response"):
        validate(config(chat, path))
    validate(Config(method="dpo", model=ModelConfig(tokenizer=chat.source), data={"train": path}))


def test_rows_of_ids_need_no_tokenizer(write_rows: Write, capsys: pytest.CaptureFixture[str]) -> None:
    ids = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    validate(Config(method="dpo", data={"train": write_rows([ids])}))
    out = capsys.readouterr().out
    assert "tokenizer: none" in out and "|1|2|" in out and "|3|4|" in out


def test_hazard_11_the_embedding_is_read_from_config_json(chat: Tokenizer, write_rows: Write, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": chat.max_id}))
    model = ModelConfig(path=str(tmp_path), tokenizer=chat.source)
    with pytest.raises(Refused, match=f"embedding has {chat.max_id} rows"):
        validate(Config(model=model, data={"train": write_rows(rows())}))


@pytest.mark.parametrize(
    ("content", "expected"), [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 8}}, 8), ({}, None)]
)
def test_embedding_rows(tmp_path: Path, content: dict[str, Any], expected: int | None) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert embedding_rows(ModelConfig(path=str(tmp_path))) == expected
    assert embedding_rows(ModelConfig(init=path, tokenizer="t")) == expected
    assert embedding_rows(ModelConfig(path="some/name")) is None
    path.write_text("{")
    with pytest.raises(Refused, match=r"config\.json: not readable"):
        embedding_rows(ModelConfig(path=str(tmp_path)))


def test_validate_does_not_import_torch(chat: Tokenizer, write_rows: Write) -> None:
    code = (
        "import sys\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "if 'torch' in sys.modules: sys.exit(77)\n"  # transformers before 5.20 or so brings it along by itself
        "from selm_fast.config import Config\n"
        "from selm_fast.cli.validate import validate\n"
        f"validate(Config(model={{'tokenizer': {chat.source!r}}}, data={{'train': {write_rows(rows())!r}}}))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this transformers imports torch with its tokenizers")
    assert done.returncode == 0, done.stderr
    assert "8 used" in done.stdout
