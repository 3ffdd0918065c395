"""What a training step computes on: tokens, rows of the head, pairs of query and key, by the layout of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

Layout = Literal["padded", "packed", "response_head", "shared_prefix", "aliases"]


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """Tokens of one group. responses: the distinct ones.  repeated: those that equal one of them."""

    prompt: int
    responses: tuple[int, ...]
    repeated: tuple[int, ...] = ()

    @classmethod
    def of(cls, prompt: Sequence[int], responses: Iterable[Sequence[int] | None]) -> Self:
        """From token ids: chosen, rejected and, if there is one, explored."""
        distinct, repeated = list[Sequence[int]](), list[int]()
        for response in responses:
            if response is None:
                continue
            if response in distinct:
                repeated.append(len(response))
            else:
                distinct.append(response)
        return cls(len(prompt), tuple(map(len, distinct)), tuple(repeated))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step computes on; means will do as well as counts.

    tokens: T.  head_rows: N.  pairs: (query, key) pairs of all branches.  keys: key rows of all branches.  groups: G.
    """

    tokens: float
    head_rows: float
    pairs: float
    keys: float
    groups: float

    @classmethod
    def of(cls, groups: Sequence[GroupLengths], layout: Layout = "aliases", *, batch: int = 1) -> Self:
        """The work of groups in a layout, each of which has what the one before it has.

        padded: every response with its prompt, as long as the longest of `batch` groups, as in the authors' code.
        packed: nothing padded, no last token.  response_head: no prompt row in the head.  shared_prefix: prompts once.
        aliases: equal responses once, which is how `selm_fast.data.packing` lays groups out.
        """
        branches = list(_branches(groups, layout, batch))
        responses = sum(sum(group.responses) + (layout != "aliases") * sum(group.repeated) for group in groups)
        whole = layout in ("padded", "packed")
        return cls._of(branches, sum(queries for queries, _ in branches) if whole else responses, len(groups))

    @classmethod
    def of_means(cls, groups: float, prompt: float, response: float, responses: float) -> Self:
        """The layout "aliases" from mean lengths. responses: distinct ones of a group."""
        keys = prompt - 1 + response
        pairs = (prompt - 1) * prompt / 2 + responses * (response * (prompt - 1) + response * (response + 1) / 2)
        return cls(
            tokens=groups * (prompt - 1 + responses * response),
            head_rows=groups * responses * response,
            pairs=groups * pairs,
            keys=groups * responses * keys,
            groups=groups,
        )

    @classmethod
    def of_branches(cls, cu_queries: Sequence[int], cu_keys: Sequence[int], *, head_rows: int, groups: int) -> Self:
        """The work of a packed batch: its cu_seqlens_q and cu_seqlens_k as lists."""
        lengths = ([end - start for start, end in pairwise(ends)] for ends in (cu_queries, cu_keys))
        return cls._of(list(zip(*lengths, strict=True)), head_rows, groups)

    @classmethod
    def _of(cls, branches: Sequence[tuple[int, int]], head_rows: int, groups: int) -> Self:
        return cls(
            tokens=sum(queries for queries, _ in branches),
            head_rows=head_rows,
            pairs=sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in branches),
            keys=sum(keys for _, keys in branches),
            groups=groups,
        )


def _branches(groups: Sequence[GroupLengths], layout: Layout, batch: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of every branch."""
    width = 0
    for index, group in enumerate(groups):
        responses = group.responses if layout == "aliases" else group.responses + group.repeated
        if layout == "padded":
            if index % batch == 0:
                width = max(one.prompt + max(one.responses) for one in groups[index : index + batch])
            yield from [(width, width)] * len(responses)
            continue
        for nth, response in enumerate(responses):
            keys = group.prompt - 1 + response
            shares = nth > 0 and layout in ("shared_prefix", "aliases")
            yield response if shares else keys, keys
