"""From groups of token ids to packed batches: the layout of a batch, and who shares one with whom."""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.ops import Pairs

__all__ = ["Plan", "TokenGroup", "balance", "pack", "plan_epoch", "sequence_key"]

_ID_BYTES = 8
_Ints = npt.NDArray[np.int64]


def sequence_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16-byte digest of (prompt ids, response ids), the same on every machine."""
    return _sequence_keys(_to_bytes(prompt), [_to_bytes(response)])[0]


def _to_bytes(ids: Sequence[int]) -> bytes:
    """Ids as little-endian int64."""
    return struct.pack(f"<{len(ids)}q", *ids)


def _sequence_keys(prompt: bytes, responses: Sequence[bytes]) -> list[bytes]:
    """`sequence_key` of each response; the prompt they share is hashed once."""
    shared = hashlib.blake2b(_to_bytes([len(prompt) // _ID_BYTES]) + prompt, digest_size=16)
    keys = []
    for response in responses:
        digest = shared.copy()
        digest.update(response)
        keys.append(digest.digest())
    return keys


def pack(groups: Sequence[TokenGroup], *, max_tokens: int | None = None) -> list[PackedBatch]:
    """Lay groups out as packed batches; equal responses of a group are found by their ids and encoded once.

    max_tokens: rows T of a batch, at most; the groups are then balanced over as few batches as hold them (None: one
    batch).
    Raises ValueError for no groups, an empty prompt or response, or a group longer than max_tokens.
    """
    if not groups:
        raise ValueError("pack() needs at least one group; got none")
    for index, group in enumerate(groups):
        if not group.prompt or not all(group.responses()):
            raise ValueError(
                f"group {_row_id(group, index)} has an empty prompt or response; each needs at least one token id"
            )
    costs = [group.num_tokens() for group in groups]
    parts = [list(range(len(groups)))] if max_tokens is None else balance(costs, max_tokens)
    return [_pack_one([groups[i] for i in part], [_row_id(groups[i], i) for i in part]) for part in parts]


def _row_id(group: TokenGroup, index: int) -> int:
    return index if group.row_id is None else group.row_id


def balance(costs: Sequence[int], capacity: int, *, multiple_of: int = 1) -> list[list[int]]:
    """Spread items over as few bins as hold them: longest first into the least loaded, ties by index; bins list
    indices in order.

    multiple_of: of which the number of bins is one; bins may then be empty.
    Raises ValueError for an item that fits no bin.
    """
    if costs and max(costs) > capacity:
        worst = max(range(len(costs)), key=lambda i: costs[i])
        raise ValueError(
            f"item {worst} takes {costs[worst]} tokens and a batch holds {capacity}: raise max_tokens or shorten "
            "max_length"
        )
    longest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    # One bin more makes no bin fuller: with loads sorted, the k-th fullest of n + 1 bins is never above that of n. So
    # the fewest that serve can be searched for: by growing steps, then by halves.
    high = max(1, -(-sum(costs) // (capacity * multiple_of)))
    low, step = high - 1, 1
    while (filled := _fill(costs, longest_first, high * multiple_of, capacity)) is None:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        fewer = _fill(costs, longest_first, middle * multiple_of, capacity)
        if fewer is None:
            low = middle
        else:
            high, filled = middle, fewer
    return [sorted(members) for members in filled]


def _fill(costs: Sequence[int], longest_first: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Each item in turn into the least loaded bin, the first of equal ones; None where one overflows."""
    loads = [(0, number) for number in range(num_bins)]  # a heap
    bins = [list[int]() for _ in range(num_bins)]
    for item in longest_first:
        load, number = loads[0]
        if load + costs[item] > capacity:
            return None
        heapq.heapreplace(loads, (load + costs[item], number))
        bins[number].append(item)
    return bins


def _pack_one(groups: Sequence[TokenGroup], row_ids: Sequence[int]) -> PackedBatch:
    ids, keys = list[bytes](), list[bytes]()
    prompt_at, response_at, prompts, lengths, first = (list[int]() for _ in range(5))  # of each sequence
    chosen, rejected, explored = list[int](), list[int](), list[int]()
    end = 0  # of the ids so far
    for group in groups:
        responses = group.responses()
        prompt, texts = _to_bytes(group.prompt), [_to_bytes(response) for response in responses]
        ids += (prompt, *texts)
        first_sequence = len(keys)
        keys += _sequence_keys(prompt, texts)
        prompt_start, end = end, end + len(group.prompt)
        for response in responses:
            prompt_at.append(prompt_start)
            response_at.append(end)
            prompts.append(len(group.prompt))
            lengths.append(len(response))
            first.append(first_sequence)
            end += len(response)
        chosen.append(first_sequence + responses.index(group.chosen))
        rejected.append(first_sequence + responses.index(group.rejected))
        explored.append(-1 if group.explored is None else first_sequence + responses.index(group.explored))

    stream = np.frombuffer(b"".join(ids), dtype="<i8")
    num_prompt, num_response, first_of = _ints(prompts), _ints(lengths), _ints(first)
    # A branch's queries are the last of its keys: all of them in a group's first branch, elsewhere those from the
    # prompt's last token on.
    num_keys = num_prompt + num_response - 1
    num_shared = np.where(first_of == np.arange(len(keys)), 0, num_prompt - 1)
    cu_q, cu_k, cu_responses = (_offsets(counts) for counts in (num_keys - num_shared, num_keys, num_response))
    positions, branch = _ranges(num_shared, num_keys)
    beyond = positions - num_prompt[branch]
    tokens = stream[np.where(beyond < 0, _ints(prompt_at)[branch] + positions, _ints(response_at)[branch] + beyond)]
    key, branch = _ranges(np.zeros_like(num_keys), num_keys)
    beyond = key - num_shared[branch]
    kv_index = np.where(beyond < 0, cu_q[first_of][branch] + key, cu_q[:-1][branch] + beyond)
    response_rows, _ = _ranges(cu_q[1:] - num_response, cu_q[1:])
    targets, _ = _ranges(_ints(response_at), _ints(response_at) + num_response)
    return PackedBatch(
        tokens=_tensor(tokens),
        positions=_tensor(positions),
        cu_seqlens_q=_tensor(cu_q, np.int32),
        cu_seqlens_k=_tensor(cu_k, np.int32),
        kv_index=_tensor(kv_index),
        max_seqlen_q=max(np.diff(cu_q)).item(),
        max_seqlen_k=max(num_keys).item(),
        response_rows=_tensor(response_rows),
        targets=_tensor(stream[targets]),
        cu_responses=_tensor(cu_responses, np.int32),
        sequence_keys=tuple(keys),
        row_ids=tuple(row_ids),
        pairs=Pairs(chosen=torch.tensor(chosen), rejected=torch.tensor(rejected), explored=torch.tensor(explored)),
    )


def _dummy(groups: Sequence[TokenGroup]) -> PackedBatch:
    """A batch of sequences that are of no group: it goes through the model, and its loss and gradients are 0."""
    shortest = min(groups, key=TokenGroup.num_tokens)
    none = torch.empty(0, dtype=torch.int64)
    pairs = Pairs(chosen=none, rejected=none.clone(), explored=none.clone())
    return replace(_pack_one([shortest], [0]), sequence_keys=(), row_ids=(), pairs=pairs)


def _ints(values: Sequence[int]) -> _Ints:
    return np.array(values, dtype=np.int64)


def _offsets(counts: _Ints) -> _Ints:
    """0 and the running sum."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))


def _ranges(starts: _Ints, stops: _Ints) -> tuple[_Ints, _Ints]:
    """Ranges end to end, and the number of the range that each value is of."""
    counts = stops - starts
    which = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(which)) + (starts - _offsets(counts)[:-1])[which], which


def _tensor(values: npt.NDArray[Any], dtype: npt.DTypeLike = np.int64) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=dtype))


@dataclass(frozen=True, slots=True)
class Plan:
    """One epoch: which groups form each optimiser step, which of them share a micro-batch, and which rank has it.

    The reference pass and the training steps both walk it, so that a sequence meets the same neighbours in both.
    steps: by step, by micro-batch, indices into `groups`; rank r of `ranks` has every ranks-th of a step, from its r-th
    on. An empty one, where a rank is short, is packed as `_dummy`, since all ranks must make equally many passes.
    """

    groups: Sequence[TokenGroup]
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    ranks: int = 1

    def batches(self, step: int, rank: int = 0) -> Iterator[PackedBatch]:
        """The packed micro-batches of one optimiser step, those of one rank."""
        for members in self.steps[step][rank :: self.ranks]:
            yield self._pack(members) if members else _dummy(self.groups)

    def _pack(self, members: Sequence[int]) -> PackedBatch:
        return _pack_one([self.groups[i] for i in members], [_row_id(self.groups[i], i) for i in members])

    def num_rounds(self, step: int) -> int:
        """Micro-batches of each rank in one optimiser step."""
        return len(self.steps[step]) // self.ranks

    def round_groups(self, step: int, nth: int) -> int:
        """Groups of the `nth` micro-batches of a step, all ranks together."""
        return sum(map(len, self.steps[step][nth * self.ranks : (nth + 1) * self.ranks]))

    def first_of(self, step: int) -> int:
        """How many micro-batches, of all ranks, come before a step."""
        return sum(map(len, self.steps[:step]))

    def num_groups(self, step: int) -> int:
        """Groups of one optimiser step: what its summed loss is divided by."""
        return sum(len(members) for members in self.steps[step])

    def num_tokens(self, step: int) -> int:
        """Packed tokens of one optimiser step."""
        return sum(self.groups[i].num_tokens() for members in self.steps[step] for i in members)

    def row_ids(self, step: int) -> list[int]:
        """The dataset rows of one optimiser step."""
        return [_row_id(self.groups[i], i) for members in self.steps[step] for i in members]

    def pack_keys(self) -> list[tuple[bytes, ...]]:
        """The sequence keys of every micro-batch, in order: what `batches` will put in each, without packing."""
        return [tuple(key for i in members for key in self._keys_of(i)) for step in self.steps for members in step]

    def _keys_of(self, index: int) -> list[bytes]:
        group = self.groups[index]
        return _sequence_keys(_to_bytes(group.prompt), [_to_bytes(response) for response in group.responses()])

    def digest(self) -> str:
        """Identity of the packs: their token ids and order."""
        digest = hashlib.sha256()
        for keys in self.pack_keys():
            digest.update(len(keys).to_bytes(4, "little") + b"".join(keys))
        return digest.hexdigest()


def plan_epoch(
    groups: Sequence[TokenGroup],
    *,
    groups_per_step: int,
    max_tokens: int,
    seed: int,
    epoch: int = 0,
    shuffle: bool = True,
    ranks: int = 1,
) -> Plan:
    """Cut an epoch into optimiser steps and balanced micro-batches; the same arguments give the same plan.

    groups_per_step: G of every step but the last, which takes what is left.
    ranks: that share each step's micro-batches, equally many each; those that run side by side are the most alike.
    Raises ValueError for a group longer than max_tokens.
    """
    for index, group in enumerate(groups):
        if group.num_tokens() > max_tokens:
            raise ValueError(
                f"row {_row_id(group, index) + 1} takes {group.num_tokens()} tokens and a batch holds "
                f"{max_tokens}: raise max_tokens or shorten max_length"
            )
    order = (
        np.random.default_rng([seed, epoch]).permutation(len(groups)).tolist() if shuffle else list(range(len(groups)))
    )
    steps = []
    for start in range(0, len(order), groups_per_step):
        members = order[start : start + groups_per_step]
        costs = [groups[i].num_tokens() for i in members]
        bins = balance(costs, max_tokens, multiple_of=ranks)
        if ranks > 1:
            bins.sort(key=lambda bin_: -sum(costs[j] for j in bin_))
        steps.append(tuple(tuple(members[j] for j in bin_) for bin_ in bins))
    return Plan(groups, tuple(steps), ranks)
