"""The layout of packed batches, who shares one with whom, and the plan of an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_fast.batch import PackedBatch
from selm_fast.data import packing
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import balance, pack, plan_epoch, sequence_key
from selm_fast.ops import Pairs

token_ids = st.lists(st.integers(0, 5), min_size=1, max_size=40)  # few tokens: equal responses and prefixes occur


@st.composite
def token_groups(draw: st.DrawFn) -> TokenGroup:
    """A group of one to three distinct responses; the explored may be missing, of its own, or another one's equal."""
    prompt, chosen = draw(token_ids), draw(token_ids)
    rejected = draw(st.one_of(token_ids, st.just(list(chosen))))
    explored = draw(st.one_of(st.none(), token_ids, st.just(list(chosen)), st.just(list(rejected))))
    return TokenGroup(prompt, chosen, rejected, explored, draw(st.one_of(st.none(), st.integers(0, 10**6))))


def some_groups(count: int, seed: int = 0) -> list[TokenGroup]:
    """Groups of random lengths whose tokens are all over the place."""
    generator = random.Random(seed)

    def ids() -> list[int]:
        return [generator.randrange(1000) for _ in range(generator.randint(1, 40))]

    return [TokenGroup(ids(), ids(), ids(), ids() if generator.random() < 0.7 else None) for _ in range(count)]


def distinct(responses: Sequence[Sequence[int] | None]) -> list[list[int]]:
    """The different ones, in order of first appearance."""
    return [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in responses if ids is not None)]


def check_layout(batch: PackedBatch, groups: Sequence[TokenGroup]) -> None:
    """Section 4 of the design, read from the batch: what each branch sees is its prompt and its own response alone."""
    tokens, positions, kv_index = batch.tokens.tolist(), batch.positions.tolist(), batch.kv_index.tolist()
    cu_q, cu_k = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    rows, targets, cu_responses = batch.response_rows.tolist(), batch.targets.tolist(), batch.cu_responses.tolist()
    sequences = [
        (group.prompt, ids) for group in groups for ids in distinct([group.chosen, group.rejected, group.explored])
    ]

    assert cu_q[0] == cu_k[0] == cu_responses[0] == 0
    assert (cu_q[-1], cu_k[-1], cu_responses[-1]) == (len(tokens), len(kv_index), len(targets))
    assert len(cu_q) == len(cu_k) == len(cu_responses) == len(sequences) + 1
    assert len(tokens) == len(positions) == sum(group.num_tokens() for group in groups)
    assert batch.max_seqlen_q == max(stop - start for start, stop in pairwise(cu_q))
    assert batch.max_seqlen_k == max(stop - start for start, stop in pairwise(cu_k))
    assert len(set(rows)) == len(rows)  # no hidden row is used twice

    for nth, (prompt, response) in enumerate(sequences):
        queries = range(cu_q[nth], cu_q[nth + 1])
        keys = kv_index[cu_k[nth] : cu_k[nth + 1]]
        inputs = [*prompt, *response[:-1]]  # the last token of a response is no input
        assert [tokens[row] for row in keys] == inputs
        assert [positions[row] for row in keys] == list(range(len(inputs)))
        assert keys[len(keys) - len(queries) :] == list(queries)  # bottom-right: the queries are the last keys
        mine = slice(cu_responses[nth], cu_responses[nth + 1])
        assert targets[mine] == response
        # Row i of the response stands where the prompt's last token and i response tokens have been read.
        assert rows[mine] == keys[len(prompt) - 1 :]
        assert batch.sequence_keys[nth] == sequence_key(prompt, response)

    first = 0
    for nth, group in enumerate(groups):
        responses = distinct([group.chosen, group.rejected, group.explored])
        for part, ids in (("chosen", group.chosen), ("rejected", group.rejected), ("explored", group.explored)):
            index = getattr(batch.pairs, part)[nth].item()
            assert index == (-1 if ids is None else first + responses.index(list(ids)))
        first += len(responses)
    dtypes = {
        field.name: getattr(batch, field.name).dtype
        for field in fields(batch)
        if "Tensor" in str(field.type) and field.name != "pairs"
    }
    assert {name for name, dtype in dtypes.items() if dtype == torch.int32} == {
        "cu_seqlens_q",
        "cu_seqlens_k",
        "cu_responses",
    }
    assert set(dtypes.values()) == {torch.int32, torch.int64}
    assert batch.num_groups == len(groups) == len(batch.row_ids)


@given(st.lists(token_groups(), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_every_branch_is_its_prompt_and_its_own_response(groups: list[TokenGroup]) -> None:
    (batch,) = pack(groups)
    check_layout(batch, groups)
    assert batch.row_ids == tuple(nth if group.row_id is None else group.row_id for nth, group in enumerate(groups))


def test_the_layout_of_the_design_by_example() -> None:
    """[prompt + first | copy of the prompt's last token + second | third], each without its response's last token."""
    (batch,) = pack([TokenGroup([1, 2, 3], [10, 11], [20, 21, 22], [30], 7), TokenGroup([4], [40, 41], [50], [40, 41])])
    assert batch.tokens.tolist() == [1, 2, 3, 10, 3, 20, 21, 3, 4, 40, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 0, 1, 0]
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 0, 1, 7, 8, 9, 10]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 7, 8, 10, 11]
    assert batch.cu_seqlens_k.tolist() == [0, 4, 9, 12, 14, 15]
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (4, 5)
    assert batch.response_rows.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.targets.tolist() == [10, 11, 20, 21, 22, 30, 40, 41, 50]
    assert batch.cu_responses.tolist() == [0, 2, 5, 6, 8, 9]
    assert batch.row_ids == (7, 1)
    assert batch.pairs.chosen.tolist() == [0, 3]
    assert batch.pairs.rejected.tolist() == [1, 4]
    assert batch.pairs.explored.tolist() == [2, 3]


def test_equal_responses_are_found_by_their_ids_within_a_group_only() -> None:
    same = TokenGroup([1, 2], [3, 4], [5], [3, 4])
    (batch,) = pack([same, same])
    assert len(batch.sequence_keys) == 4  # no sequence serves two groups
    assert batch.sequence_keys[:2] == batch.sequence_keys[2:]
    assert batch.pairs.explored.tolist() == [0, 2]
    assert TokenGroup([1], [2], [2], [2]).num_tokens() == 1
    (single,) = pack([TokenGroup([1], [2], [2], [2])])
    assert (single.pairs.chosen, single.pairs.rejected, single.pairs.explored) == (0, 0, 0)


def test_sequence_keys_tell_prompt_from_response_and_are_the_same_everywhere() -> None:
    keys = {
        sequence_key([1, 2], [3]),
        sequence_key([1], [2, 3]),
        sequence_key([1, 2, 3], [3]),
        sequence_key([1, 2], [4]),
    }
    assert len(keys) == 4
    assert all(len(key) == 16 for key in keys)
    assert sequence_key((1, 2), (3,)) == sequence_key([1, 2], [3])
    assert (
        sequence_key([1, 2], [3]).hex() == "4c85ae5d0e2ecd0933f7d692f4bf61c8"
    )  # a cache made on another machine finds it


@given(st.lists(token_groups(), min_size=1, max_size=12), st.integers(120, 300))
@settings(max_examples=60, deadline=None)
def test_max_tokens_is_respected_and_every_group_is_packed_once(groups: list[TokenGroup], max_tokens: int) -> None:
    groups = [replace(group, row_id=nth) for nth, group in enumerate(groups)]
    costs = [group.num_tokens() for group in groups]
    if max(costs) > max_tokens:
        with pytest.raises(ValueError, match="a batch holds"):
            pack(groups, max_tokens=max_tokens)
        return
    batches = pack(groups, max_tokens=max_tokens)
    assert sorted(row for batch in batches for row in batch.row_ids) == list(range(len(groups)))
    for batch in batches:
        assert batch.tokens.shape[0] <= max_tokens
        check_layout(batch, [groups[row] for row in batch.row_ids])


@pytest.mark.parametrize(
    "group",
    [TokenGroup([], [1], [2]), TokenGroup([1], [], [2]), TokenGroup([1], [2], []), TokenGroup([1], [2], [3], [])],
)
def test_empty_prompts_and_responses_are_refused_by_row(group: TokenGroup) -> None:
    with pytest.raises(ValueError, match="group 41 has an empty prompt or response"):
        pack([TokenGroup([1], [2], [3]), replace(group, row_id=41)])
    with pytest.raises(ValueError, match="group 1 has an empty prompt or response"):
        pack([TokenGroup([1], [2], [3]), group])


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        pack([])


def test_to_moves_every_tensor() -> None:
    (batch,) = pack(some_groups(3))
    moved = batch.to("meta")
    for field in fields(batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", field.name
        elif isinstance(value, Pairs):
            assert {value.chosen.device.type, value.rejected.device.type, value.explored.device.type} == {"meta"}
        else:
            assert value == getattr(batch, field.name)
    again = batch.to("cpu")
    assert torch.equal(again.tokens, batch.tokens)


costs_of_items = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(costs_of_items, st.integers(60, 200))
@settings(max_examples=150, deadline=None)
def test_balance_holds_every_item_once_within_the_capacity(costs: list[int], capacity: int) -> None:
    bins = balance(costs, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(costs)))
    assert all(members == sorted(members) for members in bins)
    loads = [sum(costs[item] for item in members) for members in bins]
    assert max(loads) <= capacity
    assert balance(costs, capacity) == bins


@given(costs_of_items, st.integers(60, 200))
@settings(max_examples=150, deadline=None)
def test_balance_puts_the_longest_first_into_the_least_loaded(costs: list[int], capacity: int) -> None:
    bins = balance(costs, capacity)
    expected: list[list[int]] = [[] for _ in bins]
    loads = [0] * len(bins)
    for item in sorted(range(len(costs)), key=lambda nth: costs[nth], reverse=True):  # stable: ties by index
        place = loads.index(min(loads))
        expected[place].append(item)
        loads[place] += costs[item]
    assert bins == [sorted(members) for members in expected]
    # No more bins than it takes: with one fewer, by the same rule, one would overflow.
    if len(bins) > 1:
        fewer = [0] * (len(bins) - 1)
        for cost in sorted(costs, reverse=True):
            fewer[fewer.index(min(fewer))] += cost
        assert max(fewer) > capacity


@pytest.mark.parametrize("cost", [51, 34, 26])  # one, two, three to a bin of 100, and more bins than their sum needs
def test_balance_finds_the_fewest_bins_without_trying_them_all(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    fill = packing._fill

    def counted(costs: Sequence[int], order: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
        tried.append(num_bins)
        return fill(costs, order, num_bins, capacity)

    monkeypatch.setattr(packing, "_fill", counted)
    costs = [cost] * 3000
    bins = balance(costs, 100)
    assert len(bins) == 3000 // (100 // cost)
    assert sorted(item for members in bins for item in members) == list(range(3000))
    assert len(tried) <= 24
    assert tried[0] == -(-sum(costs) // 100)


def test_balance_gives_equally_loaded_bins_in_their_order() -> None:
    assert balance([4, 4, 4, 2, 2, 2], 6) == [[0, 3], [1, 4], [2, 5]]
    assert balance([], 6) == [[]]


def test_balance_by_example() -> None:
    # Two bins would hold 24 in all, but 9, 5, 5, 4 lead to 13 in one of them.
    assert balance([5, 9, 5, 1, 4], 12) == [[1], [0, 4], [2, 3]]
    assert balance([3, 3, 3, 3], 6) == [[0, 2], [1, 3]]
    assert balance([7], 7) == [[0]]


def test_an_item_that_fits_no_bin_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="item 1 takes 9 tokens and a batch holds 8"):
        balance([3, 9, 2], 8)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(160, 700), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_group_exactly_once(count: int, groups_per_step: int, max_tokens: int, seed: int) -> None:
    groups = some_groups(count, seed)
    plan = plan_epoch(groups, groups_per_step=groups_per_step, max_tokens=max_tokens, seed=seed)
    members = [[nth for batch in step for nth in batch] for step in plan.steps]
    assert sorted(nth for step in members for nth in step) == list(range(count))
    sizes = [len(step) for step in members]
    assert sizes == [groups_per_step] * (count // groups_per_step) + [count % groups_per_step] * (
        count % groups_per_step > 0
    )
    assert sizes == [plan.num_groups(nth) for nth in range(len(plan.steps))]
    keys = []
    for nth, step in enumerate(plan.steps):
        batches = list(plan.batches(nth))
        assert len(batches) == len(step)
        for batch, numbers in zip(batches, step, strict=True):
            assert batch.tokens.shape[0] <= max_tokens
            assert batch.row_ids == numbers
            check_layout(batch, [groups[number] for number in numbers])
            keys.append(batch.sequence_keys)
    assert keys == plan.pack_keys()


def test_the_same_arguments_give_the_same_plan_and_seed_and_epoch_change_the_order() -> None:
    groups = some_groups(64)
    arguments = {"groups_per_step": 16, "max_tokens": 400}

    def steps(**extra: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return plan_epoch(groups, **arguments, **extra).steps

    assert steps(seed=1, epoch=2) == steps(seed=1, epoch=2)
    orders = {steps(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # also seed 1, epoch 2 and seed 2, epoch 1
    assert steps(seed=1) == steps(seed=1, epoch=0)


def test_without_shuffling_steps_take_the_rows_in_order() -> None:
    groups = some_groups(10)
    plan = plan_epoch(groups, groups_per_step=4, max_tokens=10_000, seed=3, shuffle=False)
    assert plan.steps == (((0, 1, 2, 3),), ((4, 5, 6, 7),), ((8, 9),))


def test_row_ids_of_the_data_reach_the_batches() -> None:
    groups = [replace(group, row_id=100 + nth) for nth, group in enumerate(some_groups(5))]
    plan = plan_epoch(groups, groups_per_step=2, max_tokens=10_000, seed=0)
    seen = [row for nth in range(3) for batch in plan.batches(nth) for row in batch.row_ids]
    assert sorted(seen) == [100, 101, 102, 103, 104]
    assert seen == [100 + nth for step in plan.steps for batch in step for nth in batch]


def test_the_digest_of_a_plan_changes_with_every_token_and_with_the_order() -> None:
    groups = some_groups(6)
    arguments = {"groups_per_step": 4, "max_tokens": 500, "seed": 0, "shuffle": False}
    digests = {plan_epoch(groups, **arguments).digest()}
    assert digests == {plan_epoch(some_groups(6), **arguments).digest()}
    changed = 0
    for nth, group in enumerate(groups):
        for part in ("prompt", "chosen", "rejected", "explored"):
            for place in range(len(getattr(group, part) or [])):
                ids = list(getattr(group, part))
                ids[place] += 1
                edited = [*groups[:nth], replace(group, **{part: ids}), *groups[nth + 1 :]]
                digests.add(plan_epoch(edited, **arguments).digest())
                changed += 1
    for other in ({"groups_per_step": 3}, {"max_tokens": 161}, {"shuffle": True}):
        digests.add(plan_epoch(groups, **{**arguments, **other}).digest())
        changed += 1
    digests.add(plan_epoch(groups[::-1], **arguments).digest())
    assert len(digests) == changed + 2


def test_a_plan_and_its_digest_are_those_of_every_machine_and_version() -> None:
    """Reference caches are filed under the digest: if it moved, every cache would be computed again."""
    plan = plan_epoch(some_groups(12), groups_per_step=5, max_tokens=250, seed=3)
    assert plan.steps == (((2, 10), (11, 7, 0)), ((1, 4), (6, 9, 5)), ((3, 8),))
    assert plan.digest() == "655ec9d1c3531a94f9485645027dcbcc2212e85b3967782f6b5be7752905a3fb"


def test_ids_of_any_vocabulary_are_packed() -> None:
    (batch,) = pack([TokenGroup([2**31, 7], [0, 2**40], [151_935])])
    assert batch.tokens.tolist() == [2**31, 7, 0, 7]
    assert batch.targets.tolist() == [0, 2**40, 151_935]


def test_a_group_that_fits_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch holds 10"):
        plan_epoch([TokenGroup([1] * 9, [2], [3, 4])], groups_per_step=1, max_tokens=10, seed=0)


# Plans over ranks.


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(60, 200),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_ranks_share_every_group_once_in_equally_many_packs(
    lengths: list[int], groups_per_step: int, ranks: int, max_tokens: int, shuffle: bool
) -> None:
    """Capacity is kept, the same plan comes again, and a step has the groups that it has for one rank."""
    groups = [TokenGroup([nth], list(range(length)), [99]) for nth, length in enumerate(lengths)]
    settings_ = {"groups_per_step": groups_per_step, "max_tokens": max_tokens + 1, "seed": 3, "shuffle": shuffle}
    plan = plan_epoch(groups, **settings_, ranks=ranks)
    assert plan == plan_epoch(groups, **settings_, ranks=ranks)
    assert plan.digest() == plan_epoch(groups, **settings_, ranks=ranks).digest()
    alone = plan_epoch(groups, **settings_)
    assert len(plan.steps) == len(alone.steps)
    for step, packs in enumerate(plan.steps):
        assert sorted(i for members in packs for i in members) == sorted(
            i for members in alone.steps[step] for i in members
        )
        assert plan.num_groups(step) == alone.num_groups(step)
        assert len(packs) == ranks * plan.num_rounds(step)
        assert all(sum(groups[i].num_tokens() for i in members) <= max_tokens + 1 for members in packs)
        by_rank = [list(plan.batches(step, rank)) for rank in range(ranks)]
        assert {len(batches) for batches in by_rank} == {plan.num_rounds(step)}
        in_turn = [batch for nth in zip(*by_rank, strict=True) for batch in nth]  # as the reference pass writes them
        first = plan.first_of(step)
        assert [batch.sequence_keys for batch in in_turn] == plan.pack_keys()[first : first + len(packs)]
        assert sorted(row for batch in in_turn for row in batch.row_ids) == sorted(plan.row_ids(step))
        assert [sum(batch.num_groups for batch in nth) for nth in zip(*by_rank, strict=True)] == [
            plan.round_groups(step, nth) for nth in range(plan.num_rounds(step))
        ]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.sampled_from([2, 4, 8]), st.integers(60, 400))
@settings(max_examples=150, deadline=None)
def test_packs_that_run_side_by_side_are_about_as_long(lengths: list[int], ranks: int, max_tokens: int) -> None:
    """Longest first into the least loaded: no two packs of a step differ by more than the longest group."""
    groups = [TokenGroup([nth], [5] * length, [6]) for nth, length in enumerate(lengths)]
    plan = plan_epoch(groups, groups_per_step=len(groups), max_tokens=max_tokens + 1, seed=0, ranks=ranks)
    loads = [sum(groups[i].num_tokens() for i in members) for members in plan.steps[0]]
    assert max(loads) - min(loads) <= max(group.num_tokens() for group in groups)
    rounds = [loads[start : start + ranks] for start in range(0, len(loads), ranks)]
    spread = sum(max(together) - min(together) for together in rounds)
    assert spread <= max(loads) - min(loads)  # each round has its neighbours in the order of length


def test_a_plan_of_one_rank_is_the_plan_as_it_always_was() -> None:
    groups = some_groups(12)
    arguments = {"groups_per_step": 5, "max_tokens": 250, "seed": 3}
    assert plan_epoch(groups, **arguments, ranks=1) == plan_epoch(groups, **arguments)
    assert plan_epoch(groups, **arguments, ranks=2).digest() != plan_epoch(groups, **arguments).digest()


def test_fewer_groups_than_ranks_leave_packs_that_stand_in() -> None:
    plan = plan_epoch(some_groups(3), groups_per_step=2, max_tokens=500, seed=0, shuffle=False, ranks=4)
    assert [[len(members) for members in packs] for packs in plan.steps] == [[1, 1, 0, 0], [1, 0, 0, 0]]
    (dummy,) = plan.batches(1, 3)
    assert (dummy.num_groups, dummy.sequence_keys, dummy.row_ids) == (0, (), ())
    assert len(dummy.tokens) == min(group.num_tokens() for group in plan.groups)
