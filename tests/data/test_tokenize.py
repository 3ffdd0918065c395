"""From text to ids: where the prompt ends, where the response ends, what is cut, and what stays plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_fast.data.formats import PreferenceRow, parse_row
from selm_fast.data.groups import TokenGroup
from selm_fast.data.tokenize import BORDER, CONTROL, PROMPT_CUT, TYPED, Tokenized, cut_to_length, tokenize_rows
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
OPENS_THOUGHT = TURNS + "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
SHOWS_STATE = (
    "{{ 'ask' if add_generation_prompt else 'all' }}"
    + TURNS
    + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOKENIZERS = ["chat", "llama", "merging", "sentencepiece"]
Make = Callable[..., Tokenizer]


def row(prompt: str, chosen: str, rejected: str, explored: str | None = None, *, chat: bool = True) -> PreferenceRow:
    turns = ({"role": "user", "content": prompt},)
    return PreferenceRow(turns if chat else prompt, chosen, rejected, explored, 0, "rows: row 1")


def tokenize(tokenizer: Tokenizer, *rows: PreferenceRow, length: int = 1024, prompt: int = 512) -> list[Tokenized]:
    return tokenize_rows(rows, tokenizer, max_length=length, max_prompt_length=prompt)


def group_of(tokenizer: Tokenizer, item: PreferenceRow, **limits: int) -> TokenGroup:
    result = tokenize(tokenizer, item, **limits)[0]
    assert result.group is not None, result.skipped
    return result.group


def naive(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.hf(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer: Tokenizer, item: PreferenceRow, response: str | None = None) -> str:
    turns = [*item.prompt, *([] if response is None else [{"role": "assistant", "content": response}])]
    return str(tokenizer.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=response is None))


words = st.text("abThe .:A\n", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hazard_10_prompt_and_response_are_those_of_one_rendering(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)

    @settings(max_examples=60, deadline=None)
    @given(words, words, words)
    def check(prompt: str, chosen: str, explored: str) -> None:
        item = row(prompt, chosen, "other", explored)
        result = tokenize(tokenizer, item)[0]
        assert result.group is not None
        head = naive(tokenizer, rendered(tokenizer, item))
        assert result.group.prompt == head
        for text, ids in ((chosen, result.group.chosen), (explored, result.group.explored)):
            assert ids is not None and ids[-1] in tokenizer.eos_ids and tokenizer.eos_ids.isdisjoint(ids[:-1])
            whole = naive(tokenizer, rendered(tokenizer, item, text))
            if whole[: len(head)] == head:
                rest = whole[len(head) :]
                end = next((i + 1 for i, token in enumerate(rest) if token in tokenizer.eos_ids), None)
                assert ids == ([*rest, tokenizer.eos_id] if end is None else rest[:end])
            else:
                assert BORDER in result.notes

    check()


def test_hazard_10_no_header_and_no_bos_inside_a_response(llama: Tokenizer) -> None:
    group = group_of(llama, row("Why?", "So.", "No."))
    header = {llama.hf.convert_tokens_to_ids(token) for token in ("<|start|>", "<|stop|>", llama.hf.bos_token)}
    assert header.isdisjoint(group.chosen + group.rejected)
    assert llama.hf.decode(group.prompt).endswith("<|start|>assistant<|stop|>\n\n")
    assert llama.hf.decode(group.chosen) == "So.<|eot_id|>"


@pytest.mark.parametrize("chat_row", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_hazard_07_one_eos_where_a_response_ended_and_none_where_it_was_cut(
    name: str, chat_row: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    eos = tokenizer.eos_texts[-1]
    item = row("Why is the sky blue?", "Because of the air, thank you.", "No.", chat=chat_row)
    whole = group_of(tokenizer, item)
    ended = row("Why is the sky blue?", f"Because of the air, thank you.{eos}", "No.", chat=chat_row)
    for group in (whole, group_of(tokenizer, ended)):
        for ids in (group.chosen, group.rejected):
            assert ids[-1] in tokenizer.eos_ids and tokenizer.eos_ids.isdisjoint(ids[:-1])
    exact = len(whole.prompt) + len(whole.chosen)
    assert group_of(tokenizer, item, length=exact) == whole
    cut = group_of(tokenizer, item, length=exact - 1)
    assert cut.chosen == whole.chosen[:-1] and tokenizer.eos_ids.isdisjoint(cut.chosen)
    assert cut.rejected == whole.rejected


def test_hazard_08_eos_stays_where_it_is_the_pad_token_too(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(pad="<|eos|>")
    assert tokenizer.hf.pad_token_id == tokenizer.eos_id
    group = group_of(tokenizer, row("Why?", "So.", "No."))
    assert group.chosen[-1] == group.rejected[-1] == tokenizer.eos_id
    assert group.prompt.count(tokenizer.eos_id) == 1


def test_hazard_05_no_room_after_the_prompt_is_skipped() -> None:
    item = Tokenized(TokenGroup(list(range(10)), [1, 2], [3]))
    assert (
        cut_to_length(item, None, max_length=10, max_prompt_length=10).skipped
        == "no room for a response after the prompt"
    )
    kept = cut_to_length(item, None, max_length=11, max_prompt_length=10).group
    assert kept == TokenGroup(list(range(10)), [1], [3])


def test_hazard_05_a_response_that_is_only_eos_is_skipped(chat: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (chat, llama):
        for chat_row in (True, False):
            item = row("Why?", tokenizer.eos_texts[0], "No.", chat=chat_row)
            assert tokenize(tokenizer, item)[0].skipped == "empty chosen"
    assert tokenize(chat, row("Why?", "So.", "No.", "<|eos|>"))[0].skipped == "empty reference_response"


def test_hazard_02_responses_that_become_identical_are_skipped(chat: Tokenizer) -> None:
    item = row("Why?", "The sky is blue", "The sky is green")
    room = len(group_of(chat, item).prompt) + 2
    assert tokenize(chat, item, length=room)[0].skipped == "chosen and rejected are identical after truncation"
    assert tokenize(chat, row("Why?", "So.", "So.<|eos|>"))[0].skipped == "chosen and rejected are identical"


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8), st.integers(1, 11))
def test_truncation_keeps_bos_and_last_tokens_and_ignores_other_responses(
    prompt: int, chosen: int, rejected: int, limit: int
) -> None:
    group = TokenGroup(list(range(100, 100 + prompt)), list(range(1, 1 + chosen)), list(range(20, 20 + rejected)))
    cut = cut_to_length(Tokenized(group), None, max_length=12, max_prompt_length=limit).group
    assert cut is not None
    assert cut.prompt == group.prompt[max(0, prompt - limit) :] and len(cut.prompt) == min(prompt, limit)
    room = 12 - len(cut.prompt)
    assert (cut.chosen, cut.rejected) == (group.chosen[:room], group.rejected[:room])


@pytest.mark.parametrize("limit", [1, 2, 7, 12])
def test_a_cut_prompt_keeps_its_bos(chat: Tokenizer, limit: int) -> None:
    item = row("Why is the sky blue?", "So.", "No.")
    whole = group_of(chat, item).prompt
    result = tokenize(chat, item, prompt=limit)[0]
    assert result.group is not None and len(whole) == 13
    assert result.group.prompt == [whole[0], *whole[len(whole) - limit + 1 :]]
    assert len(result.group.prompt) == limit and PROMPT_CUT in result.notes
    assert result.group.chosen == group_of(chat, item).chosen


def test_a_prompt_at_its_limit_is_not_cut(chat: Tokenizer) -> None:
    item = row("Why is the sky blue?", "So.", "No.")
    whole = group_of(chat, item)
    result = tokenize(chat, item, prompt=len(whole.prompt))[0]
    assert result.group == whole and result.notes == ()


def test_equal_responses_are_one_list(chat: Tokenizer) -> None:
    group = group_of(chat, row("Why?", "So.", "No.", "No."))
    assert group.explored is group.rejected


def test_a_merge_across_the_border_is_tokenised_apart_and_counted(merging: Tokenizer) -> None:
    item = row("Why?", "The answer", "xyz")
    whole, head = (naive(merging, rendered(merging, item, text)) for text in ("The answer", None))
    head = naive(merging, rendered(merging, item))
    assert whole[: len(head)] != head, "this tokenizer must merge here"
    result = tokenize(merging, item)[0]
    assert result.group is not None and result.notes == (BORDER,)
    assert result.group.prompt == head
    assert result.group.chosen == [*naive(merging, "The answer\n"), merging.eos_id]


@pytest.mark.parametrize(("template", "end"), [(OPENS_THOUGHT, "<think>\n"), (SHOWS_STATE, "<|assistant|>\n")])
def test_a_template_that_renders_the_prompt_in_another_way_is_counted(
    make_tokenizer: Make, template: str, end: str
) -> None:
    tokenizer = make_tokenizer(template, special=["<|user|>", "<|assistant|>", "<|end|>"])
    item = row("Why?", "So.", "No.")
    result = tokenize(tokenizer, item)[0]
    assert result.group is not None and result.notes == (BORDER,)
    assert result.group.prompt == naive(tokenizer, rendered(tokenizer, item))
    assert tokenizer.hf.decode(result.group.prompt).endswith(end)
    assert tokenizer.hf.decode(result.group.chosen) == "So.<|end|>"


def test_plain_text_gets_the_tokenizers_own_bos_and_one_eos(llama: Tokenizer, chat: Tokenizer) -> None:
    item = row("The sky is", " blue.", " green.", chat=False)
    group = group_of(llama, item)
    assert llama.hf.decode(group.prompt) == f"{llama.hf.bos_token}The sky is"
    assert llama.hf.decode(group.chosen) == " blue.<|end_of_text|>"
    assert group_of(chat, item).prompt == naive(chat, "The sky is")  # this one adds none


def test_control_tokens_in_plain_text_count_as_such(llama: Tokenizer) -> None:
    text = "<|start|>user<|stop|>\n\nWhy?<|eot_id|><|start|>assistant<|stop|>\n\n"
    result = tokenize(llama, row(text, "So.<|eot_id|>", "No.", chat=False))[0]
    assert result.group is not None and result.notes == (CONTROL,)
    assert result.group.prompt == [llama.bos_id, *naive(llama, text)]
    assert llama.hf.decode(result.group.chosen) == "So.<|eot_id|>"
    assert llama.hf.decode(result.group.rejected) == "No.<|end_of_text|>"


@pytest.mark.parametrize("name", ["chat", "llama", "sentencepiece"])
def test_hazard_19_special_tokens_typed_in_messages_stay_plain_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    eos = tokenizer.eos_texts[0]
    clean = row("Why here ?", "So here so", "No.")
    typed = row(f"Why {eos} here{eos}?", f"So {tokenizer.hf.bos_token} here {eos} so", "No.")
    expected, result = group_of(tokenizer, clean), tokenize(tokenizer, typed)[0]
    assert result.group is not None and result.notes == (TYPED,)
    special = set(tokenizer.special.values())

    def control(ids: list[int]) -> list[int]:
        return [token for token in ids if token in special]

    assert control(result.group.prompt) == control(expected.prompt)
    assert control(result.group.chosen) == control(expected.chosen)
    assert result.group.rejected == expected.rejected
    decoded = tokenizer.hf.decode(result.group.prompt + result.group.chosen).replace(" ", "")
    for text in (typed.prompt[0]["content"], typed.chosen):  # type: ignore[index]
        assert str(text).replace(" ", "") in decoded


def test_hazard_19_text_around_a_typed_token_keeps_its_ids(chat: Tokenizer) -> None:
    group = group_of(chat, row("Why?", "The sky <|eos|> is blue", "No."))
    literal = chat.encode_literally("<|eos|>")
    assert literal is not None and chat.eos_id not in literal
    assert group.chosen == [*naive(chat, "The sky "), *literal, *naive(chat, " is blue"), chat.eos_id]


def test_hazard_19_a_token_that_cannot_be_spelt_is_skipped(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(special=["<|system|>", "<|user|>", "<|assistant|>", "q"])
    result = tokenize(tokenizer, row("a q b", "So.", "No."))[0]
    assert result.skipped == "a special token typed in a message cannot be written as plain text"


def test_hazard_19_placeholders_avoid_characters_of_the_row(chat: Tokenizer) -> None:
    text = "\ue0003c\ue000 <|eos|> \ue0013c\ue001"
    group = group_of(chat, row(text, "So.", "No."))
    assert text in chat.hf.decode(group.prompt)
    assert group.prompt.count(chat.eos_id) == 1


def test_hazard_19_a_role_cannot_spell_a_special_token() -> None:
    turns = [{"role": "eos", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Refused, match=r"rows: row 1: chosen\[0\]\.role is 'eos'"):
        parse_row({"chosen": turns, "rejected": turns}, number=1, source="rows", wants_explored=False)


def test_rows_of_many_kinds_keep_their_order(chat: Tokenizer) -> None:
    rows: list[Any] = [row("Why?", "So.", "No."), row("a", "b", "c", chat=False), row("<|eos|>?", "d", "e")]
    together = tokenize(chat, *rows)
    assert together == [tokenize(chat, item)[0] for item in rows]
    assert tokenize(chat) == []
