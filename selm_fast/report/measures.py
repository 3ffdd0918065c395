"""What a report's tables say of each iteration: results and time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, harmonic_mean

from selm_fast.report.cells import interval, of_evaluation
from selm_fast.report.contents import Divergence, Evaluation
from selm_fast.report.numbers import alike, count, duration, number, percent
from selm_fast.report.runs import STAGES, Iteration, Line
from selm_fast.report.tables import Cell, Group, Measure

OPPONENTS = {"base": "the base model", "first": "iteration 1", "reference": "the reference answers"}


def results() -> list[Group]:
    """Rewards, win rates, held-out pairs, drift and speed."""
    return [
        Group(
            "Reward",
            "What the ranker gives greedy responses to held-out prompts; higher is better.",
            [
                of_evaluation("greedy responses", lambda found: interval(found.reward)),
                of_evaluation("reference answers", lambda found: interval(found.reference_reward)),
                of_evaluation("held-out prompts", lambda found: Cell(count(found.prompts))),
            ],
        ),
        Group(
            "Win rates",
            "How often the greedy response has the higher reward, a tie counting half; at equal length is what is left "
            "when a longer response is no advantage.",
            [measure for name, whom in OPPONENTS.items() for measure in _wins(name, whom)],
        ),
        Group(
            "Held-out pairs",
            "Implicit rewards, beta times the log-probability gained over the reference model, at the last evaluation.",
            [
                _held_out("margin, chosen over rejected", "rewards/margins"),
                _held_out("accuracy", "rewards/accuracies", percent),
                _held_out("reward of chosen", "rewards/chosen"),
                _held_out("reward of rejected", "rewards/rejected"),
            ],
        ),
        Group(
            "Distance and length",
            "How far the model has moved, in nats of KL divergence a response, and how long its greedy responses are.",
            [
                of_evaluation(
                    "KL from the iteration's reference", lambda found: _divergence(found.kl.get("reference"))
                ),
                of_evaluation("KL from the base model", lambda found: _divergence(found.kl.get("base"))),
                of_evaluation("mean tokens of a response", lambda found: Cell(number(found.tokens.mean))),
                of_evaluation("responses cut at the limit", lambda found: Cell(percent(found.cut))),
            ],
        ),
        Group(
            "Training",
            "Optimiser steps, and how fast they went; a group is a prompt with its responses.",
            [
                Measure("steps", lambda iteration: Cell(count(iteration.num_steps or None))),
                Measure("groups", lambda iteration: Cell(count(iteration.train.groups)) if iteration.train else Cell()),
                Measure("groups a second", lambda iteration: Cell(number(groups_per_second(iteration)))),
                Measure("loss, last tenth of the steps", lambda iteration: _end(iteration.steps, "loss")),
                Measure("margin, last tenth of the steps", lambda iteration: _end(iteration.steps, "rewards/margins")),
            ],
        ),
    ]


def seconds() -> list[Group]:
    """Time of each stage."""
    return [Group("", "", [*map(_stage, STAGES), Measure("total", lambda it: Cell(duration(total_seconds(it))))])]


def stage_seconds(iteration: Iteration, stage: str) -> float | None:
    """Seconds of a stage that is done."""
    return iteration.manifests[stage].seconds if stage in iteration.manifests else None


def total_seconds(iteration: Iteration) -> float | None:
    """Seconds of all stages that are done."""
    found = [taken for stage in STAGES if (taken := stage_seconds(iteration, stage)) is not None]
    return sum(found) if found else None


def groups_per_second(iteration: Iteration) -> float | None:
    """Of the whole training as its manifest has it; else over its steps, taken to have as many groups each."""
    if iteration.train and iteration.train.groups_per_second is not None:
        return iteration.train.groups_per_second
    rates = [rate for line in iteration.steps if (rate := line.get("groups_per_second"))]
    return harmonic_mean(rates) if rates else None


def _stage(stage: str) -> Measure:
    return Measure(stage, lambda iteration: Cell(duration(stage_seconds(iteration, stage))))


def _wins(opponent: str, whom: str) -> list[Measure]:
    def rate(controlled: bool) -> Callable[[Evaluation], Cell]:
        def cell(evaluation: Evaluation) -> Cell:
            found = evaluation.win_rate.get(opponent)
            if not found:
                return Cell()
            middle, low, high = found.length_controlled if controlled else found.plain
            return Cell(percent(middle), "" if low is None or high is None else f"{percent(low)} to {percent(high)}")

        return cell

    def tally(evaluation: Evaluation) -> Cell:
        found = evaluation.win_rate.get(opponent)
        if not found:
            return Cell()
        unscored = f"{count(found.unscored)} without a score" if found.unscored else ""
        return Cell(f"{count(found.wins)} / {count(found.ties)} / {count(found.losses)}", unscored)

    return [
        of_evaluation(f"over {whom}", rate(False)),
        of_evaluation(f"over {whom}, at equal length", rate(True)),
        of_evaluation(f"wins / ties / losses against {whom}", tally),
    ]


def _held_out(name: str, metric: str, text: Callable[[float | None], str] = number) -> Measure:
    def cell(iteration: Iteration) -> Cell:
        after = [line for line in iteration.held_out if line["step"]]
        return Cell(text(after[-1].get(f"eval_{metric}"))) if after else Cell()

    return Measure(name, cell)


def _divergence(found: Divergence | None) -> Cell:
    if found is None or found.mean is None:
        return Cell()
    if found.se is None:
        return Cell(number(found.mean))
    mean, error = alike(found.mean, found.se)
    return Cell(mean, f"s.e. {error}")


def _end(steps: list[Line], metric: str) -> Cell:
    """The mean of the last tenth of the steps."""
    values = [value for line in steps[-max(1, len(steps) // 10) :] if (value := line.get(metric)) is not None]
    return Cell(number(fmean(values))) if values else Cell()
