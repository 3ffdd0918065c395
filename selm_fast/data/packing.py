"""From groups of token ids to packed batches: the layout of a batch, and who shares one with whom."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.ops import Pairs

__all__ = ["Plan", "TokenGroup", "balance", "pack", "plan_epoch", "sequence_key"]


def sequence_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16-byte digest of (prompt ids, response ids), the same on every machine."""
    ids = array("q", (len(prompt), *prompt, *response))
    return hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


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


def balance(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread items over as few bins as hold them: longest first into the least loaded, ties by index; bins list
    indices in order.

    Raises ValueError for an item that fits no bin.
    """
    if costs and max(costs) > capacity:
        worst = max(range(len(costs)), key=lambda i: costs[i])
        raise ValueError(
            f"item {worst} takes {costs[worst]} tokens and a batch holds {capacity}: raise max_tokens or shorten "
            "max_length"
        )
    longest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins = max(1, -(-sum(costs) // capacity))
    while True:
        loads, members = [0] * bins, [list[int]() for _ in range(bins)]
        for item in longest_first:
            lightest = min(range(bins), key=loads.__getitem__)
            loads[lightest] += costs[item]
            members[lightest].append(item)
        if max(loads) <= capacity:
            return [sorted(member) for member in members]
        bins += 1


def _pack_one(groups: Sequence[TokenGroup], row_ids: Sequence[int]) -> PackedBatch:
    tokens, positions, kv_index, response_rows, targets = (list[int]() for _ in range(5))
    cu_q, cu_k, cu_responses = [0], [0], [0]
    keys: list[bytes] = []
    chosen, rejected, explored = list[int](), list[int](), list[int]()
    for group in groups:
        first_sequence, prompt_row, prompt = len(keys), len(tokens), list(group.prompt)
        responses = group.responses()
        for nth, response in enumerate(responses):
            inputs, row = list(response[:-1]), len(tokens)
            if nth == 0:
                inputs, start, shared = prompt + inputs, 0, range(0)
            else:
                inputs, start, shared = (
                    prompt[-1:] + inputs,
                    len(prompt) - 1,
                    range(prompt_row, prompt_row + len(prompt) - 1),
                )
            tokens += inputs
            positions += range(start, start + len(inputs))
            kv_index += (*shared, *range(row, row + len(inputs)))
            response_rows += range(len(tokens) - len(response), len(tokens))
            targets += response
            cu_q.append(len(tokens))
            cu_k.append(len(kv_index))
            cu_responses.append(len(targets))
            keys.append(sequence_key(prompt, response))
        chosen.append(first_sequence + responses.index(group.chosen))
        rejected.append(first_sequence + responses.index(group.rejected))
        explored.append(-1 if group.explored is None else first_sequence + responses.index(group.explored))
    return PackedBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        kv_index=torch.tensor(kv_index),
        max_seqlen_q=max(np.diff(cu_q)).item(),
        max_seqlen_k=max(np.diff(cu_k)).item(),
        response_rows=torch.tensor(response_rows),
        targets=torch.tensor(targets),
        cu_responses=torch.tensor(cu_responses, dtype=torch.int32),
        sequence_keys=tuple(keys),
        row_ids=tuple(row_ids),
        pairs=Pairs(chosen=torch.tensor(chosen), rejected=torch.tensor(rejected), explored=torch.tensor(explored)),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """One epoch: which groups form each optimiser step, and which of them share a micro-batch.

    The reference pass and the training steps both walk it, so that a sequence meets the same neighbours in both.
    steps: by step, by micro-batch, indices into `groups`.
    """

    groups: Sequence[TokenGroup]
    steps: tuple[tuple[tuple[int, ...], ...], ...]

    def batches(self, step: int) -> Iterator[PackedBatch]:
        """The packed micro-batches of one optimiser step."""
        for members in self.steps[step]:
            yield _pack_one([self.groups[i] for i in members], [_row_id(self.groups[i], i) for i in members])

    def num_groups(self, step: int) -> int:
        """Groups of one optimiser step: what its summed loss is divided by."""
        return sum(len(members) for members in self.steps[step])

    def pack_keys(self) -> list[tuple[bytes, ...]]:
        """The sequence keys of every micro-batch, in order: what `batches` will put in each, without packing."""
        return [
            tuple(
                sequence_key(self.groups[i].prompt, response)
                for i in members
                for response in self.groups[i].responses()
            )
            for step in self.steps
            for members in step
        ]

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
) -> Plan:
    """Cut an epoch into optimiser steps and balanced micro-batches; the same arguments give the same plan.

    groups_per_step: G of every step but the last, which takes what is left.
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
        bins = balance([groups[i].num_tokens() for i in members], max_tokens)
        steps.append(tuple(tuple(members[j] for j in bin_) for bin_ in bins))
    return Plan(groups, tuple(steps))
