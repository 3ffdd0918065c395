"""Evaluate: every figure of an iterate, made again from its responses, the ranker and the models themselves."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from selm_fast.config import RunConfig
from selm_fast.data.dataset import load_groups
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import RunFailed
from selm_fast.iteration.generate import Generator
from selm_fast.iteration.job import read_manifest
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.rollout import plan_shards
from selm_fast.iteration.stages import do_part, finish
from selm_fast.iteration.win_rate import length_controlled

from ..training.harness import own_logp, own_model, write_rows
from .harness import Finished, MakeRun, do_stages, job_of, lines, reward, shards

Z = 1.959963984540054


def metrics_of(paths: Paths, number: int) -> dict[str, Any]:
    folder = paths.stage(number, "evaluate")
    manifest = read_manifest(folder)
    assert manifest is not None
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    assert manifest["counts"] == found
    return found


def responses_of(paths: Paths, number: int) -> list[dict[str, Any]]:
    return lines(paths.stage(number, "evaluate") / "responses.jsonl")


def interval(values: list[float]) -> dict[str, Any]:
    """The mean and its normal 95% interval."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return {
        "mean": pytest.approx(mean),
        "low": pytest.approx(mean - Z * error),
        "high": pytest.approx(mean + Z * error),
    }


def versus(ours: list[tuple[float, int]], theirs: list[tuple[float, int]]) -> dict[str, Any]:
    """Win rate of (score, tokens) over (score, tokens); the plain one with Wilson's interval."""
    outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    n, rate = len(outcomes), statistics.fmean(outcomes)
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n * n)) / (1 + Z**2 / n)
    differences = torch.tensor([a - b for (_, a), (_, b) in zip(ours, theirs, strict=True)]).double().numpy()
    return {
        "wins": outcomes.count(1.0),
        "ties": outcomes.count(0.5),
        "losses": outcomes.count(0.0),
        "unscored": 0,
        "plain": pytest.approx([rate, centre - half, centre + half]),
        "length_controlled": pytest.approx(length_controlled(torch.tensor(outcomes).double().numpy(), differences)),
    }


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_figures_are_those_of_the_responses(finished: Finished, name: str, number: int) -> None:
    paths = finished(name)
    found, ours = metrics_of(paths, number), responses_of(paths, number)
    assert found["prompts"] == len(ours) == 5
    assert found["reward"] == interval([line["score"] for line in ours])
    assert found["reference_reward"] == interval([line["reference_score"] for line in ours])
    tokens = sorted(line["tokens"] for line in ours)
    assert found["tokens"] == {
        "mean": pytest.approx(statistics.fmean(tokens)), "median": tokens[2], "p95": tokens[-1], "max": tokens[-1],
    }  # fmt: skip
    assert found["cut"] == pytest.approx(sum(line["finish"] == "length" for line in ours) / 5)
    scored = [(line["score"], line["tokens"]) for line in ours]
    expected = {"reference": versus(scored, [(line["reference_score"], line["reference_tokens"]) for line in ours])}
    for other, which in (("base", 0), ("first", 1)):
        if which < number:
            theirs = [(line["score"], line["tokens"]) for line in responses_of(paths, which)]
            expected[other] = versus(scored, theirs)
    assert found["win_rate"] == expected


@pytest.mark.parametrize("number", [0, 1, 2])
def test_responses_are_greedy_and_scored_beside_the_reference_answer(finished: Finished, number: int) -> None:
    paths = finished("selm")
    model = paths.start if number == 0 else paths.stage(number, "train") / "model"
    own, tokenizer = own_model(model, torch.float32), load_tokenizer(paths.tokenizer)
    groups = load_groups(paths.eval_rows, paths.config.data, tokenizer, wants_explored=False).groups
    rows = lines(Path(str(paths.eval_rows)))
    found = responses_of(paths, number)
    assert [line["row"] for line in found] == [0, 1, 2, 3, 4]
    for line, group, row in zip(found, groups, rows, strict=True):
        ids = torch.tensor([group.prompt])
        output = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        answer = output[0, len(group.prompt) :].tolist()
        chat = not isinstance(row["prompt"], str)
        reference = row["chosen"][-1]["content"] if chat else row["chosen"]
        assert line == {
            "row": group.row_id,
            "prompt": row["prompt"][-1]["content"] if chat else row["prompt"],
            "response": tokenizer.hf.decode(answer, skip_special_tokens=True).strip(),
            "tokens": len(answer),
            "finish": "stop" if answer[-1] == 1 else "length",
            "score": reward(tokenizer.hf.decode(answer, skip_special_tokens=True).strip()),
            "reference": reference,
            "reference_tokens": len(group.chosen),
            "reference_score": reward(reference),
        }


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_divergences_are_those_of_the_models_own_log_probs(finished: Finished, name: str, number: int) -> None:
    """Of the very samples, by separate forwards of transformers' own models."""
    paths = finished(name)
    folder = paths.stage(number, "evaluate")
    samples = [(line["prompt_ids"], line["responses"][0]["ids"]) for line in shards(folder, "sample")]
    assert len(samples) == 5
    assert (
        len(
            {tuple(ids) for _, ids in samples}
            - {tuple(line["responses"][0]["ids"]) for line in shards(folder, "policy")}
        )
        > 2
    )
    reference = 0 if name == "xpo" else number - 1
    logps = {}
    for which, iterate in (("policy", number), ("reference", reference), ("base", 0)):
        model = own_model(paths.start if iterate == 0 else paths.stage(iterate, "train") / "model", torch.float32)
        with torch.no_grad():
            logps[which] = [own_logp(model, prompt, ids).item() for prompt, ids in samples]
    found = metrics_of(paths, number)["kl"]
    assert set(found) == {"reference", "base"}
    for which in found:
        ratios = [a - b for a, b in zip(logps["policy"], logps[which], strict=True)]
        assert found[which]["mean"] == pytest.approx(statistics.fmean(ratios), abs=1e-4)
        assert found[which]["se"] == pytest.approx(statistics.stdev(ratios) / math.sqrt(5), abs=1e-4)
    assert (found["reference"] == found["base"]) == (reference == 0)
    assert found["base"]["mean"] > 0.1  # the model has moved

    assert not (folder / "scratch").exists()
    try:
        do_part(job_of(paths.config, f"iter-{number}/evaluate"))  # the responses are there: the log-probs alone
        kept = {path.stem: json.loads(path.read_text()) for path in (folder / "scratch").iterdir()}
    finally:
        shutil.rmtree(folder / "scratch")
    wanted = {"policy", "reference"} | ({"base"} if reference != 0 else set())  # one model is asked once
    assert set(kept) == {f"logps-{which}" for which in wanted}
    for which in wanted:
        assert kept[f"logps-{which}"] == pytest.approx(logps[which], abs=1e-4)


def test_samples_are_drawn_at_temperature_1(finished: Finished) -> None:
    """Drawn again, from the seed of their shard: KL is an expectation under the model itself."""
    paths = finished("selm")
    tokenizer, rollout = load_tokenizer(paths.tokenizer), paths.config.rollout
    prompts = [line["prompt_ids"] for line in shards(paths.stage(1, "evaluate"), "sample")]
    drawn = {tuple(line["prompt_ids"]): line["responses"][0] for line in shards(paths.stage(1, "evaluate"), "sample")}
    planned = plan_shards(
        [len(ids) for ids in prompts], stem="sample", copies=1, max_new_tokens=rollout.max_new_tokens,
        max_tokens=rollout.max_tokens, shard_prompts=rollout.shard_prompts,
    )  # fmt: skip
    generator = Generator(paths.iterate(1), tokenizer, paths.config)
    for shard in planned:
        seed = hashlib.sha256(f"{paths.config.seed}/iter-1/evaluate/{shard.name}".encode()).digest()[:8]
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(seed, "little") >> 1)
            for batch in shard.batches:
                answers = generator.answer([prompts[i] for i in batch], temperature=1.0)
                for index, (answer,) in zip(batch, answers, strict=True):
                    assert answer.ids == drawn[tuple(prompts[index])]["ids"]


def test_the_model_a_run_begins_with_diverges_from_nothing(finished: Finished) -> None:
    for name in ("selm", "xpo"):
        paths = finished(name)
        assert "kl" not in metrics_of(paths, 0)
        assert not list(paths.stage(0, "evaluate").glob("sample-*"))
        assert set(metrics_of(paths, 0)["win_rate"]) == {"reference"}


def test_without_held_out_prompts_nothing_is_evaluated(finished: Finished) -> None:
    paths = finished("dpo first")
    assert not list(paths.root.rglob("evaluate"))
    assert not list(paths.root.rglob("held_out.jsonl"))
    assert paths.train_config(1).data.eval is None


# The first evaluation alone.


def evaluated(config: RunConfig) -> dict[str, Any]:
    do_stages(config, last="iter-0/evaluate")
    return metrics_of(Paths(config), 0)


def test_rows_without_reference_answers(make_run: MakeRun, tmp_path: Path) -> None:
    """Their responses are scored alone, and count for the reward; wins over the reference are of the others."""
    prompts = [{"prompt": f"why is {word}"} for word in ("the sky", "it", "the sea", "a tree")]
    alone = make_run("alone", data__eval=str(write_rows(tmp_path / "alone.jsonl", prompts)))
    found = evaluated(alone)
    ours = responses_of(Paths(alone), 0)
    assert found["prompts"] == 4
    assert found["reward"] == interval([reward(line["response"]) for line in ours])
    assert found["reference_reward"] is None
    assert found["win_rate"] == {}
    assert {(line["reference"], line["reference_tokens"], line["reference_score"]) for line in ours} == {(None,) * 3}

    pair = {"chosen": " because", "rejected": " not"}
    rows = [prompts[0], {**prompts[1], **pair}, prompts[2], {**prompts[3], **pair}]
    mixed = make_run("mixed", data__eval=str(write_rows(tmp_path / "mixed.jsonl", rows)))
    found = evaluated(mixed)
    same = responses_of(Paths(mixed), 0)
    assert [(line["response"], line["score"]) for line in same] == [(line["response"], line["score"]) for line in ours]
    assert found["reward"] == interval([line["score"] for line in ours])
    assert [line["reference"] for line in same] == [None, " because", None, " because"]
    wins = sum(line["score"] > reward(" because") for line in same[1::2])
    assert found["win_rate"]["reference"]["wins"] == wins
    assert found["win_rate"]["reference"]["losses"] == 2 - wins
    assert found["reference_reward"]["mean"] == reward(" because")


def test_scores_that_are_no_numbers_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    source = (
        "def score(prompts, candidates):\n    return [[float('nan') if ' 2' in p else len(t) for t in c] for p, c in "
    )
    (tmp_path / "a_gap.py").write_text(source + "zip(prompts, candidates)]\n")
    rows = [{"prompt": f"why {n}", "chosen": " because", "rejected": " not"} for n in range(4)]
    config = make_run(data__eval=str(write_rows(tmp_path / "gap.jsonl", rows)), ranker="python:a_gap:score")
    found, ours = evaluated(config), responses_of(Paths(config), 0)
    assert [line["score"] is None for line in ours] == [False, False, True, False]
    scores = [len(line["response"]) for line in ours if line["score"] is not None]
    assert found["reward"] == interval(list(map(float, scores)))
    assert found["win_rate"]["reference"]["unscored"] == 1
    assert found["win_rate"]["reference"]["wins"] == sum(score > 8 for score in scores)


def test_iterates_are_scored_side_by_side(
    make_run: MakeRun, tiny_model: Path, ending_model: Path, tmp_path: Path
) -> None:
    """A ranker's scores may depend on what it is shown together: this one's say which of two is the longer."""
    source = (
        "def score(prompts, candidates):\n    return [[len(t) - max(map(len, c)) for t in c] for c in candidates]\n"
    )
    (tmp_path / "a_comparison.py").write_text(source)
    rows = [{"prompt": f"why {n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    config = make_run(ranker="python:a_comparison:score", data__eval=str(write_rows(tmp_path / "rows.jsonl", rows)))
    paths = Paths(config)
    evaluated(config)
    shutil.copytree(ending_model, paths.stage(1, "train") / "model")  # instead of training
    job = job_of(config, "iter-1/evaluate")
    do_part(job)
    finish(job, 1.0)
    lengths = [[len(line["response"]) for line in responses_of(paths, number)] for number in (0, 1)]
    wins = sum(ours > theirs for theirs, ours in zip(*lengths, strict=True))
    losses = sum(ours < theirs for theirs, ours in zip(*lengths, strict=True))
    found = metrics_of(paths, 1)["win_rate"]["base"]
    assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, 9 - wins - losses)
    assert losses > 3
    scores = [[line["score"] for line in responses_of(paths, number)] for number in (0, 1)]
    assert sum(ours < theirs for theirs, ours in zip(*scores, strict=True)) < 3  # beside the reference answer


def test_without_a_ranker_there_is_no_reward(make_run: MakeRun) -> None:
    config = make_run(ranker=None, method="dpo", alpha=0.0, rollout__responses=0)
    found = evaluated(config)
    assert set(found) == {"prompts", "tokens", "cut"}
    assert {line["score"] for line in responses_of(Paths(config), 0)} == {None}


def test_the_first_prompts_alone(make_run: MakeRun) -> None:
    few, every = make_run("few", evaluation__prompts=2), make_run("every")
    assert evaluated(few)["prompts"] == 2
    evaluated(every)
    assert responses_of(Paths(few), 0) == responses_of(Paths(every), 0)[:2]


def test_hazard_22_an_iterate_that_never_ends_fails(make_run: MakeRun) -> None:
    config = make_run(data__max_cut=0.5)
    with pytest.raises(RunFailed, match="100% of 5 responses were cut"):
        do_stages(config, last="iter-0/evaluate")
    assert read_manifest(Paths(config).stage(0, "evaluate")) is None
