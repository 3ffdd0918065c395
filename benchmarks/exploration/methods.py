"""The methods that are compared, and how an iteration of each makes its groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.exploration.environment import Environment, Floats, Ints, annotate, stream
from selm_fast.data.groups import TokenGroup
from selm_fast.iteration.candidates import Candidate, choose

Explored = Literal["none", "greedy", "sample", "expectation", "base sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """explored: whose log-prob the exploration term pushes down, or, with sign -1, up.

    All but XPO ask about the same three candidates, the greedy response of the previous iterate and two offline
    samples of the base model, and differ in the term alone. XPO (arXiv 2405.21046) asks about a sample of the policy
    and one of the base model, which is the reference throughout.
    """

    name: str
    explored: Explored
    setting: Literal["selm", "dpo", "xpo"] = "selm"  # the trainer's `method`
    sign: int = 1

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference stays the base model."""
        return self.setting == "xpo"


METHODS = {
    method.name: method
    for method in (
        Method(name="dpo", explored="none", setting="dpo"),
        Method(name="selm", explored="greedy"),
        Method(name="selm sampled", explored="sample"),
        Method(name="selm exact", explored="expectation"),
        Method(name="selm wrong sign", explored="greedy", sign=-1),
        Method(name="xpo", explored="base sample", setting="xpo"),
    )
}


def greedy(logps: Floats, environment: Environment) -> Ints:
    """(P,): the response of each prompt that takes the likeliest token at every place, as greedy decoding does."""
    settings = environment.settings
    left = np.exp(logps).reshape(len(logps), *[settings.vocabulary] * settings.response_tokens)
    response = np.zeros(len(logps), np.int64)
    for _ in range(settings.response_tokens):
        token = left.sum(tuple(range(2, left.ndim))).argmax(1)
        response = response * settings.vocabulary + token
        left = left[np.arange(len(left)), token]
    return response


def sample(logps: Floats, rng: np.random.Generator) -> Ints:
    """(P,): a response to each prompt, drawn from (P, R) log-probs."""
    return (logps + rng.gumbel(size=logps.shape)).argmax(1)  # the Gumbel-max trick


def offline_pairs(base: Floats, seed: int) -> Ints:
    """(P, 2): two different responses of the base model to each prompt, the same in every iteration and method."""
    gumbel = stream("offline pairs", seed).gumbel(size=base.shape)
    return np.argsort(-(base + gumbel), 1)[:, :2]  # the two largest are a draw without replacement


@dataclass(frozen=True, slots=True)
class Asked:
    """What an iteration asked its annotator about.

    groups: to train on.  candidates: by prompt, the policy's own first.  own: how many those are.  queries: pairs that
    were compared.
    """

    groups: list[TokenGroup]
    candidates: list[list[int]]
    own: int
    queries: int


def ask(
    method: Method,
    environment: Environment,
    previous: Floats,
    base: Floats,
    *,
    seed: int,
    iteration: int,
    with_explored: bool,
    offline: bool = True,
) -> Asked:
    """Let the annotator order each training prompt's candidates; the best and the worst become a group.

    previous, base: (P, R) log-probs of the previous iterate and of the base model.
    with_explored: whether groups have an explored response; without a term they need none, as in the trainer.
    offline: whether the offline pair is among the candidates; else two more samples of the previous iterate are.
    """
    likes = annotate(environment, seed, iteration)
    rng = stream("rollout", seed, iteration)
    # Drawn whether a method needs them or not: those that do then have the same.
    sampled, more, other, of_base = (sample(logps, rng) for logps in (previous, previous, previous, base))
    likeliest = greedy(previous, environment)
    beside = offline_pairs(base, seed) if offline else np.stack((more, other), 1)
    explored = {"greedy": likeliest, "sample": sampled, "base sample": of_base}.get(method.explored)
    groups, candidates, queries = [], [], 0
    for prompt in range(environment.settings.train_prompts):
        if method.setting == "xpo":
            numbers = [int(sampled[prompt]), int(of_base[prompt])]
        else:
            numbers = [int(likeliest[prompt]), *map(int, beside[prompt])]
        distinct = len(set(numbers))
        queries += distinct * (distinct - 1) // 2
        candidates.append(numbers)
        choice = choose(
            [Candidate("", "", ids_of(environment, number)) for number in numbers],
            [float(likes[prompt, number]) for number in numbers],
            0.0,
        )
        if isinstance(choice, str):  # all candidates are one response
            continue
        groups.append(
            TokenGroup(
                environment.prompts[prompt].tolist(),
                ids_of(environment, numbers[choice.chosen]),
                ids_of(environment, numbers[choice.rejected]),
                ids_of(environment, int(explored[prompt])) if with_explored and explored is not None else None,
                row_id=prompt,
            )
        )
    return Asked(groups, candidates, 1 if offline or method.setting == "xpo" else 3, queries)


def ids_of(environment: Environment, response: int) -> list[int]:
    """Token ids of a response, by its number."""
    return environment.responses[response].tolist()  # type: ignore[no-any-return]


def every_pair(prompt: Sequence[int], environment: Environment) -> list[TokenGroup]:
    """All responses to a prompt, two a group: what the packed path needs to read the whole distribution."""
    numbers = range(0, len(environment.responses) - 1, 2)
    return [
        TokenGroup(list(prompt), ids_of(environment, number), ids_of(environment, number + 1)) for number in numbers
    ]
