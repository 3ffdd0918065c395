"""Mutants of PairRM: rows, batches, the encoder and the scores."""

from __future__ import annotations

from tests.mutants.mutant import mutants_of

PAIRRM = [
    *mutants_of(
        "selm_fast/pairrm/ranker.py",
        "tests/pairrm/test_ranker.py tests/pairrm/test_blender.py",
        ("both orders are added", "other)] - logits[Pair(prompt, other, text)]", "other)] + logits[Pair(prompt, other, text)]"),
        ("the better one loses", "logits[Pair(prompt, text, other)] - logits[Pair(prompt, other, text)]", "logits[Pair(prompt, other, text)] - logits[Pair(prompt, text, other)]"),
        ("the mean is over the others", "/ len(texts) for text in texts]", "/ max(1, len(texts) - 1) for text in texts]"),
        ("logits go to the rows in their order of coming", "found[index] = logit", "found[found.index(0.0)] = logit"),
    ),
    *mutants_of(
        "selm_fast/pairrm/rows.py",
        "tests/pairrm/test_rows.py",
        ("a candidate may have all that is left over", "(self.source - source) // 2", "(self.source - source)"),
        ("nothing is left over", "self.candidate + (self.source - source) // 2", "self.candidate"),
        ("added tokens are not counted", "ADDED: Final = 3", "ADDED: Final = 2"),
        ("the prefixes of both candidates are one", "second = self._part(2, right[:most])", "second = self._part(1, right[:most])"),
        ("prefixes stay in texts", "for text in (*PREFIXES, \"[SEP]\")", "for text in (\"[SEP]\",)"),
        ("full-width prefixes stay", "id for id in ids if id not in self.prefix_ids", "id for id in ids if id != self.prefix_ids[0] and id != self.prefix_ids[3]"),
        ("texts are tokenised without their prefix", "[prefix + text for text in cleaned]", "[prefix + text.strip() for text in cleaned]"),
        ("saved truncation stays", "        self._tokenizer.no_truncation()\n", ""),
    ),
    *mutants_of(
        "selm_fast/pairrm/batches.py",
        "tests/pairrm/test_batches.py",
        ("the area is that of tokens", "rows * longest**2 > max_area", "rows * longest > max_area"),
        ("the shortest rows set the width", "key=lambda index: -lengths[index]", "key=lambda index: lengths[index]"),
    ),
    *mutants_of(
        "selm_fast/pairrm/deberta.py",
        "tests/pairrm/test_ranker.py",
        ("padding is attended to", "scores.masked_fill_(padding, -torch.inf)", "pass"),
        ("two terms are scaled", "math.sqrt(3 * head_size)", "math.sqrt(2 * head_size)"),
        ("keys look the other way", "found[places[:, None] - places + length - 1]", "found[places - places[:, None] + length - 1]"),
        ("far tokens share one position", "make_log_bucket_position(distances, encoder.position_buckets, encoder.max_relative_positions).long()", "distances"),
        ("positions ask with the scale of contents alone", "queries * scale(queries.shape[-1])", "queries"),
        ("the last layer reads positions of the first places", "buckets[places].unsqueeze(1)", "buckets[: places.shape[1]][None, None]"),
    ),
    *mutants_of(
        "selm_fast/pairrm/encoder.py",
        "tests/pairrm/test_blender.py tests/pairrm/test_checkpoint.py",
        ("the head reads the candidate first", "torch.cat([source, left], 1)", "torch.cat([left, source], 1)"),
        ("what is too much is ignored", "for name in tensors if name not in expected]", "for name in tensors if not name]"),
    ),
]  # fmt: skip
