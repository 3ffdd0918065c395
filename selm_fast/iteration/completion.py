"""The wording of a completion: what a server is asked, in the richest form it takes, and what its answer means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from selm_fast.data.tokenizer import Tokenizer
from selm_fast.iteration.http_json import Failed
from selm_fast.iteration.shards import LENGTH, STOP, Response, Sampling


class WrongServer(Exception):
    """A server answers and cannot be used: it reads other prompts than it is sent, or answers with other tokens."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a server is asked.

    ids: by token ids, else by text.  vllm: with the settings that vLLM and SGLang have beside OpenAI's, the ids of the
    answer among what is asked for.  transformers: with those of `transformers serve`, which samples only where its own
    setting says so.
    """

    ids: bool
    vllm: bool = False
    transformers: bool = False


# The richest first: a server is asked in the first one that it does not reject.
FORMS: Final = (Form(ids=True, vllm=True), Form(ids=True), Form(ids=False, transformers=True), Form(ids=False))


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, as token ids, for one response."""

    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    max_tokens: int


def as_text(prompt: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """The text that a server's tokenizer reads as these ids, None where there is none.

    A special token that somebody has typed, or a text cut inside a character, has ids that no text comes back to.
    """
    start = len(tokenizer.prefix_ids)
    if tuple(prompt[:start]) != tokenizer.prefix_ids:
        return None  # the server's tokenizer would put it there
    text = tokenizer.hf.backend_tokenizer.decode(list(prompt[start:]), skip_special_tokens=False)
    again = tokenizer.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return text if again == list(prompt[start:]) else None


def body(question: Question, prompt: list[int] | str, model: str, form: Form, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The request of one completion.  prompt: the question's, or its text."""
    sampling = question.sampling
    found: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": question.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": question.seed,
    }
    if form.vllm:
        # A model's own generation_config.json may ask for penalties or a top_k that nobody here asked for.
        found |= {
            "return_token_ids": True, "stop_token_ids": list(eos_ids), "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0,
        }  # fmt: skip
    if form.transformers:
        own: dict[str, Any] = {  # what is left out is taken from the model's own file here too
            "max_new_tokens": question.max_tokens, "eos_token_id": list(eos_ids), "num_beams": 1,
            "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0,
        }  # fmt: skip
        own |= {"do_sample": False} if sampling.temperature == 0 else {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0
        }  # fmt: skip
        found["generation_config"] = json.dumps(own | {"pad_token_id": eos_ids[0]})
    return found


def response_of(
    answer: Any, question: Question, eos_ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int
) -> Response:
    """The response in a server's answer, its ids ending with the EOS that ended it.

    vocab_size: of the model, which may be larger than the tokenizer's.

    Raises Failed where the answer is none; WrongServer where it is one to another prompt, or of another tokenizer.
    """
    try:
        (choice,) = answer["choices"]
        finish, text, given = choice["finish_reason"], choice["text"], choice.get("token_ids")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise Failed(f"its answer is no completion: {str(answer)[:80]!r}") from error
    if finish not in (STOP, LENGTH):
        raise Failed(f"the response ended for the reason {finish!r}")
    _check_prompt(answer, choice, question)
    if isinstance(given, list):
        ids = given
        if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise WrongServer(f"it answers with token ids beyond the {vocab_size} of the model: another tokenizer")
    elif isinstance(text, str):
        ids = tokenizer.encode([text])[0]
    else:
        raise Failed(f"its answer has neither text nor ids: {str(answer)[:80]!r}")
    if len(ids) > question.max_tokens:  # as text has other ids than were sampled; what is cut has no end
        ids, finish = ids[: question.max_tokens], LENGTH
    return _ended(ids, finish, choice, eos_ids, tokenizer, not isinstance(given, list))


def _ended(
    ids: list[int], finish: str, choice: dict[str, Any], eos_ids: Sequence[int], tokenizer: Tokenizer, retokenised: bool
) -> Response:
    """Ids up to the first EOS; with one where the server says that the response ended and leaves it out."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    if end is not None:
        return Response(ids[: end + 1], STOP, retokenised)
    if finish == LENGTH:
        return Response(ids, LENGTH, retokenised)
    told = choice.get("stop_reason", choice.get("matched_stop"))  # as vLLM and as SGLang name it
    turn_end = tokenizer.eos_id if tokenizer.turn_end_id is None else tokenizer.turn_end_id
    return Response([*ids, told if isinstance(told, int) and told in eos_ids else turn_end], STOP, retokenised)


def _check_prompt(answer: Any, choice: dict[str, Any], question: Question) -> None:
    """Raise WrongServer where the server says that it has read another prompt."""
    read = choice.get("prompt_token_ids")
    usage = answer.get("usage")
    count = len(read) if isinstance(read, list) else usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if isinstance(count, int) and count != len(question.prompt):
        raise WrongServer(
            f"it reads {count} tokens where the prompt has {len(question.prompt)}: another tokenizer, or a BOS too many"
        )
    if isinstance(read, list) and read != list(question.prompt):
        raise WrongServer("it has read another prompt than it was sent")
