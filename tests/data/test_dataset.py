"""From a source to groups: what is counted, what is warned of, and when so much is wrong that it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_fast.config import DataConfig
from selm_fast.data.dataset import DUPLICATES, NO_REFERENCE, Dataset, LengthStats, load_groups
from selm_fast.data.groups import TokenGroup
from selm_fast.data.tokenize import CHOSEN_CUT, EXPLORED_CUT, REJECTED_CUT, TYPED
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused

IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
Rows = list[dict[str, Any]]
Write = Callable[..., str]


def text(number: int, **columns: Any) -> dict[str, Any]:
    """An UltraFeedback row that no other number gives."""
    ask = {"role": "user", "content": f"Why {number}?"}
    answers = {name: [ask, {"role": "assistant", "content": f"{name} {number}"}] for name in ("chosen", "rejected")}
    return {"prompt": ask["content"], **answers, **columns}


def load(rows: Rows, tokenizer: Tokenizer | None = None, *, wants_explored: bool = False, **config: Any) -> Dataset:
    return load_groups(None, DataConfig(**config), tokenizer, rows=rows, wants_explored=wants_explored)


def test_groups_keep_the_order_and_numbers_of_the_rows(chat: Tokenizer) -> None:
    rows = [text(0), IDS, text(2, chosen=text(2)["rejected"]), text(3), *(text(i) for i in range(4, 600))]
    dataset = load(rows, chat)
    assert [group.row_id for group in dataset.groups] == [0, 1, *range(3, 600)]
    assert dataset.groups[1] == TokenGroup([1, 2], [3], [4], None, 1)
    for index in (0, 2, 550):
        alone = load([rows[dataset.groups[index].row_id or 0]], chat).groups[0]
        assert (alone.prompt, alone.chosen, alone.rejected) == (
            dataset.groups[index].prompt,
            dataset.groups[index].chosen,
            dataset.groups[index].rejected,
        )
    report = dataset.report
    assert (report.rows_read, report.rows_used) == (600, 599)
    assert report.skipped == {"chosen and rejected are identical": 1}
    assert report.first_skipped == {"chosen and rejected are identical": 3}


def test_a_file_and_its_rows_give_the_same(chat: Tokenizer, write_rows: Write) -> None:
    rows = [text(i, reference_response=f"chosen {i}") for i in range(3)]
    source = write_rows(rows)
    from_file = load_groups(source, DataConfig(), chat, wants_explored=True)
    from_rows = load(rows, chat, wants_explored=True)
    assert (from_file.groups, from_file.digest) == (from_rows.groups, from_rows.digest)
    assert from_file.digest != load(rows[:2], chat).digest
    assert from_file.report.explored_is_chosen == 3 and from_file.report.explored_is_rejected == 0
    assert from_file.report.packed_tokens == sum(
        len(group.prompt) - 1 + len(group.chosen) + len(group.rejected) for group in from_file.groups
    )


def test_refusals_name_file_row_and_field(chat: Tokenizer, write_rows: Write) -> None:
    source = write_rows([text(0), text(1, chosen=7)])
    with pytest.raises(
        Refused, match=r"rows\.jsonl: row 2: chosen is 7; columns found: .*expected chosen and rejected"
    ):
        load_groups(source, DataConfig(), chat, wants_explored=False)


def test_source_and_rows_exclude_each_other(chat: Tokenizer) -> None:
    for source, rows in ((None, None), ("rows.jsonl", [text(0)])):
        with pytest.raises(Refused, match="give one of them"):
            load_groups(source, DataConfig(), chat, rows=rows, wants_explored=False)


def test_text_without_a_tokenizer_is_refused() -> None:
    assert load([IDS]).groups
    with pytest.raises(Refused, match=r"rows: row 2: the row is text .*model\.tokenizer"):
        load([IDS, text(1)])


def test_hazard_02_pairs_that_truncation_makes_identical_are_skipped() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [5] * 6 + [3], "rejected_ids": [5] * 6 + [4]}
    dataset = load([row, IDS], max_length=8, max_prompt_length=4, max_skipped=0.5)
    assert dataset.report.skipped == {"chosen and rejected are identical after truncation": 1}
    assert len(load([row, IDS], max_length=9, max_prompt_length=4).groups) == 2


def test_hazard_04_zero_rows_are_refused(write_rows: Write) -> None:
    with pytest.raises(Refused, match="rows: no rows"):
        load([])
    with pytest.raises(Refused, match=r"rows\.jsonl: no rows"):
        load_groups(write_rows([]), DataConfig(), None, wants_explored=False)


def test_hazard_04_all_rows_skipped_is_refused_with_the_reasons(chat: Tokenizer) -> None:
    rows = [text(0, prompt=""), text(1, rejected=text(1)["chosen"]), text(2, rejected=text(2)["chosen"])]
    rows[0].update(chosen=[], rejected=[])
    with pytest.raises(Refused, match="all 3 rows are unusable") as error:
        load(rows, chat, max_skipped=1.0)
    lines = str(error.value).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["2", "chosen", "and", "rejected", "are", "identical", "(first:", "row", "2)"],
        ["1", "empty", "chosen", "(first:", "row", "1)"],
    ]


@pytest.mark.parametrize(("bad", "refused"), [(1, False), (2, True)])
def test_hazards_counted_as_skipped_are_refused_above_the_cap(bad: int, refused: bool) -> None:
    rows = [{**IDS, "chosen_ids": [10 + i]} for i in range(20 - bad)] + [{**IDS, "chosen_ids": []}] * bad
    if not refused:
        assert load(rows).report.rows_used == 20 - bad
        return
    with pytest.raises(
        Refused, match=r"2 of 20 rows \(10\.0%\) are unusable; expected at most data.max_skipped = 5\.0%"
    ):
        load(rows)


def test_hazard_05_a_prompt_as_long_as_max_length_is_cut_to_leave_room() -> None:
    group = load([{**IDS, "prompt_ids": list(range(50, 90))}], max_length=8, max_prompt_length=7).groups[0]
    assert group == TokenGroup(list(range(83, 90)), [3], [4], None, 0)


def test_hazard_15_duplicate_rows_are_counted_and_kept(chat: Tokenizer) -> None:
    rows = [text(0), text(1), text(0, source="elsewhere"), {**IDS}, {**IDS}, {**IDS, "chosen_ids": [3, 3]}]
    dataset = load(rows, chat)
    assert len(dataset.groups) == 6 and dataset.report.notes[DUPLICATES] == 2
    ids = [{**IDS, "prompt_ids": [1], "chosen_ids": [2, 3]}, {**IDS, "prompt_ids": [1, 2], "chosen_ids": [3]}]
    assert DUPLICATES not in load(ids).report.notes


def test_hazard_16_18_19_21_are_counted_beside_good_rows(chat: Tokenizer) -> None:
    rows = [text(i) for i in range(97)]
    rows += [text(97, score_chosen=float("nan"), score_rejected=1.0), text(98, score_chosen=3, score_rejected=3)]
    rows += [text(99, prompt="x", chosen="y" * 10_000_000, rejected="z"), {**text(100), "prompt": "\ud800"}]
    rows[100]["chosen"] = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]
    rows.append(text(101, prompt="x"))
    rows[101]["chosen"][0]["content"] = rows[101]["rejected"][0]["content"] = "<|eos|>?"
    report = load(rows, chat).report
    assert report.rows_used == 98 and report.notes[TYPED] == 1
    assert report.skipped == {
        "score is NaN": 1,
        "scores of chosen and rejected are tied": 1,
        "row of more than 1,000,000 characters": 1,
        "lone surrogate or NUL in the text": 1,
    }


def test_hazard_21_too_many_ties_are_refused() -> None:
    tie = {**IDS, "score_chosen": 1.0, "score_rejected": 1.0}
    with pytest.raises(Refused, match="scores of chosen and rejected are tied"):
        load([IDS, tie])


def explored_rows(cut: int, whole: int) -> Rows:
    """Rows of ids whose explored response is longer than max_length 10 leaves room for, or not."""
    lengths = [20] * cut + [5] * whole
    return [{**IDS, "prompt_ids": [9, i], "reference_response_ids": [6] * length} for i, length in enumerate(lengths)]


@pytest.mark.parametrize(("cut", "warned"), [(0, False), (5, False), (6, True), (9, True)])
def test_hazard_22_many_cut_explored_responses_are_warned_of(cut: int, warned: bool) -> None:
    report = load(explored_rows(cut, 10 - cut), wants_explored=True, max_length=10, max_prompt_length=4).report
    assert report.notes[EXPLORED_CUT] == cut
    assert len(report.warnings) == warned
    if warned:
        assert f"{cut} of 10 explored responses" in report.warnings[0]


def test_hazard_22_mostly_cut_explored_responses_are_refused() -> None:
    rows = explored_rows(10, 0)
    with pytest.raises(
        Refused, match=r"10 of 10 explored responses .* data.max_cut = 90%; raise data.max_length \(now 10\)"
    ):
        load(rows, wants_explored=True, max_length=10, max_prompt_length=4)
    assert load(rows, wants_explored=True, max_length=10, max_prompt_length=4, max_cut=1.0).groups
    assert load(rows, max_length=10, max_prompt_length=4).groups  # not read without the exploration term


def test_hazard_22_rollouts_without_eos_count_as_cut(chat: Tokenizer) -> None:
    open_ended = [{**IDS, "chosen_ids": [7, i], "reference_response_ids": [6, 7]} for i in range(3)]
    ended = [{**IDS, "chosen_ids": [8, i], "reference_response_ids": [6, chat.eos_id]} for i in range(2)]
    report = load(open_ended + ended, chat, wants_explored=True).report
    assert report.notes[EXPLORED_CUT] == 3 and len(report.warnings) == 1


def test_cut_texts_are_counted_by_kind(chat: Tokenizer) -> None:
    row = text(0, reference_response="chosen " * 20)
    row["rejected"][1]["content"] = "rejected " * 20
    notes = load(
        [row, text(1)], chat, wants_explored=True, max_length=40, max_prompt_length=30, max_cut=1.0
    ).report.notes
    assert (notes[EXPLORED_CUT], notes[REJECTED_CUT], notes[CHOSEN_CUT], notes[NO_REFERENCE]) == (1, 1, 0, 1)


def test_no_reference_response_at_all_is_refused_where_exploration_needs_it(chat: Tokenizer) -> None:
    with pytest.raises(Refused, match="no row has a reference_response.*use method dpo"):
        load([text(0), text(1, reference_response=None)], chat, wants_explored=True)
    dataset = load([text(0), text(1, reference_response="so")], chat, wants_explored=True)
    assert [group.explored is None for group in dataset.groups] == [True, False]
    assert dataset.report.notes[NO_REFERENCE] == 1
    assert [dataset.report.lengths[kind].count for kind in ("prompt", "chosen", "rejected", "explored")] == [2, 2, 2, 1]
    assert all(group.explored is None for group in load([text(1, reference_response="so")], chat).groups)


def test_length_statistics() -> None:
    assert LengthStats.of([]) == LengthStats(0, 0.0, 0, 0, 0)
    assert LengthStats.of(range(101)) == LengthStats(101, 50.0, 50, 95, 100)


@given(st.lists(st.integers(0, 9), min_size=1))
def test_length_statistics_are_ordered(lengths: list[int]) -> None:
    stats = LengthStats.of(lengths)
    assert min(lengths) <= stats.median <= stats.p95 <= stats.max == max(lengths)
