"""A world small enough to sum over: every prompt, every response, their true reward, and an annotator who errs.

Prompts and responses are short sequences over one small vocabulary, without an end token: each of the V^L sequences of
L tokens is a response, so that a model's distribution over them is whole and nothing leaks out of it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a world is like.

    peak: standard deviation (nats) of the prior's log-probs over the responses of a prompt, before their sum is 1.
    correlation: of those log-probs with the reward; 0: what the base model likes says nothing about what is good.
    joint: weight, in prior and reward, of the tables that two tokens of the response share; 0: its tokens are good or
    bad each by itself.
    noise: temperature of the annotator (in standard deviations of the reward): P(y beats z) = sigmoid((r_y - r_z) /
    noise), Bradley and Terry's model.
    zero_reward: the annotator sees no reward and tosses coins; what it should have seen is still measured.
    """

    vocabulary: int = 8  # V
    prompt_tokens: int = 3
    response_tokens: int = 2  # L
    train_prompts: int = 192
    held_out_prompts: int = 128
    peak: float = 2.0
    correlation: float = 0.0
    joint: float = 0.5
    noise: float = 0.5
    zero_reward: bool = False

    def __post_init__(self) -> None:
        prompts = self.vocabulary**self.prompt_tokens
        if self.train_prompts + self.held_out_prompts > prompts:
            raise ValueError(
                f"{self.train_prompts} + {self.held_out_prompts} prompts are asked for, and {self.vocabulary} tokens "
                f"make {prompts} prompts of {self.prompt_tokens}: ask for fewer, or for a larger vocabulary"
            )
        if not self.noise > 0:
            raise ValueError(f"noise is {self.noise}; expected a temperature above 0")


@dataclass(frozen=True, slots=True)
class Environment:
    """P prompts and R responses, in one order everywhere.

    prompts: (P, prompt tokens), those that are trained on first.  responses: (R, L), in lexicographic order.
    rewards: (P, R), mean 0 and standard deviation 1 over the responses of each prompt.  prior: (P, R) log-probs, nats.
    """

    settings: Settings
    prompts: Ints
    responses: Ints
    rewards: Floats
    prior: Floats

    @property
    def train(self) -> slice:
        """The prompts that are trained on."""
        return slice(0, self.settings.train_prompts)

    @property
    def held_out(self) -> slice:
        """The prompts that nothing is trained on."""
        return slice(self.settings.train_prompts, len(self.prompts))


def stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers of their own for each purpose, seed and iteration; the trainer's order of rows has others."""
    # A 1 at the end, since numpy takes [seed] and [seed, 0] for the same.
    return np.random.default_rng([zlib.crc32(purpose.encode()), *numbers, 1])


def make_environment(settings: Settings, seed: int) -> Environment:
    """The world of a seed: equal seeds give equal worlds, whatever the annotator is like."""
    rng = stream("world", seed)
    tokens = range(settings.vocabulary)
    every = np.array(list(product(tokens, repeat=settings.prompt_tokens)))
    prompts = rng.permutation(every)[: settings.train_prompts + settings.held_out_prompts]
    responses = np.array(list(product(tokens, repeat=settings.response_tokens)))
    rewards = _structured(prompts, responses, settings, rng)
    other = _structured(prompts, responses, settings, rng)
    mixed = settings.correlation * rewards + math.sqrt(1 - settings.correlation**2) * other
    return Environment(settings, prompts, responses, rewards, log_softmax(settings.peak * mixed))


def _structured(prompts: Ints, responses: Ints, settings: Settings, rng: np.random.Generator) -> Floats:
    """(P, R), mean 0 and standard deviation 1 in each row, of parts that prompts share.

    A part is a table of normal numbers: how well a token at one place of the prompt goes with one at a place of the
    response, and with its first two tokens. A policy that learns a table from some prompts knows it for all.
    """
    score = np.zeros((len(prompts), len(responses)))
    vocabulary = settings.vocabulary
    shape = (vocabulary, vocabulary)
    for place, answer in product(range(prompts.shape[1]), range(responses.shape[1])):
        score += rng.standard_normal(shape)[prompts[:, place][:, None], responses[:, answer][None]]
    if responses.shape[1] > 1:
        for place in range(prompts.shape[1]):
            table = rng.standard_normal((vocabulary, *shape))
            score += settings.joint * table[prompts[:, place][:, None], responses[:, 0][None], responses[:, 1][None]]
    score -= score.mean(1, keepdims=True)
    return score / score.std(1, keepdims=True)


def log_softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def annotate(environment: Environment, seed: int, iteration: int) -> Floats:
    """(P, R): how the annotator orders all responses in an iteration, of which it is asked about a few.

    The reward over `noise` plus a Gumbel number for each response: the order of any set is then Plackett and Luce's,
    and that of two Bradley and Terry's. The numbers are of the seed and the iteration alone, so that methods that ask
    about the same responses are told the same.
    """
    gumbel = stream("annotator", seed, iteration).gumbel(size=environment.rewards.shape)
    if environment.settings.zero_reward:
        return gumbel
    return environment.rewards / environment.settings.noise + gumbel


def tilted(logps: Floats, rewards: Floats, strength: float) -> Floats:
    """log of pi(y) exp(strength r(y)) / Z, over the last axis.

    It maximises E[r] - KL(. || pi) / strength, and so has the highest reward of all distributions at its distance from
    pi (DPO, arXiv 2305.18290, equation 4, where strength is 1 / beta).
    """
    return log_softmax(logps + strength * rewards)


def expected(logps: Floats, values: Floats) -> Floats:
    """(P,): E[values] under (P, R) log-probs."""
    return (np.exp(logps) * values).sum(-1)  # type: ignore[no-any-return]


def divergence(logps: Floats, base: Floats) -> Floats:
    """(P,): KL(pi || base), nats."""
    return expected(logps, logps - base)


def entropy(logps: Floats) -> Floats:
    """(P,): nats."""
    return -expected(logps, logps)


def summary(environment: Environment, logps: Floats, base: Floats, greedy: Ints, prompts: slice) -> dict[str, float]:
    """Exact figures of a policy over some prompts. greedy: (P,) its greedy responses.

    reward: E[r] over E[max r]: 1 is the most that any policy can have.  greedy: the same of the greedy responses.
    kl: to the base model, nats.  entropy: nats.
    """
    logps, base, rewards = logps[prompts], base[prompts], environment.rewards[prompts]
    best = rewards.max(1).mean()
    likeliest = np.take_along_axis(rewards, greedy[prompts][:, None], 1)
    return {
        "reward": float(expected(logps, rewards).mean() / best),
        "greedy": float(likeliest.mean() / best),
        "kl": float(divergence(logps, base).mean()),
        "entropy": float(entropy(logps).mean()),
    }
