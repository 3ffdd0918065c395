"""What a rollout is cut into, and what an engine gives back for it.

A shard is one fixed list of batches, answered whole: neither a stop nor the number of processes changes which prompts
meet in a batch, so that both leave every response as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from selm_fast.errors import Refused
from selm_fast.iteration.prompts import Prompt

STOP: Final = "stop"
LENGTH: Final = "length"
SKIPPED: Final = "skipped"
Finish = Literal["stop", "length", "skipped"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of responses: by batch, indices into the prompts."""

    name: str
    batches: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> list[int]:
        """Indices into the prompts, in their order."""
        return [index for batch in self.batches for index in batch]

    @property
    def num_prompts(self) -> int:
        return sum(map(len, self.batches))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model answers: `copies` responses to each prompt; temperature 0 is greedy."""

    copies: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Response:
    """One response to one prompt.

    ids: with the EOS that ended it where one did.  finish: why it ended; `skipped` where the prompt was not answered.
    retokenised: whether the ids are those of its text, because the server that gave it gives no ids.
    """

    ids: list[int]
    finish: Finish
    retokenised: bool = False


class Engine(Protocol):
    """Anything that answers prompts; whatever it starts, it starts when it is first asked and ends with its block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def answer(
        self,
        shards: Sequence[Shard],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: Callable[[str], int],
        on_answered: Callable[[int], None],
    ) -> Iterator[tuple[Shard, dict[int, list[Response]]]]:
        """Shards as they are done, with the responses to each of their prompts by its index.

        seed: of a shard, by its name.  on_answered: called with the number of prompts answered.
        Ends early where a stop was requested. Raises Refused where the model cannot be used, RunFailed where a prompt
        cannot be answered.
        """
        ...


def plan_shards(
    lengths: Sequence[int], *, stem: str, copies: int, max_new_tokens: int, max_tokens: int | None, shard_prompts: int
) -> list[Shard]:
    """Cut prompts, the longest first, into batches of at most `max_tokens` padded tokens and shards of whole batches.

    lengths: tokens of each prompt.  max_tokens: None for batches of one prompt, which a server makes its own of.
    shard_prompts: a shard is full once it has so many.
    Raises Refused where one prompt alone exceeds a batch.
    """
    longest = max(lengths, default=0)
    if max_tokens is not None and copies * (longest + max_new_tokens) > max_tokens:
        raise Refused(
            f"rollout.max_tokens is {max_tokens}; {copies} responses of {max_new_tokens} tokens to a prompt of "
            f"{longest} take {copies * (longest + max_new_tokens)}: raise it"
        )
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:  # a batch is as wide as its first prompt
            batches.append([])
            room = 1 if max_tokens is None else max_tokens // (copies * (lengths[index] + max_new_tokens))
        batches[-1].append(index)
        room -= 1
    shards: list[list[tuple[int, ...]]] = []
    filled = shard_prompts
    for batch in batches:
        if filled >= shard_prompts:
            shards.append([])
            filled = 0
        shards[-1].append(tuple(batch))
        filled += len(batch)
    return [Shard(f"{stem}-{number:05d}.jsonl", tuple(members)) for number, members in enumerate(shards)]
