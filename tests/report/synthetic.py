"""Folders as `selm-fast run` and `selm-fast train` leave them, with invented numbers that look like those of a run."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selm_fast.config import Config, RunConfig
from selm_fast.iteration.plan import plan_stages

STAGES = ("rollout", "rank", "cache", "train", "evaluate")
SECONDS = {"prepare": 30.0, "rollout": 2900.0, "rank": 640.0, "cache": 410.0, "train": 3800.0, "evaluate": 260.0}
VERSIONS = {"selm_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
TOPICS = (
    "sourdough bread", "the tides", "a budget for a student", "binary search", "the French Revolution", "house plants",
    "a cover letter", "prime numbers", "a week in Lisbon", "black holes", "jazz", "compost", "the offside rule",
)  # fmt: skip
ASKS = (
    "Explain {} to a child of ten.",
    "Write a short poem about {}.",
    "What should I know about {}?",
    "Give me three facts about {}, please.",
)
SENTENCES = (
    "Let us begin with the most important point.", "It helps to think of it as a recipe that you can follow.",
    "There are three things to keep in mind.", "First, look at what you have already.",
    "Then take one small step at a time, and check it before you go on.", "People often get this part wrong.",
    "A simple example makes it clear.", "In short, it is easier than it seems.", "I hope this helps!",
    "If you like, I can say more about any of these.", "The details depend on where you are and what you need.",
)  # fmt: skip
Numbers = dict[str, Any]


def write_run(
    folder: Path,
    *,
    iterations: int = 3,
    steps: int = 60,
    prompts: int = 60,
    seed: int = 0,
    gain: float = 0.35,
    stop: tuple[int, str] | None = None,
    text: Callable[[int], tuple[str, str, str]] | None = None,
    **settings: Any,
) -> Path:
    """A run of `iterations`.

    prompts: held-out ones.  gain: how much the reward grows in an iteration.
    stop: the (iteration, stage) that is under way; what comes after is not there.
    text: (prompt, response, reference) of a held-out row.  settings: of RunConfig.
    """
    config = RunConfig.model_validate(
        {
            "model": {"path": "HuggingFaceH4/mistral-7b-sft-beta"},
            "data": {"train": "ultrafeedback.jsonl", "eval": "held_out.jsonl"},
            "ranker": "python:pairrm:score",
            "output_dir": str(folder),
            "iterations": iterations,
        }
        | settings
    )
    made = _Maker(folder, random.Random(seed), steps, prompts, gain, config.exploration_weight, text)
    held_out = {"eval": "rows"} if config.data.eval is not None else {}
    stages = plan_stages(config, {"model": "a model", "data": "rows"} | held_out)
    record = {"config": config.to_json(), "versions": VERSIONS, "stages": [stage.title for stage in stages]}
    write_json(folder / "run.json", record | {"done": stop is None})
    for number, stage in [(stage.iteration, stage.name) for stage in stages]:
        if (number, stage) == stop:
            if stage == "train":
                made.metrics(folder / f"iter-{number}/train", number, stop_at=steps // 2)
            break
        made.stage(number, stage)
    return folder


def write_train(folder: Path, *, steps: int = 40, seed: int = 0, done: bool = True, **settings: Any) -> Path:
    """A folder of `train` alone."""
    config = Config.model_validate(
        {
            "model": {"path": "HuggingFaceH4/mistral-7b-sft-beta"},
            "data": {"train": "ranked.jsonl", "eval": "held_out.jsonl"},
            "output_dir": str(folder),
        }
        | settings
    )
    made = _Maker(folder, random.Random(seed), steps, 0, 0.0, config.exploration_weight, None)
    made.metrics(folder, 1, stop_at=None if done else steps // 2)
    write_json(folder / "run.json", {"config": config.to_json(), "versions": VERSIONS, "done": done})
    return folder


def write_json(path: Path, value: Any) -> None:
    """A JSON file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True) + "\n", "utf-8")


def write_lines(path: Path, values: list[Any]) -> None:
    """A JSONL file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")


def write_manifest(folder: Path, stage: str, number: int, counts: Numbers, seconds: float) -> None:
    """The manifest of a stage, over the files that are in its folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.glob("*"))
        if path.name != "manifest.json"
    }
    manifest = {"stage": stage, "iteration": number, "key": "0" * 64, "settings": {}, "inputs": {}, "counts": counts}
    write_json(
        folder / "manifest.json",
        manifest | {"files": files, "seconds": seconds, "processes": 1, "versions": VERSIONS},
    )


class _Maker:
    def __init__(
        self,
        run: Path,
        rng: random.Random,
        steps: int,
        prompts: int,
        gain: float,
        weight: float,
        text: Callable[[int], tuple[str, str, str]] | None,
    ) -> None:
        self.run, self.rng, self.steps, self.prompts, self.gain, self.weight = run, rng, steps, prompts, gain, weight
        self.text = text or self._text

    def stage(self, number: int, stage: str) -> None:
        """Write a stage's folder."""
        folder = self.run / ("" if stage == "prepare" else f"iter-{number}") / stage
        folder.mkdir(parents=True)
        counts: Numbers = getattr(self, stage)(folder, number) if stage != "prepare" else {}
        write_manifest(folder, stage, number, counts, round(SECONDS[stage] * self.rng.uniform(0.8, 1.2), 3))

    def rollout(self, folder: Path, number: int) -> Numbers:
        cut = self.rng.randrange(200, 900)
        return {
            "prompts": 20378,
            "responses": 20378,
            "skipped": {"prompt longer than data.max_prompt_length": self.rng.randrange(40, 90)},
            "finish": {"stop": 20378 - cut, "length": cut},
            "tokens": {"mean": 268.4 + 20 * number, "median": 240, "p95": 610, "max": 1024},
        }

    def rank(self, folder: Path, number: int) -> Numbers:
        counts = self._ranked(20378, number)
        return counts | {"held_out": self._ranked(500, number)}

    def _ranked(self, prompts: int, number: int) -> Numbers:
        skipped = {"tie": self.rng.randrange(prompts // 100), "identical pair": self.rng.randrange(prompts // 200 + 1)}
        groups = prompts - sum(skipped.values())
        win = int(groups * min(0.42 + 0.06 * number, 0.9))
        lose, few = int(groups * 0.21), groups // 100
        return {
            "prompts": prompts,
            "groups": groups,
            "skipped": skipped,
            "identical_candidates": self.rng.randrange(30),
            "chosen_is": {"response 1": win, "offline chosen": groups - win - few, "offline rejected": few},
            "rejected_is": {"response 1": lose, "offline chosen": few, "offline rejected": groups - lose - few},
            "explored_is_chosen": win if self.weight else 0,
            "explored_is_rejected": lose if self.weight else 0,
            "mean_tokens": {
                "chosen": 290.0 + 15 * number,
                "rejected": 220.0 + 5 * number,
                "explored": 260.0 + 22 * number if self.weight else None,
            },
            "mean_score": {"chosen": 1.9 + 0.2 * number, "rejected": -1.7 + 0.1 * number},
            "responses_win": win / groups,
        }

    def cache(self, folder: Path, number: int) -> Numbers:
        return {"sequences": 52000}

    def train(self, folder: Path, number: int) -> Numbers:
        self.metrics(folder, number)
        write_json(folder / "run.json", {"config": {}, "done": True})
        return {"steps": self.steps, "groups": 20300, "bad_steps": 1, "groups_per_second": 5.37, "memory_gib": 71.3}

    def metrics(self, folder: Path, number: int, stop_at: int | None = None) -> None:
        """metrics.jsonl, with a step that was not finite."""
        rng, lines = self.rng, [self._held_out(0.0, 0)]
        for step in range(1, (stop_at or self.steps) + 1):
            part = step / self.steps
            margin = 0.42 * (1 - math.exp(-3 * part)) / number**0.5 * rng.uniform(0.75, 1.25)
            rejected = -0.35 * part * rng.uniform(0.7, 1.3)
            explored = rejected + 0.6 * margin
            preference = math.log1p(math.exp(-margin)) + rng.gauss(0, 0.008)
            exploration = self.weight * explored / 0.01
            line: Numbers = {
                "step": step,
                "epoch": part,
                "loss": preference + exploration,
                "loss/preference": preference,
                "loss/exploration": exploration,
                "rewards/chosen": rejected + margin,
                "rewards/rejected": rejected,
                "rewards/explored": explored if self.weight else None,
                "rewards/margins": margin,
                "rewards/accuracies": 0.0 if step == 1 else min(1.0, 0.52 + 0.24 * part + rng.gauss(0, 0.03)),
                "logps/chosen": -300.0,
                "logps/rejected": -280.0,
                "logps/explored": -250.0,
                "grad_norm": rng.uniform(4, 9),
                "learning_rate": 5e-7 * (1 - part),
                "num_tokens": 60000 * step,
                "bad_steps": int(step >= 10),
                "tokens_per_second": rng.gauss(5200, 90),
                "groups_per_second": rng.gauss(5.4, 0.1),
                "memory_gib": min(71.3, 68 + 8 * part),
            }
            if step == 10:
                line |= {name: None for name in ("loss", "loss/preference", "loss/exploration", "grad_norm")}
                line |= {
                    f"rewards/{kind}": None for kind in ("chosen", "rejected", "explored", "margins", "accuracies")
                }
            lines.append(line)
            if step in (self.steps // 2, self.steps):
                lines.append(self._held_out(part, step))
        write_lines(folder / "metrics.jsonl", lines)

    def _held_out(self, part: float, step: int) -> Numbers:
        margin = 0.33 * (1 - math.exp(-3 * part))
        return {
            "step": step,
            "eval_loss": math.log1p(math.exp(-margin)),
            "eval_rewards/chosen": margin - 0.3 * part,
            "eval_rewards/rejected": -0.3 * part,
            "eval_rewards/margins": margin,
            "eval_rewards/accuracies": 0.69 if step else 0.0,
        }

    def evaluate(self, folder: Path, number: int) -> Numbers:
        rows = []
        for row in range(self.prompts):
            prompt, response, reference = self.text(row)
            rows.append(
                {
                    "row": row,
                    "prompt": prompt,
                    "response": response,
                    "tokens": max(4, int(self.rng.lognormvariate(5.3 + 0.08 * number, 0.55))),
                    "finish": "length" if self.rng.random() < 0.04 else "stop",
                    "score": round(self.rng.gauss(-0.6 + self.gain * number, 1.0), 4),
                    "reference": reference,
                    "reference_score": round(self.rng.gauss(0.1, 1.1), 4),
                }
            )
        write_lines(folder / "responses.jsonl", rows)
        scores = [row["score"] for row in rows]
        mean, half = sum(scores) / len(scores), 1.96 / len(scores) ** 0.5
        counts: Numbers = {
            "prompts": self.prompts,
            "reward": {"mean": mean, "low": mean - half, "high": mean + half},
            "reference_reward": {"mean": 0.1012, "low": 0.0311, "high": 0.1713},
            "win_rate": {"reference": self._wins(0.38 + 0.07 * number)},
            "tokens": {"mean": 231.5 + 18 * number, "median": 214, "p95": 640, "max": 1024},
            "cut": 0.0412,
        }
        if number > 0:
            counts["win_rate"]["base"] = self._wins(0.5 + 0.09 * number)
            counts["kl"] = {
                "reference": {"mean": 3.1234 / number, "se": 0.0712},
                "base": {"mean": 3.1234 * number**1.3, "se": 0.0987},
            }
        if number > 1:
            counts["win_rate"]["first"] = self._wins(0.48 + 0.05 * number)
        write_json(folder / "metrics.json", counts)
        return counts

    def _wins(self, rate: float) -> Numbers:
        rate = min(rate, 0.9)
        wins, ties = int(self.prompts * rate), self.prompts // 20
        half = 0.98 / self.prompts**0.5
        return {
            "wins": wins,
            "ties": ties,
            "losses": self.prompts - wins - ties,
            "plain": [rate, rate - half, rate + half],
            "length_controlled": [rate - 0.031, rate - 0.031 - half, rate - 0.031 + half],
        }

    def _text(self, row: int) -> tuple[str, str, str]:
        ask = ASKS[row % len(ASKS)].format(TOPICS[row % len(TOPICS)])
        said = [" ".join(self.rng.choices(SENTENCES, k=self.rng.randrange(2, 14))) for _ in range(2)]
        return ask, said[0].replace(". There", ".\n\nThere"), said[1]
