"""Token ids of a row: what is cut where, what of a text becomes a space, and that tokenizer.json is used as it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from selm_fast.errors import Refused
from selm_fast.pairrm.rows import PREFIXES, Limits, Row, RowTokenizer
from tests.pairrm.conftest import SMALL
from tests.pairrm.texts import ODD, text, wide


@pytest.fixture
def file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def row_of(rows: RowTokenizer, prompt: str, left: str, right: str) -> Row:
    (source,) = rows.sources([prompt])
    first, second = rows.candidates([left, right])
    row = rows.row(source, first, second)
    assert rows.num_tokens(source, first, second) == len(row.ids)
    return row


def plainly(tokenizer: Tokenizer, limits: Limits, prompt: str, left: str, right: str) -> list[int]:
    """The row as llm-blender makes it: truncation by the tokenizer itself, added tokens counted."""

    def part(prefix: str, shown: str, given: str, limit: int) -> list[int]:
        for mark in (*PREFIXES, "[SEP]"):
            given = given.replace(mark, " ")
        tokenizer.enable_truncation(limit)
        ids = list(tokenizer.encode(prefix + given).ids)
        tokenizer.no_truncation()
        assert (ids[0], ids[1], ids[-1]) == (1, tokenizer.token_to_id(prefix), 2)
        return [1, tokenizer.token_to_id(shown), *ids[2:]]

    source = part(PREFIXES[0], PREFIXES[0], prompt, limits.source)
    room = limits.candidate + (limits.source - len(source)) // 2
    return source + part(PREFIXES[3], PREFIXES[1], left, room) + part(PREFIXES[3], PREFIXES[2], right, room)


@pytest.mark.parametrize("limits", [SMALL, Limits(source=41, candidate=14), Limits()], ids=str)
def test_rows_are_those_of_the_plain_reference(limits: Limits, tokenizer: Tokenizer, file: Path) -> None:
    rows, drawn = RowTokenizer(file, limits), random.Random(2)
    cut = 0
    for most in [5, 20, 60] * 30 + [1500] * 4:
        texts = [text(drawn, most) for _ in range(3)]
        row = row_of(rows, *texts)
        assert list(row.ids) == plainly(tokenizer, limits, *texts)
        assert [row.ids[place] for place in row.prefixes] == list(rows.prefix_ids[:3])
        assert sum(row.ids.count(id) for id in rows.prefix_ids) == 3
        assert len(row.ids) <= limits.source + 2 * limits.candidate
        cut += len(row.ids) >= limits.source + 2 * limits.candidate - 1
    assert cut


def test_the_limits_of_pairrm() -> None:
    limits = Limits()
    assert (limits.source, limits.of_candidate(1224), limits.of_candidate(3), limits.of_candidate(1223)) == (
        1224, 412, 412 + 610, 412,
    )  # fmt: skip


def test_marks_in_a_text_are_spaces(file: Path) -> None:
    rows = RowTokenizer(file, Limits())
    marked = "how[SEP]did<|candidate1|>she<|source|>look<|candidate|><|candidate2|>"
    assert row_of(rows, marked, marked, "a") == row_of(rows, "how did she look  ", "how did she look  ", "a")


def test_what_a_normaliser_makes_of_a_text_moves_no_prefix(file: Path) -> None:
    """ ">" and U+0338 are one character after NFKC, and a prefix in full-width letters is a prefix."""
    rows = RowTokenizer(file, Limits())
    for odd in ("\u0338 more", wide(PREFIXES[0]) + " more", "so " + wide(PREFIXES[1])):
        row = row_of(rows, odd, odd, odd)
        assert [row.ids[place] for place in row.prefixes] == list(rows.prefix_ids[:3])
        assert sum(row.ids.count(id) for id in rows.prefix_ids) == 3


@pytest.mark.parametrize("odd", ["", "\ud83d", "a\udc00b", "\x00", *ODD], ids=ascii)
def test_odd_texts_have_rows(odd: str, file: Path) -> None:
    assert len(row_of(RowTokenizer(file, Limits()), odd, odd, odd + "a").ids) >= 9


def test_half_a_character_is_the_replacement_character(file: Path) -> None:
    rows = RowTokenizer(file, Limits())
    assert row_of(rows, "a\ud83d", "b", "\udc00") == row_of(rows, "a\ufffd", "b", "\ufffd")


def test_the_character_map_of_the_file_is_used(file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = RowTokenizer(file, Limits())
    assert row_of(rows, "so…", wide("so"), "ﬁne™") == row_of(rows, "so...", "so", "fineTM")
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.Replace("…", "")
    other.save(str(tmp_path / "other.json"))
    rows = RowTokenizer(tmp_path / "other.json", Limits())
    assert row_of(rows, "so…", "a", "b") == row_of(rows, "so", "a", "b")
    assert row_of(rows, "so", wide("so"), "b") != row_of(rows, "so", "so", "b")


def test_truncation_and_padding_that_a_file_was_saved_with_are_put_aside(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    cutting.save(str(tmp_path / "cutting.json"))
    row = row_of(RowTokenizer(tmp_path / "cutting.json", Limits()), "how did she look", "a", "b")
    assert list(row.ids) == plainly(tokenizer, Limits(), "how did she look", "a", "b")


def test_other_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", "utf-8")
    with pytest.raises(Refused, match="not a tokenizer"):
        RowTokenizer(path, Limits())
    for old, new in (("<|candidate|>", "<|candidate3|>"), ("[CLS]", "<s>")):
        path.write_text(tokenizer.to_str().replace(old, new), "utf-8")
        with pytest.raises(Refused, match="not the tokenizer of a PairRM"):
            RowTokenizer(path, Limits())
