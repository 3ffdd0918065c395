"""Evaluate: what an iterate answers on the held-out prompts, and how that compares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from selm_fast.data.dataset import LengthStats
from selm_fast.data.packing import TokenGroup, pack, sequence_key
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import RunFailed, Stopped
from selm_fast.iteration.engines import open_engine
from selm_fast.iteration.job import Job, read_lines, write_lines
from selm_fast.iteration.prompts import Prompt
from selm_fast.iteration.rank import held_out_prompts
from selm_fast.iteration.rankers import Ranker, open_ranker
from selm_fast.iteration.rollout import POLICY, answer_prompts, check_asked, check_cut, shard_lines
from selm_fast.iteration.shards import SKIPPED, Sampling
from selm_fast.iteration.win_rate import win_rate
from selm_fast.model import Policy
from selm_fast.report.intervals import mean_interval
from selm_fast.training import storage
from selm_fast.training.machine import choose_device

SAMPLE = "sample"  # at temperature 1, from which a KL divergence can be estimated
RESPONSES = "responses.jsonl"


def evaluate(job: Job) -> None:
    """Greedy responses and samples of one iterate; log-probs of the samples under it, its reference and the base."""
    number = job.stage.iteration
    tokenizer = load_tokenizer(job.paths.tokenizer)
    prompts = held_out_prompts(job, tokenizer)
    with open_engine(job, tokenizer, job.paths.iterate(number)) as engine:
        answer_prompts(job, tokenizer, prompts, engine, stem=POLICY, sampling=Sampling())
        if number == 0:
            return
        answer_prompts(job, tokenizer, prompts, engine, stem=SAMPLE, sampling=Sampling(temperature=1.0))
    lines = shard_lines(job.folder, SAMPLE)
    samples = [(line["prompt_ids"], ids) for line in lines if (ids := line["responses"][0]["ids"])]
    if not samples:
        return  # `finish_evaluate` says why
    for name, other in _compared(job).items():
        path = job.scratch / f"logps-{name}.json"
        if not path.exists():
            job.scratch.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(path, storage.to_json(_log_probs(job, other, samples, name)))


def finish_evaluate(job: Job) -> dict[str, Any]:
    """Score the responses, and compare them with those of iterations 0 and 1 and with the reference answers."""
    number = job.stage.iteration
    prompts = held_out_prompts(job, load_tokenizer(job.paths.tokenizer), pair_ids=True)
    found = {line["row"]: line["responses"][0] for line in shard_lines(job.folder, POLICY)}
    check_asked(job, list(found.values()))
    check_cut(job, list(found.values()))
    counts: dict[str, Any] = {"prompts": len(prompts)}
    # A prompt that no server could be asked is no loss of the model's.
    lines = [_line(prompt, found[prompt.row]) for prompt in prompts if found[prompt.row]["finish"] != SKIPPED]
    if not lines:
        raise RunFailed(f"none of {len(prompts)} held-out prompts has a response; see {job.folder}")
    if job.config.ranker is not None:
        with open_ranker(job.config) as ranker:
            counts |= _rewards(job, ranker, lines)
            others = {"base": 0, "first": 1}
            counts["win_rate"] |= {
                name: _against(job, ranker, lines, other) for name, other in others.items() if other < number
            }
    write_lines(job.folder / RESPONSES, lines)
    lengths = LengthStats.of(line["tokens"] for line in lines)
    counts["tokens"] = {"mean": lengths.mean, "median": lengths.median, "p95": lengths.p95, "max": lengths.max}
    counts["cut"] = statistics.fmean(line["finish"] == "length" for line in lines)
    if number > 0:
        counts["kl"] = _divergences(job)
    storage.write_atomic(job.folder / "metrics.json", storage.to_json(counts))
    return counts


def _line(prompt: Prompt, response: Mapping[str, Any]) -> dict[str, Any]:
    reference = prompt.offline[0] if prompt.offline is not None else None
    return {
        "row": prompt.row,
        "prompt": prompt.text,
        "response": response["text"],
        "tokens": len(response["ids"]),
        "finish": response["finish"],
        "score": None,
        "reference": reference and reference[0],
        "reference_tokens": reference and len(reference[1]),
        "reference_score": None,
    }


def _rewards(job: Job, ranker: Ranker, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Score each response beside its reference answer, or alone; the scores go into the lines."""
    texts = [(line["prompt"], [line["response"], *filter(None, [line["reference"]])]) for line in lines]
    scores = ranker.score(texts, lambda _: _check_stop(job))
    for line, values in zip(lines, scores, strict=True):
        line["score"] = _finite(values[0])
        line["reference_score"] = _finite(values[1]) if len(values) > 1 else None
    compared = [line for line in lines if line["reference"] is not None]
    rewards: dict[str, Any] = {"reward": mean_interval(_scores(lines, "score")), "reference_reward": None}
    if not compared:
        return rewards | {"win_rate": {}}
    rewards["reference_reward"] = mean_interval(_scores(compared, "reference_score"))
    versus = win_rate(
        _scores(compared, "score"), _scores(compared, "reference_score"), [line["tokens"] for line in compared],
        [line["reference_tokens"] for line in compared],
    )  # fmt: skip
    return rewards | {"win_rate": {"reference": versus}}


def _against(job: Job, ranker: Ranker, lines: Sequence[dict[str, Any]], other: int) -> dict[str, Any]:
    """Win rate against the responses of an earlier iterate, scored side by side."""
    theirs = {line["row"]: line for line in read_lines(job.paths.stage(other, "evaluate"), RESPONSES)}
    lines = [line for line in lines if line["row"] in theirs]
    texts = [(line["prompt"], [line["response"], theirs[line["row"]]["response"]]) for line in lines]
    scores = np.array(ranker.score(texts, lambda _: _check_stop(job))).reshape(-1, 2)
    tokens = [theirs[line["row"]]["tokens"] for line in lines]
    return win_rate(scores[:, 0], scores[:, 1], [line["tokens"] for line in lines], tokens)


def _scores(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [math.nan if line[name] is None else line[name] for line in lines]


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _compared(job: Job) -> dict[str, str]:
    """The models whose log-probs of the samples are wanted, by name; those that are one model once."""
    number = job.stage.iteration
    reference = 0 if job.paths.config.reference == "base" else number - 1
    models = {"policy": number, "reference": reference, "base": 0}
    return {name: job.paths.iterate(which) for name, which in models.items() if name != "base" or reference != 0}


def _log_probs(job: Job, model: str, samples: Sequence[tuple[list[int], list[int]]], name: str) -> list[float]:
    """Log-prob (nats) of every sample under a model."""
    device, dtype = choose_device(job.config)
    trust = job.config.model.trust_remote_code
    policy = Policy.from_pretrained(model, dtype=dtype, device=device, trust_remote_code=trust)
    groups = [TokenGroup(prompt, ids, ids) for prompt, ids in samples]
    by_key: dict[bytes, float] = {}
    longest = max(group.num_tokens() for group in groups)
    with torch.no_grad(), job.display.phase(f"log-probs, {name}", len(groups), "samples") as phase:
        for batch in pack(groups, max_tokens=max(longest, job.config.batch.max_tokens)):
            _check_stop(job)
            values = policy.sequence_logps(batch.to(device)).cpu()
            by_key |= dict(zip(batch.sequence_keys, values.tolist(), strict=True))
            phase.advance(batch.num_groups)
    return [by_key[sequence_key(prompt, ids)] for prompt, ids in samples]


def _check_stop(job: Job) -> None:
    if job.stop.requested:
        raise Stopped(f"stopped in {job.stage.title}; its responses are saved")


def _divergences(job: Job) -> dict[str, Any]:
    """KL divergence of the iterate from its reference and from the base, nats a response, with standard errors.

    KL(pi || q) = E over y ~ pi of [log pi(y) - log q(y)], estimated by one sample a held-out prompt.
    """
    logps = {
        path.stem.removeprefix("logps-"): np.array(storage.read_json(path))
        for path in sorted(job.scratch.glob("logps-*.json"))
    }
    logps.setdefault("base", logps["reference"])
    found = {}
    for name in ("reference", "base"):
        ratios = logps["policy"] - logps[name]
        error = ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
        found[name] = {"mean": float(ratios.mean()), "se": None if error is None else float(error)}
    return found
