"""The tokenizer: what begins a text, what ends a response, what its template does, what changes its digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from selm_fast.config import DataConfig
from selm_fast.data.dataset import Dataset, load_groups
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import Refused

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHAT = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": [{"role": "assistant", "content": "So."}]}
CHAT = {**CHAT, "rejected": [{"role": "assistant", "content": "No."}]}
TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
Make = Callable[..., Tokenizer]


def load(tokenizer: Tokenizer | None, *rows: dict[str, object], vocab_size: int | None = None) -> Dataset:
    return load_groups(None, DataConfig(), tokenizer, rows=rows, vocab_size=vocab_size, wants_explored=False)


def names(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [str(tokenizer.hf.convert_ids_to_tokens(token)) for token in ids]


def test_both_the_turn_end_and_eos_end_a_response(llama: Tokenizer, chat: Tokenizer, merging: Tokenizer) -> None:
    assert set(llama.eos_texts) == {"<|eot_id|>", "<|end_of_text|>"}
    assert llama.hf.convert_ids_to_tokens(llama.turn_end_id) == "<|eot_id|>"
    assert llama.hf.convert_ids_to_tokens(llama.eos_id) == "<|end_of_text|>"
    assert chat.eos_ids == {chat.hf.eos_token_id} and chat.turn_end_id == chat.hf.eos_token_id
    assert merging.turn_end_id is None and merging.eos_ids == {merging.hf.eos_token_id}


def test_the_turn_end_serves_where_no_eos_token_is_named(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = make_tokenizer(template, special=["<|end|>"], eos=None)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.eos_id) == "<|end|>"


def test_a_tokenizer_without_any_end_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(Refused, match="set eos_token"):
        make_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", eos=None)


def test_hazard_09_one_bos_where_template_and_tokenizer_both_add_it(llama: Tokenizer) -> None:
    bos = llama.hf.bos_token_id
    assert llama.prefix_ids == (bos,)
    for row in (CHAT, TEXT, {**TEXT, "prompt": f"{llama.hf.bos_token}{TEXT['prompt']}"}):
        group = load(llama, row).groups[0]
        assert group.prompt[0] == bos and group.prompt.count(bos) == 1, row
        assert bos not in group.chosen + group.rejected


def test_hazard_09_a_template_that_doubles_bos_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + PLAIN)
    with pytest.raises(Refused, match="rows: row 1: conversational, but the chat template begins with two BOS tokens"):
        load(tokenizer, CHAT)
    assert load(tokenizer, TEXT).groups  # plain text needs no template


def test_hazard_11_a_tokenizer_of_another_model_is_refused(chat: Tokenizer) -> None:
    size = chat.max_id + 1
    assert load(chat, CHAT, vocab_size=size).groups
    with pytest.raises(Refused, match=rf"has token id {size - 1}, and the model's embedding has {size - 1} rows"):
        load(chat, CHAT, vocab_size=size - 1)


def test_hazard_11_token_ids_beyond_the_embedding_are_refused() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 10]}
    assert load(None, row, vocab_size=11).groups
    with pytest.raises(Refused, match="rows: row 2: rejected has token id 10, and the model's embedding has 10 rows"):
        load(None, {**row, "rejected_ids": [5]}, row, vocab_size=10)


def test_hazard_11_an_added_token_beyond_the_embedding_is_refused_where_a_row_has_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(special=["<|system|>", "<|user|>", "<|assistant|>"])
    tokenizer.hf.add_tokens(["<image>"])
    size = tokenizer.max_id
    assert load(tokenizer, TEXT, vocab_size=size).groups
    with pytest.raises(Refused, match=f"row 1: prompt has token id {size}"):
        load(tokenizer, {**TEXT, "prompt": "The <image>"}, vocab_size=size)


def test_hazard_12_an_embedding_larger_than_the_tokenizer_is_fine(chat: Tokenizer) -> None:
    assert load(chat, CHAT, vocab_size=chat.max_id + 1000).groups


def test_hazard_20_a_missing_template_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(Refused, match="rows: row 2: conversational, but the tokenizer has no chat template"):
        load(tokenizer, TEXT, CHAT)


def test_hazard_20_a_template_that_raises_is_refused_with_the_row(make_tokenizer: Make) -> None:
    check = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    tokenizer = make_tokenizer(PLAIN.replace("{{ m['content'] }}", check + "{{ m['content'] }}"))
    ask = CHAT["prompt"][0]
    twice = {**CHAT, "prompt": [ask, ask]}
    with pytest.raises(
        Refused, match=r"rows: row 2: the chat template .*must alternate.*\['user', 'user', 'assistant'\]"
    ):
        load(tokenizer, CHAT, twice)


@pytest.mark.parametrize("template", ["{% for %}", "{{ nothing.at.all }}", "{{ bos_token }}silence"])
def test_hazard_20_a_broken_template_is_refused(make_tokenizer: Make, template: str) -> None:
    with pytest.raises(Refused, match="row 1: conversational, but the chat template"):
        load(make_tokenizer(template), CHAT)


def test_hazard_20_templates_run_in_the_sandbox(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endfor %}"
    with pytest.raises(Refused, match="SecurityError"):
        load(make_tokenizer(template), CHAT)


def test_a_folder_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"has no tokenizer\.json; .*save_pretrained"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(Refused, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="cannot be loaded"):
        load_tokenizer("./no/such/folder")


def test_limits_inside_tokenizer_json_do_not_cut_texts(chat: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(chat.source, tmp_path / "limited")
    path = tmp_path / "limited" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert load(load_tokenizer(str(path.parent)), CHAT).groups == load(chat, CHAT).groups


def test_the_digest_follows_everything_that_changes_ids(chat: Tokenizer, make_tokenizer: Make, tmp_path: Path) -> None:
    shutil.copytree(chat.source, tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    copy.hf("some text", truncation=True, max_length=2)
    assert copy.digest() == chat.digest()
    other_template = PreTrainedTokenizerFast.from_pretrained(chat.source, chat_template=PLAIN)
    other_template.save_pretrained(str(tmp_path / "template"))
    other_eos = PreTrainedTokenizerFast.from_pretrained(chat.source, eos_token="<|user|>")
    other_eos.save_pretrained(str(tmp_path / "eos"))
    others = [load_tokenizer(str(tmp_path / name)) for name in ("template", "eos")]
    others.append(make_tokenizer(special=["<|user|>", "<|assistant|>"]))
    assert len({chat.digest(), *(tokenizer.digest() for tokenizer in others)}) == 4


def test_stripping_eos_takes_what_stands_at_the_end_only(llama: Tokenizer) -> None:
    assert llama.strip_eos("so <|eot_id|>\n") == "so "
    assert llama.strip_eos("so<|eot_id|><|end_of_text|> ") == "so"
    assert llama.strip_eos("so<|eot_id|>!\n") == "so<|eot_id|>!\n"
    assert llama.strip_eos("so \n") == "so \n"
