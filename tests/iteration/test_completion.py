"""What an answer of a completion server means: its ids, its end, and whether it is an answer at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.iteration.completion import FORMS, Question, WrongServer, as_text, body, response_of
from selm_fast.iteration.http_json import Failed
from selm_fast.iteration.shards import LENGTH, STOP, Response, Sampling

EOS, OTHER_END = 1, 9
QUESTION = Question([5, 6, 7], Sampling(), 0, max_tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_model))


def read(tokenizer: Tokenizer, usage: Any = None, **choice: Any) -> Response:
    """The response in an answer with this choice."""
    answer = {"choices": [{"text": "unread", "finish_reason": "stop", **choice}], "usage": usage}
    return response_of(answer, QUESTION, [EOS, OTHER_END], tokenizer, tokenizer.max_id + 3)


@pytest.mark.parametrize(
    ("choice", "ids", "finish"),
    [
        ({"token_ids": [20, 21, EOS]}, [20, 21, EOS], STOP),
        ({"token_ids": [20, 21]}, [20, 21, EOS], STOP),  # the end is left out
        ({"token_ids": [20, 21], "stop_reason": OTHER_END}, [20, 21, OTHER_END], STOP),
        ({"token_ids": [20, 21], "matched_stop": OTHER_END}, [20, 21, OTHER_END], STOP),
        ({"token_ids": [20, 21], "stop_reason": 20}, [20, 21, EOS], STOP),  # which is no end
        ({"token_ids": [20, 21], "stop_reason": None}, [20, 21, EOS], STOP),
        ({"token_ids": [20, 21, 22, 23], "finish_reason": "length"}, [20, 21, 22, 23], LENGTH),
        ({"token_ids": [20, OTHER_END, 22], "finish_reason": "length"}, [20, OTHER_END], STOP),
        ({"token_ids": [20, 21, 22, 23]}, [20, 21, 22, 23, EOS], STOP),
        ({"token_ids": [20, 21, 22, 23, 24]}, [20, 21, 22, 23], LENGTH),  # cut here: no end of its own
        ({"token_ids": [20, 21, 22, 23, EOS]}, [20, 21, 22, 23], LENGTH),
        ({"token_ids": []}, [EOS], STOP),
    ],
)  # fmt: skip
def test_ids_and_how_they_end(tokenizer: Tokenizer, choice: dict[str, Any], ids: list[int], finish: str) -> None:
    assert read(tokenizer, **choice) == Response(ids, finish, retokenised=False)  # type: ignore[arg-type]


def test_text_becomes_ids_and_what_is_too_long_of_it_has_no_end(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["no"])
    assert len(ids) < QUESTION.max_tokens
    assert read(tokenizer, text="no") == Response([*ids, EOS], STOP, retokenised=True)
    assert read(tokenizer, text="no", token_ids={}) == Response([*ids, EOS], STOP, retokenised=True)
    (long,) = tokenizer.encode(["0123456789"])
    assert len(long) > QUESTION.max_tokens
    assert read(tokenizer, text="0123456789") == Response(long[: QUESTION.max_tokens], LENGTH, retokenised=True)


def test_nothing_of_the_sampling_is_left_to_the_files_of_the_model() -> None:
    asked = body(QUESTION, [5, 6, 7], "m", FORMS[0], [EOS, OTHER_END])
    assert asked == {
        "model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0, "top_k": -1,
        "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [EOS, OTHER_END], "return_token_ids": True,
    }  # fmt: skip


def test_the_end_that_is_left_out_is_that_of_a_turn(tokenizer: Tokenizer) -> None:
    assert read(replace(tokenizer, turn_end_id=OTHER_END), token_ids=[20]).ids == [20, OTHER_END]


def test_what_a_server_puts_before_a_text_is_not_sent_in_it(tokenizer: Tokenizer) -> None:
    """And a prompt without it has no text."""
    (ids,) = tokenizer.encode(["why not"])
    with_bos = replace(tokenizer, prefix_ids=(0,))
    assert as_text([0, *ids], with_bos) == "why not"
    assert as_text(ids, with_bos) is None


def test_ids_of_the_model_that_the_tokenizer_lacks_may_be_sampled(tokenizer: Tokenizer) -> None:
    """Embeddings are padded (Phi-3, Qwen): their last rows have no token."""
    padded = tokenizer.max_id + 2
    assert read(tokenizer, token_ids=[20, padded, EOS]).ids == [20, padded, EOS]
    assert tokenizer.hf.decode([20, padded, EOS], skip_special_tokens=True) == tokenizer.hf.decode([20])
    with pytest.raises(WrongServer, match="another tokenizer"):
        read(tokenizer, token_ids=[20, padded + 1])


def test_another_prompt_is_told_by_its_ids_or_their_number(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, token_ids=[20], prompt_token_ids=[5, 6, 7]).finish == STOP
    with pytest.raises(WrongServer, match="another prompt"):
        read(tokenizer, token_ids=[20], prompt_token_ids=[5, 6, 8])
    with pytest.raises(WrongServer, match="it reads 4 tokens where the prompt has 3: another tokenizer, or a BOS too"):
        read(tokenizer, token_ids=[20], usage={"prompt_tokens": 4})


@pytest.mark.parametrize("answer", [None, [], "yes", {}, {"choices": []}, {"choices": ["yes"]}, {"choices": [{}, {}]}])
def test_what_is_no_completion(tokenizer: Tokenizer, answer: Any) -> None:
    with pytest.raises(Failed, match="its answer is no completion"):
        response_of(answer, QUESTION, [EOS], tokenizer, 300)
