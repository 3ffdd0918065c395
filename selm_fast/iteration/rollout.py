"""Rollout: the responses of a model to the prompts of a portion, shard by shard."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selm_fast.data.dataset import LengthStats
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import RunFailed, Stopped
from selm_fast.iteration.engines import open_engine
from selm_fast.iteration.job import Job, read_lines, write_lines
from selm_fast.iteration.plan import num_portions
from selm_fast.iteration.prompts import Prompt, Prompts, load_prompts
from selm_fast.iteration.shards import LENGTH, SKIPPED, STOP, Engine, Response, Sampling, plan_shards

POLICY, BASE = "policy", "base"
_MANY_CUT = 0.5


def rollout(job: Job) -> None:
    """This process's shards of the responses of the policy and, where it explores, of the base model."""
    tokenizer = load_tokenizer(job.paths.tokenizer)
    prompts = portion_prompts(job, tokenizer).prompts
    for stem, (model, sampling) in _passes(job).items():
        with open_engine(job, tokenizer, model) as engine:
            answer_prompts(job, tokenizer, prompts, engine, stem=stem, sampling=sampling)


def finish_rollout(job: Job) -> dict[str, Any]:
    """Counts of all shards, once every one is there. Raises RunFailed where too many responses were cut."""
    tokenizer = load_tokenizer(job.paths.tokenizer)
    found = portion_prompts(job, tokenizer)
    responses = []
    for stem, (_, sampling) in _passes(job).items():
        lines = list(shard_lines(job.folder, stem))
        if sorted(line["row"] for line in lines) != sorted(prompt.row for prompt in found.prompts):
            raise RunFailed(f"{job.folder}: the {stem} shards do not hold every prompt once; remove the folder")
        assert all(len(line["responses"]) == sampling.copies for line in lines)
        responses += [response for line in lines for response in line["responses"]]
    check_asked(job, responses)
    share = check_cut(job, responses)
    finish = {STOP: 0, LENGTH: 0} | Counter(response["finish"] for response in responses)
    retokenised = sum("retokenised" in response for response in responses)
    lengths = LengthStats.of(len(response["ids"]) for response in responses)
    job.display.say(
        f"{len(responses)} responses to {len(found.prompts)} prompts; mean tokens {lengths.mean:.1f}, {share:.0%} cut"
    )
    for reason, count in found.skipped.items():
        job.display.say(f"  skipped: {count} {reason}")
    if retokenised:
        job.display.say(f"  {retokenised} responses came as text and were tokenised here, maybe into other ids")
    return {
        "prompts": len(found.prompts),
        "responses": len(responses),
        "skipped": dict(found.skipped),
        "finish": finish,
        "retokenised": retokenised,
        "tokens": {"mean": lengths.mean, "median": lengths.median, "p95": lengths.p95, "max": lengths.max},
    }


def check_asked(job: Job, responses: Sequence[dict[str, Any]]) -> None:
    """Say how many prompts could not be asked. Raises RunFailed where they are more than data.max_skipped."""
    count = sum(response["finish"] == SKIPPED for response in responses)
    if count == 0:
        return
    text = f"{count} of {len(responses)} responses are missing: no text has the token ids of their prompts"
    if count > job.config.data.max_skipped * len(responses):
        raise RunFailed(
            f"{text}; at most data.max_skipped = {job.config.data.max_skipped:.1%} may be: use servers that take token "
            f"ids (vLLM, SGLang), or rollout.engine transformers, and remove {job.folder}"
        )
    job.display.say(f"  {text}")


def check_cut(job: Job, responses: Sequence[dict[str, Any]]) -> float:
    """Share of responses that have no end, warned of where they are many.

    Raises RunFailed above data.max_cut: a model that does not end its answers teaches nothing about them.
    """
    share = statistics.fmean(response["finish"] == "length" for response in responses)
    text = (
        f"{share:.0%} of {len(responses)} responses were cut at rollout.max_new_tokens = "
        f"{job.config.rollout.max_new_tokens}"
    )
    if share > job.config.data.max_cut:
        raise RunFailed(
            f"{text}; at most data.max_cut = {job.config.data.max_cut:.0%} may be: raise one of the two, or look "
            f"at {job.folder}: a model that never ends its answers may lack its EOS"
        )
    if share > _MANY_CUT:
        job.display.say(f"warning: {text}")
    return share


def portion_prompts(job: Job, tokenizer: Tokenizer, *, pair_ids: bool = False) -> Prompts:
    """The prompts of this iteration's portion."""
    portions = num_portions(job.paths.config)
    return load_prompts(
        job.paths.train_rows, job.config.data, tokenizer,
        portion=((job.stage.iteration - 1) % portions, portions, job.config.seed),
        pairs=job.config.rank.offline_pair, pair_ids=pair_ids, offline_scores=not _passes(job),
    )  # fmt: skip


def answer_prompts(
    job: Job, tokenizer: Tokenizer, prompts: Sequence[Prompt], engine: Engine, *, stem: str, sampling: Sampling
) -> None:
    """Have this process's shards `<stem>-*.jsonl` made that are not there yet.

    Raises Stopped after a signal; finished shards are kept, those under way are begun again.
    """
    settings = job.config.rollout
    shards = plan_shards(
        [len(prompt.ids) for prompt in prompts], stem=stem, copies=sampling.copies,
        max_new_tokens=settings.max_new_tokens, shard_prompts=settings.shard_prompts,
        max_tokens=settings.max_tokens if settings.engine == "transformers" else None,
    )  # fmt: skip
    names = {shard.name: shard for shard in shards}
    mine = [names[name] for name in job.mine(names)]
    missing = [shard for shard in mine if not (job.folder / shard.name).exists()]
    total = sum(shard.num_prompts for shard in mine)
    done = total - sum(shard.num_prompts for shard in missing)
    if not missing:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.display.phase(f"{stem} responses", total, "prompts", done=done) as phase:
        answered = engine.answer(
            missing, prompts, sampling, seed=lambda name: _seed(job, name), on_answered=phase.advance
        )
        for shard, answers in answered:
            lines = [_line(prompts[index], answers[index], tokenizer) for index in shard.prompts]
            write_lines(job.folder / shard.name, lines)
            done += shard.num_prompts
    if done < total:
        raise Stopped(f"stopped in {job.stage.title}; {done} of {total} prompts have their responses")


def shard_names(folder: Path, stem: str) -> list[str]:
    """The files of one pass, in order."""
    return sorted(path.name for path in folder.glob(f"{stem}-*.jsonl"))


def shard_lines(folder: Path, stem: str) -> list[dict[str, Any]]:
    """Every line of one pass of a stage that is not finished yet, in the order of its shards."""
    return [
        json.loads(line) for name in shard_names(folder, stem) for line in (folder / name).read_bytes().splitlines()
    ]


def finished_lines(folder: Path, stem: str) -> dict[int, dict[str, Any]]:
    """Every line of one pass of a finished stage by its row, each file checked against the stage's manifest."""
    return {line["row"]: line for name in shard_names(folder, stem) for line in read_lines(folder, name)}


def _passes(job: Job) -> dict[str, tuple[str, Sampling]]:
    """Which models answer, and how: the policy, and the base where the exploration term takes its samples."""
    config = job.config
    sampling = Sampling(config.rollout.responses, config.rollout.temperature, config.rollout.top_p)
    passes = {POLICY: (job.paths.iterate(job.stage.iteration - 1), sampling)} if sampling.copies else {}
    if config.samples_base:
        passes[BASE] = (job.paths.iterate(0), Sampling(1, config.rollout.temperature, config.rollout.top_p))
    return passes


def _seed(job: Job, name: str) -> int:
    """A seed of its own for each shard: it does not matter which process makes it, or when."""
    text = f"{job.config.seed}/{job.stage.title}/{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _line(prompt: Prompt, responses: Sequence[Response], tokenizer: Tokenizer) -> dict[str, Any]:
    found = []
    for response in responses:
        text = str(tokenizer.hf.decode(response.ids, skip_special_tokens=True)).strip()
        line: dict[str, Any] = {"ids": response.ids, "text": text, "finish": response.finish}
        found.append(line | {"retokenised": True} if response.retokenised else line)
    return {"row": prompt.row, "prompt_ids": prompt.ids, "responses": found}
