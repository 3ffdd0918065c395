"""Text to the rows that PairRM reads.

A row compares two candidates of a prompt:

    [CLS]<|source|>prompt[SEP][CLS]<|candidate1|>left[SEP][CLS]<|candidate2|>right[SEP]

Each of the three parts is cut on its right: the prompt to `source` tokens, a candidate to `candidate` tokens and half
of what the prompt has left over, the three added tokens of the part counted (llm-blender 0.0.2, CrossCompareCollator,
at batch size 1: in larger batches it takes what the longest prompt of the batch has left over).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from selm_fast.errors import Refused

PREFIXES: Final = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
SPECIAL: Final = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}
ADDED: Final = 3  # [CLS], the prefix and [SEP] of a part
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
_MARKS: Final = re.compile("|".join(re.escape(text) for text in (*PREFIXES, "[SEP]")))

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens at most, added ones counted: of the prompt's part, and of a candidate's where the prompt fills its own."""

    source: int = 1224
    candidate: int = 412

    def of_candidate(self, source: int) -> int:
        """Tokens that a candidate's part may have beside a prompt's part of so many."""
        return self.candidate + (self.source - source) // 2


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, and where its three prefixes stand: the prompt's, the left candidate's, the right one's."""

    ids: Ids
    prefixes: tuple[int, int, int]


class RowTokenizer:
    """A checkpoint's own tokenizer.json, unchanged, and the rows that it makes of texts.

    The same that transformers' PreTrainedTokenizerFast holds. Its DebertaV2Tokenizer would drop the precompiled
    character map: "…", "™", full-width letters and ligatures then get other ids.
    """

    def __init__(self, file: Path, limits: Limits) -> None:
        """file: tokenizer.json. Raises Refused where it is not a tokenizer's, or not PairRM's."""
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise Refused(f"{file}: not a tokenizer ({error}); expected the tokenizer.json of a PairRM") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.limits = limits
        found = {text: self._tokenizer.token_to_id(text) for text in (*SPECIAL, *PREFIXES)}
        first = found[PREFIXES[0]] or 0
        expected = SPECIAL | {text: first + nth for nth, text in enumerate(PREFIXES)}
        if found != expected or first <= max(SPECIAL.values()):
            raise Refused(
                f"{file}: its tokens are {found}; expected [PAD] 0, [CLS] 1, [SEP] 2 and four prefixes with ids in a "
                "row: it is not the tokenizer of a PairRM"
            )
        self.prefix_ids: Ids = tuple(expected[text] for text in PREFIXES)
        self.num_ids: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def sources(self, prompts: Sequence[str]) -> list[Ids]:
        """The part of each prompt, whole: [CLS]<|source|>prompt[SEP]."""
        most = self.limits.source - ADDED
        return [self._part(0, ids[:most]) for ids in self._encode(prompts, PREFIXES[0])]

    def candidates(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each candidate, as many as any prompt leaves room for, nothing added."""
        most = self.limits.of_candidate(0) - ADDED
        return [ids[:most] for ids in self._encode(texts, PREFIXES[3])]

    def row(self, source: Ids, left: Ids, right: Ids) -> Row:
        """The row of a prompt's part and of the ids of two candidates."""
        most = self.limits.of_candidate(len(source)) - ADDED
        first = self._part(1, left[:most])
        second = self._part(2, right[:most])
        return Row(source + first + second, (1, len(source) + 1, len(source) + len(first) + 1))

    def num_tokens(self, source: Ids, left: Ids, right: Ids) -> int:
        """Tokens of that row."""
        most = self.limits.of_candidate(len(source)) - ADDED
        return len(source) + sum(min(len(ids), most) + ADDED for ids in (left, right))

    def _part(self, prefix: int, ids: Ids) -> Ids:
        return (SPECIAL["[CLS]"], self.prefix_ids[prefix], *ids, SPECIAL["[SEP]"])

    def _encode(self, texts: Sequence[str], prefix: str) -> list[Ids]:
        """Ids of each text as they are behind its prefix: a tokenizer may treat the beginning of a text as another."""
        cleaned = [clean(text) for text in texts]
        marked = self._tokenizer.encode_batch([prefix + text for text in cleaned], add_special_tokens=False)
        found = []
        for text, encoding in zip(cleaned, marked, strict=True):
            ids = encoding.ids
            if ids[0] not in self.prefix_ids:  # "<|source|>" and U+0338 are "<|source|≯" to a normaliser
                ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            # A prefix in full-width letters is one only after the tokenizer has normalised it.
            found.append(tuple(id for id in ids if id not in self.prefix_ids))
        return found


def clean(text: str) -> str:
    """A text whose prefixes and "[SEP]" are spaces: they would mark parts of the row; half characters become U+FFFD."""
    return _MARKS.sub(" ", _SURROGATE.sub("\ufffd", text))
