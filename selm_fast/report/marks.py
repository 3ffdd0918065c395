"""What is drawn in the axes of a chart: lines, points with intervals, steps of a histogram, boxes, stacked bars."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from selm_fast.report.numbers import number
from selm_fast.report.series import Series
from selm_fast.report.styles import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "#fefefd"  # stands for the background while a chart is drawn
Shape = Literal["line", "points", "hollow", "area", "bar", "hatched"]


@dataclass(frozen=True, slots=True)
class Mark(ABC):
    """Something drawn, with its look by number and its name in the legend (none: it is not in the legend)."""

    look: int
    name: str

    @property
    def shape(self) -> Shape:
        """What stands for it in the legend."""
        return "points"

    @property
    def summary(self) -> str:
        """What it shows, for those who do not see it."""
        return ""

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Draw it."""


@dataclass(frozen=True, slots=True)
class Line(Mark):
    """A line over steps or iterations, with a band where its points have a range."""

    series: Series

    @property
    def shape(self) -> Shape:
        return "line"

    @property
    def summary(self) -> str:
        return _first_and_last(self.series)

    def draw(self, axes: Axes) -> None:
        look, series = style(self.look), self.series
        if any(not math.isnan(value) for value in series.low):
            axes.fill_between(series.xs, series.low, series.high, color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(
            series.xs,
            series.ys,
            color=look.colour,
            linewidth=1.5,
            linestyle=(0, look.dash) if look.dash else "-",
            marker=look.marker,
            markersize=4,
            # Offset from each other, so that the markers of lines that lie upon each other are seen
            markevery=1 if len(series.xs) <= 16 else (3 + 5 * self.look % 17, max(1, len(series.xs) // 7)),
        )


@dataclass(frozen=True, slots=True)
class Points(Mark):
    """Points, and their intervals where they have any; hollow for what is measured on held-out data."""

    series: Series
    shift: float = 0.0
    joined: bool = False
    hollow: bool = False

    @property
    def shape(self) -> Shape:
        return "hollow" if self.hollow else "points"

    @property
    def summary(self) -> str:
        return _first_and_last(self.series)

    def draw(self, axes: Axes) -> None:
        look, series = style(self.look), self.series
        xs = [x + self.shift for x in series.xs]
        for x, low, high in zip(xs, series.low, series.high, strict=True):
            if not math.isnan(low + high):
                axes.plot([x, x], [low, high], color=look.colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(
            xs,
            series.ys,
            color=look.colour,
            linestyle=((0, look.dash) if look.dash else "-") if self.joined else "none",
            linewidth=1,
            marker=look.marker,
            markersize=7 if self.hollow else 6,
            markerfacecolor=PAPER if self.hollow else look.colour,
        )


@dataclass(frozen=True, slots=True)
class Steps(Mark):
    """The outline of a histogram. edges: one more than heights."""

    edges: list[float]
    heights: list[float]
    middle: float | None = None  # where a vertical line stands
    filled: bool = True

    @property
    def shape(self) -> Shape:
        return "area" if self.filled else "line"

    @property
    def summary(self) -> str:
        return "" if self.middle is None else f"mean {number(self.middle)}"

    def draw(self, axes: Axes) -> None:
        look = style(self.look)
        if self.filled:
            axes.stairs(self.heights, self.edges, fill=True, color=look.colour, alpha=0.3)
        axes.stairs(self.heights, self.edges, color=look.colour, linewidth=1.4, baseline=None)
        if self.middle is not None:
            axes.axvline(self.middle, color=look.colour, linewidth=1.6, linestyle=(0, (4, 2)))


@dataclass(frozen=True, slots=True)
class Box(Mark):
    """Five percentiles (5, 25, 50, 75, 95) of a distribution, as a box with whiskers at x."""

    x: float
    percentiles: tuple[float, float, float, float, float]
    width: float
    place: str  # what it is of, in words

    @property
    def shape(self) -> Shape:
        return "area"

    @property
    def summary(self) -> str:
        least, _, middle, _, most = self.percentiles
        return f"{self.place}: median {middle:.0f}, from {least:.0f} to {most:.0f}"

    def draw(self, axes: Axes) -> None:
        look = style(self.look)
        least, lower, middle, upper, most = self.percentiles
        axes.use_sticky_edges = False  # a bar's foot would stand on the axis
        axes.plot([self.x, self.x], [least, most], color=look.colour, linewidth=1.4, zorder=0.9)  # behind the box
        axes.bar(
            self.x, upper - lower, bottom=lower, width=self.width, color=PAPER, edgecolor=look.colour, linewidth=1.4
        )
        axes.bar(self.x, upper - lower, bottom=lower, width=self.width, color=look.colour, alpha=0.3)
        half = self.width / 2
        axes.plot([self.x - half, self.x + half], [middle, middle], color=look.colour, linewidth=2.6)


@dataclass(frozen=True, slots=True)
class Bar(Mark):
    """One part of a stacked bar that lies at height y, from left to right."""

    y: float
    left: float
    length: float

    @property
    def shape(self) -> Shape:
        return "hatched" if self.look % 2 else "bar"

    def draw(self, axes: Axes) -> None:
        look = style(self.look)
        axes.barh(
            self.y,
            self.length,
            left=self.left,
            height=0.62,
            color=look.colour,
            edgecolor=PAPER,
            linewidth=0.8,
            hatch="////" if self.look % 2 else None,
        )


@dataclass(frozen=True, slots=True)
class Total(Mark):
    """What is written behind a stacked bar; place is what the bar is of, in words."""

    y: float
    x: float
    text: str
    place: str

    @property
    def summary(self) -> str:
        return f"{self.place}: {self.text}"

    def draw(self, axes: Axes) -> None:
        axes.annotate(self.text, (self.x, self.y), (4, 0), textcoords="offset points", va="center")
        axes.margins(x=0.3)


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes of a chart.

    level: where a horizontal line stands (a coin's win rate, the random accuracy).
    borders: where vertical lines stand, by what is written at them.
    """

    title: str
    marks: list[Mark]
    percent: bool = False
    level: float | None = None
    borders: dict[float, str] = field(default_factory=dict)


def _first_and_last(series: Series) -> str:
    known = series.known
    if not known:
        return "nothing measured"
    return f"from {number(known[0])} to {number(known[-1])}" if len(known) > 1 else number(known[0])
