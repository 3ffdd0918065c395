"""The results file as tables and charts read it: runs by kind, differences by seed, and numbers in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.exploration.grid import DEFAULT_WORLD, ZERO_REWARD
from benchmarks.exploration.statistics import NOT_SHOWN, Interval, interval, paired
from selm_fast.report.numbers import MINUS, alike, number

LABELS = {
    "dpo": "DPO",
    "selm": "SELM",
    "selm sampled": "SELM, sampled y",
    "selm exact": "SELM, exact expectation",
    "selm wrong sign": "SELM, wrong sign",
    "xpo": "XPO",
}


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """Runs that differ in their seeds alone."""

    method: str
    alpha: float
    lr: float
    world: str = DEFAULT_WORLD

    @property
    def label(self) -> str:
        """As tables and charts name it, but for the learning rate."""
        return LABELS[self.method] if self.method == "dpo" else f"{LABELS[self.method]}, alpha {plain(self.alpha)}"


@dataclass(frozen=True, slots=True)
class Table:
    """Of texts. name: of its place in the document."""

    name: str
    title: str
    about: str
    head: list[str]
    rows: list[list[str]]


class Results:
    """The `exploration` part of a results file."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.grid = found["grid"]
        self.seeds: list[int] = list(self.grid["seeds"])
        self.few: list[float] = list(self.grid["few"])
        self.dpo = self.tuned("dpo")
        self._runs: dict[tuple[Kind, int], Mapping[str, Any]] = {
            (Kind(run["method"], run["alpha"], run["lr"], run["world"]), run["seed"]): run for run in found["runs"]
        }

    def tuned(self, method: str) -> Kind:
        """A method at the alpha and learning rate that were best on the tuning seeds."""
        return Kind(method, **self.found["tuned"][method])

    def at_dpos(self, method: str, alpha: float, world: str = DEFAULT_WORLD) -> Kind:
        """A method at the learning rate that was best for DPO."""
        return Kind(method, alpha, self.dpo.lr, world)

    def of(self, kind: Kind, name: str, iteration: int = -1) -> list[float]:
        """A figure after an iteration, by seed. name: "train/reward", "queries", ..."""
        values = []
        for seed in self.seeds:
            value: Any = self._runs[kind, seed]
            for part in name.split("/"):
                value = value[part]
            values.append(value[iteration])
        return values

    def difference(self, kind: Kind, other: Kind, name: str = "held_out/reward", iteration: int = -1) -> Interval:
        """Paired, over the seeds."""
        return paired(self.of(kind, name, iteration), self.of(other, name, iteration))

    @property
    def iterations(self) -> int:
        """Of each run of the default world."""
        return self.grid["worlds"][DEFAULT_WORLD]["training"]["iterations"]  # type: ignore[no-any-return]

    @property
    def world_names(self) -> list[str]:
        """All but that of the zero-reward control."""
        return [name for name in self.grid["worlds"] if name != ZERO_REWARD]


def plain(setting: float) -> str:
    """A setting as one writes it: 0.004, 0.1, 1."""
    return f"{setting:g}"


def cell(found: Interval, *, signed: bool = True) -> str:
    """A mean and its interval: +0.031 (0.012 to 0.050)."""
    mean, low, high = alike(found.mean, found.low, found.high)
    if not mean.strip(f"{MINUS}0."):
        mean = mean.removeprefix(MINUS)  # a zero to all digits shown
    plus = "+" if signed and not mean.startswith(MINUS) else ""
    return f"{plus}{mean} ({low} to {high})"


def shown(found: Interval) -> str:
    """The verdict in words."""
    return found.verdict if found.verdict == NOT_SHOWN else f"shown: {found.verdict}"


def average(results: Results, kind: Kind, name: str = "held_out/reward") -> str:
    """Mean over the seeds, as a table shows it."""
    return number(interval(results.of(kind, name)).mean)
