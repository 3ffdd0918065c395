"""The tokenizer: loaded without torch, checked, and asked what begins a text and what ends a response."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from selm_fast.data.formats import Message
from selm_fast.errors import Refused

_PROBE = "Sentinel7"


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face fast tokenizer and the facts about it that training depends on.

    hf: the tokenizer itself; source: where it came from, for messages.
    eos_id: ends a response where the template ends it with nothing, and every plain-text response.
    turn_end_id: what the chat template puts behind an assistant's text (Llama-3's <|eot_id|>), None where nothing.
    template_problem: why conversational rows cannot be rendered, None where they can.
    """

    hf: PreTrainedTokenizerFast
    source: str
    eos_id: int
    turn_end_id: int | None
    template_problem: str | None
    prefix_ids: tuple[int, ...]  # what the tokenizer's own post-processor puts before a text
    special: dict[str, int] = field(repr=False)  # the special tokens, by their text

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a response."""
        return frozenset({self.eos_id} if self.turn_end_id is None else {self.eos_id, self.turn_end_id})

    @cached_property
    def bos_id(self) -> int | None:
        """The token a text begins with, None where the tokenizer has none."""
        return _token_id(self.hf, "bos_token")

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the text of any special token or end token, the longest first."""
        texts = sorted({*self.special, *self.eos_texts}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @cached_property
    def eos_texts(self) -> tuple[str, ...]:
        """The tokens that end a response, as text."""
        return tuple(str(self.hf.convert_ids_to_tokens(i)) for i in sorted(self.eos_ids))

    @cached_property
    def max_id(self) -> int:
        """The largest token id there is."""
        return max(self.hf.get_vocab().values())

    @cached_property
    def _ints(self) -> tuple[int, ...]:
        return tuple(range(self.max_id + 1))

    def render(self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool) -> list[str]:
        """Conversations through the chat template, in transformers' sandbox; whatever the template raises passes."""
        rendered: Any = self.hf.apply_chat_template(
            [list(messages) for messages in conversations], tokenize=False, add_generation_prompt=generation_prompt
        )
        return list(rendered)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added.

        The ids are shared int objects: 8 bytes a token instead of 36, 1.7 GB less for 60,000 groups.
        """
        encodings = self.hf.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(map(self._ints.__getitem__, encoding.ids)) for encoding in encodings]

    def encode_literally(self, text: str) -> list[int] | None:
        """Token ids of the text of a special token, spelt out as plain text; None where that cannot be done.

        The pipeline runs without its added tokens, which are what turns such text into one control token.
        """
        backend = self.hf.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [text]
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for piece in pieces for token in backend.model.tokenize(piece)]
        return None if not self.eos_ids.isdisjoint(ids) or not set(self.special.values()).isdisjoint(ids) else ids

    def strip_eos(self, text: str) -> str:
        """The text of a response without the end tokens that are spelt at its end already."""
        while (stripped := text.rstrip()).endswith(self.eos_texts):
            text = next(stripped.removesuffix(eos) for eos in self.eos_texts if stripped.endswith(eos))
        return text

    def digest(self) -> str:
        """SHA-256 of what decides which ids a text becomes: pipeline, vocabulary, chat template, special tokens."""
        pipeline = json.loads(self.hf.backend_tokenizer.to_str())
        pipeline.pop("truncation", None)
        pipeline.pop("padding", None)
        special = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        content = {"pipeline": pipeline, "chat_template": self.hf.chat_template, "special_tokens": special}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a tokenizer whose vocabulary does not fit an embedding of `vocab_size` rows (a larger one is fine).

        Added tokens that no text contains may lie outside (Gemma 3 ships one), so rows are checked on their own.
        """
        largest = max(self.hf.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        largest = max(largest, *self.eos_ids, *self.prefix_ids)
        if largest >= vocab_size:
            raise Refused(
                f"tokenizer {self.source}: has token id {largest}, and the model's embedding has {vocab_size} rows; "
                "expected the model's own tokenizer: check model.tokenizer"
            )


def load_tokenizer(source: str) -> Tokenizer:
    """Load a tokenizer from a folder with tokenizer.json or by its hub name; never runs code that comes with it.

    Raises `Refused` where it cannot be loaded or has no token that ends a response.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise Refused(
            f"tokenizer {source}: the folder has no tokenizer.json; expected a fast tokenizer: "
            f"AutoTokenizer.from_pretrained({source!r}).save_pretrained({source!r}) writes one"
        )
    try:
        hf = PreTrainedTokenizerFast.from_pretrained(
            str(folder) if folder.is_dir() else source, trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, and bare Exceptions from the Rust side
        raise Refused(
            f"tokenizer {source}: cannot be loaded ({str(error).splitlines()[0] if str(error) else error!r}); "
            "expected a folder with tokenizer.json or the name of one on the hub"
        ) from error
    return inspect_tokenizer(hf, source)


def inspect_tokenizer(hf: PreTrainedTokenizerFast, source: str = "tokenizer") -> Tokenizer:
    """Find out how a tokenizer begins texts and ends responses, and whether its chat template works.

    Raises `Refused` where it has no token that ends a response.
    """
    backend = hf.backend_tokenizer
    backend.no_truncation()  # tokenizer.json may bring a limit of its own
    backend.no_padding()
    turn_end_id, problem = _probe_template(hf)
    eos_id = _token_id(hf, "eos_token")
    if eos_id is None:
        eos_id = turn_end_id
    if eos_id is None:
        raise Refused(
            f"tokenizer {source}: has no eos_token and its chat template ends the assistant's turn with none; expected "
            "a token that ends a response: set eos_token in tokenizer_config.json"
        )
    special = {token.content: i for i, token in hf.added_tokens_decoder.items() if token.special}
    bare = backend.encode(_PROBE, add_special_tokens=False).ids
    dressed = backend.encode(_PROBE, add_special_tokens=True).ids
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return Tokenizer(hf, source, eos_id, turn_end_id, problem, tuple(dressed[:start]), special)


def _probe_template(hf: PreTrainedTokenizerFast) -> tuple[int | None, str | None]:
    """What follows an assistant's text in the template, or what is wrong with the template."""
    if hf.chat_template is None:
        return None, "the tokenizer has no chat template; add chat_template.jinja to its folder, or use plain-text rows"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(hf.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template may raise anything
        return None, f"the chat template cannot render a user's and an assistant's turn ({error!r}); correct it"
    before, found, after = text.rpartition(_PROBE)
    if not found:
        return None, "the chat template does not render the assistant's text; correct it"
    backend = hf.backend_tokenizer
    bos_id = _token_id(hf, "bos_token")
    if bos_id is not None and backend.encode(before, add_special_tokens=False).ids[:2] == [bos_id, bos_id]:
        return None, "the chat template begins with two BOS tokens; take one out of it"
    tail = backend.encode(after, add_special_tokens=False).ids
    return next((token for token in tail if token in hf.added_tokens_decoder), None), None


def _token_id(hf: PreTrainedTokenizerFast, name: str) -> int | None:
    """Id of a named token, None where the tokenizer does not have it."""
    text: Any = getattr(hf, name)
    found: int | None = None if text is None else hf.backend_tokenizer.token_to_id(str(text))
    return found
