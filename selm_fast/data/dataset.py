"""From a source to the token groups of a run, with a report of what was read, left out and worth a warning."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from selm_fast.config import DataConfig
from selm_fast.data.formats import COLUMNS, PreferenceRow, Skipped, parse_row
from selm_fast.data.groups import TokenGroup
from selm_fast.data.sources import Row, RowsDigest, number_rows, read_rows
from selm_fast.data.tokenize import EXPLORED_CUT, Tokenized, cut_to_length, tokenize_rows
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused

DUPLICATES: Final = "duplicate rows"
NO_REFERENCE: Final = "rows without reference_response"
_CHUNK_ROWS: Final = 512  # encoded at once; the encodings of more would take over 100 MB
_MANY_CUT: Final = 0.5


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Token counts of one kind of text: how many texts, and the mean, median, 95th percentile and maximum."""

    count: int
    mean: float
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Iterable[int]) -> LengthStats:
        """The statistics of `lengths`; all zero where there are none."""
        ordered = sorted(lengths)
        if not ordered:
            return cls(0, 0.0, 0, 0, 0)
        last = len(ordered) - 1
        middle, high = ordered[last // 2], ordered[round(0.95 * last)]
        return cls(len(ordered), statistics.fmean(ordered), middle, high, ordered[-1])


@dataclass(frozen=True, slots=True)
class DataReport:
    """What happened to the rows of one source.

    skipped: rows left out, by reason; first_skipped: the first such row of each reason, counted from 1.
    notes: what is worth a warning, counted; warnings: what deserves more than a count.
    packed_tokens: rows of the packed batches that all groups make together, prompts and equal responses taken once.
    """

    source: str
    rows_read: int
    rows_used: int
    skipped: Counter[str]
    first_skipped: dict[str, int]
    notes: Counter[str]
    warnings: tuple[str, ...]
    lengths: dict[str, LengthStats]
    explored_is_chosen: int
    explored_is_rejected: int
    packed_tokens: int

    def histogram(self) -> str:
        """The reasons for skipping, with counts and a row to look at."""
        return _histogram(self.skipped, self.first_skipped)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The groups of one source, in its order; digest: SHA-256 of the rows' content as it was read."""

    groups: list[TokenGroup]
    report: DataReport
    digest: str


@dataclass(slots=True)
class _Tally:
    source: str
    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, int] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str, number: int) -> None:
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, number)


def load_groups(
    source: str | None,
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    vocab_size: int | None = None,
    wants_explored: bool,
) -> Dataset:
    """Read, check, tokenise and truncate all rows of `source`, or `rows` handed over by a Python program.

    config: lengths and limits; tokenizer: may be None where all rows are token ids.
    vocab_size: rows of the model's embedding, None where unknown.
    wants_explored: whether the loss has an exploration term; without it reference_response is not read.
    Raises `Refused` where the source, a row's columns, the tokenizer or the share of unusable rows is not acceptable.
    """
    if (source is None) == (rows is None):
        raise Refused("data: expected either a source (data.train) or rows from Python; give one of them")
    tally = _Tally(source or "rows")
    if tokenizer is not None and vocab_size is not None:
        tokenizer.check_vocabulary(vocab_size)
    digest = RowsDigest()
    numbered = number_rows(rows) if rows is not None else read_rows(tally.source)
    groups: list[TokenGroup] = []
    seen: set[bytes] = set()
    for chunk in _chunks(numbered):
        for _, row in chunk:
            digest.add(row, COLUMNS)
        for number, result in _tokenize_chunk(chunk, config, tokenizer, tally, wants_explored):
            if result.group is None:
                tally.skip(result.skipped or "", number)
                continue
            _check_ids(result.group, tokenizer, vocab_size, f"{tally.source}: row {number}")
            tally.notes.update(result.notes)
            tally.notes[DUPLICATES] += _is_duplicate(result.group, seen)
            groups.append(result.group)
    _check_skipped(tally, config, len(groups))
    warnings = _check_explored(tally, config, groups) if wants_explored else ()
    return Dataset(groups, _report(tally, groups, warnings), digest.hexdigest())


def _chunks(numbered: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    while chunk := list(itertools.islice(numbered, _CHUNK_ROWS)):
        yield chunk


def _tokenize_chunk(
    chunk: Sequence[tuple[int, Row]],
    config: DataConfig,
    tokenizer: Tokenizer | None,
    tally: _Tally,
    wants_explored: bool,
) -> list[tuple[int, Tokenized]]:
    """Parse and tokenise some rows, in order; rows skipped while parsing are tallied here."""
    limits = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    texts: list[PreferenceRow] = []
    results: list[tuple[int, Tokenized | None]] = []
    for number, row in chunk:
        tally.read += 1
        try:
            parsed = parse_row(row, number=number, source=tally.source, wants_explored=wants_explored)
        except Skipped as reason:
            tally.skip(str(reason), number)
            continue
        if isinstance(parsed, TokenGroup):
            results.append((number, cut_to_length(Tokenized(parsed), tokenizer, **limits)))
            continue
        if tokenizer is None:
            raise Refused(f"{parsed.where}: the row is text and there is no tokenizer; give one as model.tokenizer")
        texts.append(parsed)
        results.append((number, None))
    tokenized = iter(tokenize_rows(texts, tokenizer, **limits) if tokenizer is not None else [])
    return [(number, next(tokenized) if result is None else result) for number, result in results]


def _check_ids(group: TokenGroup, tokenizer: Tokenizer | None, vocab_size: int | None, where: str) -> None:
    """Refuse ids that the embedding has no row for."""
    if vocab_size is None:
        return
    for name in ("prompt", "chosen", "rejected", "explored"):
        ids = getattr(group, name)
        if ids and max(ids) >= vocab_size:
            what = f"tokenizer {tokenizer.source}" if tokenizer is not None else "the tokenizer that made them"
            raise Refused(
                f"{where}: {name} has token id {max(ids)}, and the model's embedding has {vocab_size} rows; expected "
                f"ids of the model's own tokenizer: check {what}"
            )


def _is_duplicate(group: TokenGroup, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(digest_size=16)
    for ids in (group.prompt, group.chosen, group.rejected, group.explored or []):
        digest.update(len(ids).to_bytes(8, "little") + array("i", ids).tobytes())
    duplicate = digest.digest() in seen
    seen.add(digest.digest())
    return duplicate


def _check_skipped(tally: _Tally, config: DataConfig, used: int) -> None:
    if tally.read == 0:
        raise Refused(f"{tally.source}: no rows; expected at least one preference row")
    count = sum(tally.skipped.values())
    reasons = _histogram(tally.skipped, tally.first_skipped)
    if used == 0:
        raise Refused(f"{tally.source}: all {tally.read} rows are unusable; correct or replace them:\n{reasons}")
    if count > config.max_skipped * tally.read:
        raise Refused(
            f"{tally.source}: {count} of {tally.read} rows ({count / tally.read:.1%}) are unusable; expected at most "
            f"data.max_skipped = {config.max_skipped:.1%}; correct the rows or raise it:\n{reasons}"
        )


def _check_explored(tally: _Tally, config: DataConfig, groups: Sequence[TokenGroup]) -> tuple[str, ...]:
    """Refuse rows that give the exploration term nothing to work on, or mostly answers without an end."""
    explored = sum(group.explored is not None for group in groups)
    if explored == 0:
        raise Refused(
            f"{tally.source}: no row has a reference_response, which the exploration term needs; add the column (the "
            "reference model's own answer) or use method dpo"
        )
    tally.notes[NO_REFERENCE] += len(groups) - explored
    cut = tally.notes[EXPLORED_CUT]
    share = cut / explored
    text = f"{tally.source}: {cut} of {explored} explored responses ({share:.0%}) have no end: cut at the length limit"
    if share > config.max_cut:
        raise Refused(
            f"{text}; expected at most data.max_cut = {config.max_cut:.0%}; raise data.max_length (now "
            f"{config.max_length}), or the limit of the rollout that made them"
        )
    return (f"{text}; consider a larger data.max_length",) if share > _MANY_CUT else ()


def _report(tally: _Tally, groups: Sequence[TokenGroup], warnings: tuple[str, ...]) -> DataReport:
    explored = [group for group in groups if group.explored is not None]
    lengths = {
        "prompt": LengthStats.of(len(group.prompt) for group in groups),
        "chosen": LengthStats.of(len(group.chosen) for group in groups),
        "rejected": LengthStats.of(len(group.rejected) for group in groups),
        "explored": LengthStats.of(len(group.explored or ()) for group in explored),
    }
    return DataReport(
        source=tally.source,
        rows_read=tally.read,
        rows_used=len(groups),
        skipped=tally.skipped,
        first_skipped=tally.first_skipped,
        notes=+tally.notes,
        warnings=warnings,
        lengths=lengths,
        explored_is_chosen=sum(group.explored == group.chosen for group in explored),
        explored_is_rejected=sum(group.explored == group.rejected for group in explored),
        packed_tokens=sum(group.num_tokens() for group in groups),
    )


def _histogram(skipped: Counter[str], first: Mapping[str, int]) -> str:
    return "\n".join(f"  {count:>7,}  {reason} (first: row {first[reason]})" for reason, count in skipped.most_common())
