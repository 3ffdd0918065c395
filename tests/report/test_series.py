"""How numbers are written, and how long series are thinned."""

from __future__ import annotations

import math

import pytest

from selm_fast.report import numbers
from selm_fast.report.runs import Iteration, Line, Run
from selm_fast.report.series import MAX_POINTS, Series, by_step, held_out


def run_of(*steps: list[Line], evaluations: list[Line] | None = None) -> Run:
    """A run whose iterations have these metrics."""
    iterations = [
        Iteration(number=number, steps=metrics, held_out=evaluations or []) for number, metrics in enumerate(steps, 1)
    ]
    return Run(name="run", config={}, versions={}, done=True, stages=[], iterations=iterations)


def losses(*values: float | None) -> list[Line]:
    """The metrics of an iteration's steps, from step 1."""
    return [{"step": step, "loss": value} for step, value in enumerate(values, 1)]


def listed(series: Series) -> list[tuple[float, float | None, float | None, float | None]]:
    """(x, y, low, high), None for a gap."""
    rows = zip(series.xs, series.ys, series.low, series.high, strict=True)
    return [(x, *(None if math.isnan(value) else value for value in rest)) for x, *rest in rows]  # type: ignore[misc]


def test_short_series_are_whole() -> None:
    run = run_of(losses(0.5, None), losses(0.25))
    assert listed(by_step(run, "loss")) == [
        (1, 0.5, None, None),
        (2, None, None, None),
        (2, None, None, None),  # the border
        (3, 0.25, None, None),
    ]


def test_long_series_are_means_with_a_range_and_do_not_cross_borders() -> None:
    first = losses(*(float(step) for step in range(1, MAX_POINTS + 2)))  # an odd number: the last stretch is short
    second = losses(None, 10.0, None, None)
    found = listed(by_step(run_of(first, second), "loss"))
    assert found[0] == (1.5, 1.5, 1.0, 2.0)
    end = MAX_POINTS + 1
    assert found[MAX_POINTS // 2 - 1 : MAX_POINTS // 2 + 1] == [
        (end - 1.5, end - 1.5, end - 2.0, end - 1.0),
        (end, end, end, end),
    ]
    assert found[MAX_POINTS // 2 + 1 :] == [
        (end, None, None, None),
        (end + 1.5, 10.0, 10.0, 10.0),
        (end + 3.5, None, None, None),
    ]


def test_evaluations_lie_at_their_steps() -> None:
    evaluations: list[Line] = [{"step": 0, "eval_loss": 0.7}, {"step": 2, "eval_loss": None}]
    run = run_of(losses(1.0, 1.0), losses(1.0), evaluations=evaluations)
    assert [(x, y) for x, y, _, _ in listed(held_out(run, "loss"))] == [
        (0, 0.7),
        (2, None),
        (2, None),
        (2, 0.7),
        (4, None),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    (
        (None, "\N{EN DASH}"),
        (0.0, "0"),
        (0.31249, "0.312"),
        (0.30001, "0.300"),
        (-12.349, "-12.3"),
        (123.4, "123"),
        (999.4, "999"),
        (999.96, "1,000"),
        (61135.4, "61,135"),
        (3.0, "3"),
        (0.00012, "0.000120"),
        (5e-7, "5e-7"),
        (-1.25e-5, "-1.25e-5"),
    ),
)
def test_number(value: float | None, text: str) -> None:
    assert numbers.number(value) == text.replace("-", "\N{MINUS SIGN}")


@pytest.mark.parametrize(
    ("values", "texts"),
    (
        ((0.58812, 0.33471, 0.84153), ["0.59", "0.33", "0.84"]),
        ((0.10123, 0.03111, 0.17135), ["0.101", "0.031", "0.171"]),
        ((0.89103, 0.87112, 0.91084), ["0.891", "0.871", "0.911"]),
        ((-3.12345, 0.07123), ["\N{MINUS SIGN}3.123", "0.071"]),
        ((1234.5, 1200.0, 1300.0), ["1,234", "1,200", "1,300"]),
        ((0.5, 0.5, 0.5), ["0.500", "0.500", "0.500"]),
    ),
)
def test_numbers_beside_each_other(values: tuple[float, ...], texts: list[str]) -> None:
    assert numbers.alike(*values) == texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    (
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (200.0, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
    ),
)
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


def test_listed() -> None:
    assert [numbers.listed(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
