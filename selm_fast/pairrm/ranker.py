"""Scores of candidates by PairRM: every pair of a prompt's distinct candidates is compared once in each order.

    score_i = sum_j (C_ij - C_ji) / n

over the n candidates of a prompt, equal ones counted, C_ij the logit that i is better than j (llm-blender 0.0.2,
get_scores_from_cmps, "max_logits"). Equal candidates have C_ij = C_ji, and are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from selm_fast.pairrm.batches import batches
from selm_fast.pairrm.checkpoint import find, load_tokenizer
from selm_fast.pairrm.encoder import PairEncoder, load
from selm_fast.pairrm.rows import SPECIAL, Ids, Row, RowTokenizer

# Bytes of one layer's attention scores, rows x heads x T^2, of which several are held at once. On a CPU larger ones
# come as fresh pages each time: with transformers' own layers 96 rows took 59 s at 2^24, 65 s at 2^25 and 79 s at 2^26
# (384 hidden, 6 layers, one thread).
SCORES_BYTES: Final = {"cpu": 2**24, "cuda": 2**29}


@dataclass(frozen=True, slots=True)
class Pair:
    """A row to come: the texts at `left` and `right` compared as answers to prompt number `prompt`."""

    prompt: int
    left: str
    right: str


class PairRM:
    """A PairRM on one device."""

    def __init__(self, tokenizer: RowTokenizer, encoder: PairEncoder, *, max_tokens: int) -> None:
        """max_tokens: padded tokens of a batch. Raises ValueError where there is no room for any."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; expected 1 or more")
        self._tokenizer = tokenizer
        self.encoder = encoder
        self._max_tokens = max_tokens
        weight = encoder.pretrained_model.embeddings.word_embeddings.weight
        self._device = weight.device
        of_a_pair = encoder.pretrained_model.config.num_attention_heads * weight.itemsize
        self._max_area = SCORES_BYTES.get(self._device.type, SCORES_BYTES["cuda"]) // of_a_pair

    @classmethod
    def from_pretrained(cls, source: str, *, device: torch.device, dtype: torch.dtype, max_tokens: int) -> PairRM:
        """A PairRM's folder or name on the hub. Raises Refused where it is none, with what is wrong with it."""
        checkpoint = find(source)
        tokenizer = load_tokenizer(checkpoint)
        return cls(tokenizer, load(checkpoint, device=device, dtype=dtype), max_tokens=max_tokens)

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Scores of each prompt's candidates, higher is better; exactly equal for equal texts, NaN where a logit is.

        candidates: one or more for each prompt.
        on_rows: told how many rows each batch had (in all `work.num_rows`); what it raises ends the scoring.
        Raises ValueError where a prompt has no candidates.
        """
        if len(prompts) != len(candidates) or not all(candidates):
            raise ValueError(
                f"{len(prompts)} prompts and {len(candidates)} lists of candidates; expected one list for each prompt, "
                "with one candidate or more"
            )
        pairs = [
            Pair(prompt, left, right)
            for prompt, texts in enumerate(candidates)
            for left in dict.fromkeys(texts)
            for right in dict.fromkeys(texts)
            if left != right
        ]
        logits = dict(zip(pairs, self._logits(prompts, pairs, on_rows), strict=True))

        def won(prompt: int, text: str, other: str) -> float:
            if text == other:
                return 0.0
            return logits[Pair(prompt, text, other)] - logits[Pair(prompt, other, text)]

        return [
            [sum(won(prompt, text, other) for other in texts) / len(texts) for text in texts]
            for prompt, texts in enumerate(candidates)
        ]

    def compare(self, prompts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[float]:
        """C of each prompt's pair of candidates, in this order alone: > 0 where the first is the better one."""
        rows = [Pair(prompt, left, right) for prompt, (left, right) in enumerate(pairs)]
        return self._logits(prompts, rows, None)

    def _logits(
        self,
        prompts: Sequence[str],
        pairs: Sequence[Pair],
        on_rows: Callable[[int], None] | None,
    ) -> list[float]:
        """The logit of each pair, as float64 of what the head gives."""
        tokenizer = self._tokenizer
        sources = tokenizer.sources(prompts)
        texts = list(dict.fromkeys(text for pair in pairs for text in (pair.left, pair.right)))
        ids: dict[str, Ids] = dict(zip(texts, tokenizer.candidates(texts), strict=True))
        parts = [(sources[pair.prompt], ids[pair.left], ids[pair.right]) for pair in pairs]
        lengths = [tokenizer.num_tokens(*part) for part in parts]
        found = [0.0] * len(pairs)
        for batch in batches(lengths, max_tokens=self._max_tokens, max_area=self._max_area):
            rows = [tokenizer.row(*parts[index]) for index in batch]
            for index, logit in zip(batch, self._forward(rows), strict=True):
                found[index] = logit
            if on_rows is not None:
                on_rows(len(rows))
        return found

    def _forward(self, rows: Sequence[Row]) -> list[float]:
        longest = max(len(row.ids) for row in rows)
        padded = [row.ids + (SPECIAL["[PAD]"],) * (longest - len(row.ids)) for row in rows]
        lengths = torch.tensor([len(row.ids) for row in rows])
        prefixes = torch.tensor([row.prefixes for row in rows])
        inputs = (tensor.to(self._device) for tensor in (torch.tensor(padded), lengths, prefixes))
        logits: list[float] = self.encoder(*inputs).double().tolist()
        return logits
