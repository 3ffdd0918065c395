"""Which runs there are: worlds, methods, alphas, learning rates and seeds, and what is tuned on which of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.exploration.environment import Settings
from benchmarks.exploration.experiment import Training

DEFAULT_WORLD = "default"
ZERO_REWARD = "zero reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """An environment's settings, and how runs in it train. about: what is different in it."""

    about: str
    settings: Settings = field(default_factory=Settings)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True, slots=True, order=True)
class Job:
    """One run. alpha: of the trainer's method: SELM's term weighs alpha * beta, XPO's alpha."""

    world: str
    method: str
    alpha: float
    lr: float
    seed: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """The alpha and learning rate at which a method had the highest reward on the tuning seeds."""

    alpha: float
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Everything that is run. Nothing is chosen by what the reported seeds show.

    tuning_alphas: by method that is tuned.  ablation: alphas of SELM at DPO's best learning rate.
    few: alphas at which the other terms, and the other worlds, are compared.
    """

    worlds: Mapping[str, World]
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    lrs: Sequence[float]
    tuning_alphas: Mapping[str, Sequence[float]]
    ablation: Sequence[float]
    few: Sequence[float]
    base_steps: int = 300  # of fitting a base model

    def __post_init__(self) -> None:
        if shared := set(self.tuning_seeds) & set(self.seeds):
            raise ValueError(f"seeds {sorted(shared)} are for tuning and for reporting; expected no such seed")

    def tuning(self) -> list[Job]:
        """Runs on the tuning seeds: every alpha and learning rate of the methods that are tuned."""
        return [
            Job(DEFAULT_WORLD, method, alpha, lr, seed)
            for seed in self.tuning_seeds
            for method, alphas in self.tuning_alphas.items()
            for alpha in alphas
            for lr in self.lrs
        ]

    def choose(self, rewards: Mapping[Job, float]) -> dict[str, Tuned]:
        """By method, what had the highest mean reward over the tuning seeds; the first of equals."""
        return {
            method: max(
                (Tuned(alpha, lr) for alpha in alphas for lr in self.lrs),
                key=lambda at: sum(rewards[Job(DEFAULT_WORLD, method, at.alpha, at.lr, s)] for s in self.tuning_seeds),
            )
            for method, alphas in self.tuning_alphas.items()
        }

    def reported(self, tuned: Mapping[str, Tuned]) -> list[Job]:
        """Runs on the reported seeds, each once, seed by seed: what is there when it is stopped is paired."""
        kinds = list(dict.fromkeys(self._kinds(tuned)))
        return [Job(*kind, seed) for seed in self.seeds for kind in kinds]

    def _kinds(self, tuned: Mapping[str, Tuned]) -> Iterator[tuple[str, str, float, float]]:
        """World, method, alpha, learning rate."""
        best = tuned["dpo"].lr
        for lr in self.lrs:
            yield DEFAULT_WORLD, "dpo", 0.0, lr
        for alpha in self.ablation:
            yield DEFAULT_WORLD, "selm", alpha, best
        for method in ("selm wrong sign", "selm sampled", "selm exact"):
            for alpha in self.few:
                yield DEFAULT_WORLD, method, alpha, best
        for method, at in tuned.items():
            yield DEFAULT_WORLD, method, at.alpha, at.lr
        yield DEFAULT_WORLD, "xpo", 0.0, tuned["xpo"].lr
        for lr in self.beside(best):
            for alpha in self.few:
                yield DEFAULT_WORLD, "selm", alpha, lr
        for world in self.worlds:
            if world != DEFAULT_WORLD:
                yield world, "dpo", 0.0, best
                for alpha in self.few:
                    yield world, "selm", alpha, best

    def beside(self, lr: float) -> list[float]:
        """The learning rates below and above one, where there are any."""
        index = list(self.lrs).index(lr)
        return [self.lrs[place] for place in (index - 1, index + 1) if 0 <= place < len(self.lrs)]

    def bases(self, jobs: Iterable[Job]) -> list[tuple[Settings, int]]:
        """The base models that jobs begin with: settings, as far as they make one, and seed."""
        return list(dict.fromkeys((base_settings(self.worlds[job.world].settings), job.seed) for job in jobs))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def base_settings(settings: Settings) -> Settings:
    """The settings without what only the annotator knows: worlds that differ in that have one base model."""
    return replace(settings, noise=1.0, zero_reward=False)


def _worlds() -> dict[str, World]:
    settings, training = Settings(), Training()
    return {
        DEFAULT_WORLD: World(about="as described above"),
        ZERO_REWARD: World(about="the annotator tosses coins", settings=replace(settings, zero_reward=True)),
        "prior knows": World(about="correlation .5 in place of 0", settings=replace(settings, correlation=0.5)),
        "unsure annotator": World(about="noise 1 in place of .5", settings=replace(settings, noise=1.0)),
        "no offline pair": World(
            about="two samples of the policy in its place", training=replace(training, offline=False)
        ),
        "beta 1": World(about="in place of .1", training=replace(training, beta=1.0)),
    }  # fmt: skip


DEFAULT = Grid(
    worlds=_worlds(),
    tuning_seeds=range(1000, 1010),
    seeds=range(300, 320),
    lrs=(1e-3, 2e-3, 4e-3, 6e-3, 1e-2),
    tuning_alphas={"dpo": (0.0,), "selm": (0.03, 0.1), "xpo": (1e-2, 3e-2)},
    ablation=(1e-3, 0.03, 0.1, 0.3, 1.0),
    few=(0.1, 0.3),
)

_SMALL = Settings(vocabulary=4, train_prompts=24, held_out_prompts=16)
QUICK = Grid(
    worlds={
        DEFAULT_WORLD: World(about="small", settings=_SMALL, training=Training(iterations=2, groups=16)),
        ZERO_REWARD: World(
            about="the annotator tosses coins",
            settings=replace(_SMALL, zero_reward=True),
            training=Training(iterations=2, groups=16),
        ),
    },
    tuning_seeds=(1000, 1001),
    seeds=(0, 1, 2),
    lrs=(1e-3, 4e-3),
    tuning_alphas={"dpo": (0.0,), "selm": (0.1,), "xpo": (1e-2,)},
    ablation=(0.1, 0.3),
    few=(0.1,),
    base_steps=60,
)
