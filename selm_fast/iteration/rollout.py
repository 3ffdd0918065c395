"""Rollout: the responses of a model to the prompts of a portion, shard by shard.

A shard is one fixed list of batches, generated whole: neither a stop nor the number of processes changes which prompts
meet in a batch, so that both leave every response as it was.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selm_fast.data.dataset import LengthStats
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration.generate import Generator
from selm_fast.iteration.job import Job, read_lines, write_lines
from selm_fast.iteration.plan import num_portions
from selm_fast.iteration.prompts import Prompt, Prompts, load_prompts

POLICY, BASE = "policy", "base"
_MANY_CUT = 0.5


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of responses: by batch, indices into the prompts."""

    name: str
    batches: tuple[tuple[int, ...], ...]

    @property
    def num_prompts(self) -> int:
        return sum(map(len, self.batches))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model answers: `copies` responses to each prompt; temperature 0 is greedy."""

    copies: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


def plan_shards(
    lengths: Sequence[int], *, stem: str, copies: int, max_new_tokens: int, max_tokens: int, shard_prompts: int
) -> list[Shard]:
    """Cut prompts, the longest first, into batches of at most `max_tokens` padded tokens and shards of whole batches.

    lengths: tokens of each prompt.  shard_prompts: a shard is full once it has so many.
    Raises Refused where one prompt alone exceeds a batch.
    """
    longest = max(lengths, default=0)
    if copies * (longest + max_new_tokens) > max_tokens:
        raise Refused(
            f"rollout.max_tokens is {max_tokens}; {copies} responses of {max_new_tokens} tokens to a prompt of "
            f"{longest} take {copies * (longest + max_new_tokens)}: raise it"
        )
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:  # a batch is as wide as its first prompt
            batches.append([])
            room = max_tokens // (copies * (lengths[index] + max_new_tokens))
        batches[-1].append(index)
        room -= 1
    shards: list[list[tuple[int, ...]]] = []
    filled = shard_prompts
    for batch in batches:
        if filled >= shard_prompts:
            shards.append([])
            filled = 0
        shards[-1].append(tuple(batch))
        filled += len(batch)
    return [Shard(f"{stem}-{number:05d}.jsonl", tuple(members)) for number, members in enumerate(shards)]


def rollout(job: Job) -> None:
    """This process's shards of the responses of the policy and, where it explores, of the base model."""
    tokenizer = load_tokenizer(job.paths.tokenizer)
    prompts = portion_prompts(job, tokenizer).prompts
    for stem, (model, sampling) in _passes(job).items():
        answer_prompts(job, tokenizer, prompts, model=model, stem=stem, sampling=sampling)


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
    share = check_cut(job, responses)
    lengths = LengthStats.of(len(response["ids"]) for response in responses)
    job.display.say(
        f"{len(responses)} responses to {len(found.prompts)} prompts; mean tokens {lengths.mean:.1f}, {share:.0%} cut"
    )
    for reason, count in found.skipped.items():
        job.display.say(f"  skipped: {count} {reason}")
    return {
        "prompts": len(found.prompts),
        "responses": len(responses),
        "skipped": dict(found.skipped),
        "finish": {
            "stop": round(len(responses) * (1 - share)),
            "length": round(len(responses) * share),
        },
        "tokens": {"mean": lengths.mean, "median": lengths.median, "p95": lengths.p95, "max": lengths.max},
    }


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
    job: Job, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, model: str, stem: str, sampling: Sampling
) -> None:
    """Generate this process's shards `<stem>-*.jsonl` that are not there yet.

    Raises Stopped after a signal; finished shards are kept, the one under way is begun again.
    """
    settings = job.config.rollout
    shards = plan_shards(
        [len(prompt.ids) for prompt in prompts], stem=stem, copies=sampling.copies,
        max_new_tokens=settings.max_new_tokens, max_tokens=settings.max_tokens, shard_prompts=settings.shard_prompts,
    )  # fmt: skip
    names = {shard.name: shard for shard in shards}
    mine = [names[name] for name in job.mine(names)]
    missing = [shard for shard in mine if not (job.folder / shard.name).exists()]
    done = sum(shard.num_prompts for shard in mine) - sum(shard.num_prompts for shard in missing)
    if not missing:
        return
    generator = Generator(model, tokenizer, job.config)
    total = sum(shard.num_prompts for shard in mine)
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.display.phase(f"{stem} responses", total, "prompts", done=done) as phase:
        for shard in missing:
            lines = []
            with torch.random.fork_rng():
                torch.manual_seed(_seed(job, shard.name))
                for batch in shard.batches:
                    if job.stop.requested:
                        raise Stopped(f"stopped in {job.stage.title}; {done} of {total} prompts have their responses")
                    answers = generator.answer(
                        [prompts[i].ids for i in batch], copies=sampling.copies, temperature=sampling.temperature,
                        top_p=sampling.top_p,
                    )  # fmt: skip
                    for index, responses in zip(batch, answers, strict=True):
                        lines.append(_line(prompts[index], responses, tokenizer))
                    phase.advance(len(batch))
            write_lines(job.folder / shard.name, lines)
            done += shard.num_prompts


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


def _line(prompt: Prompt, responses: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "row": prompt.row,
        "prompt_ids": prompt.ids,
        "responses": [
            {
                "ids": response.ids,
                "text": str(tokenizer.hf.decode(response.ids, skip_special_tokens=True)).strip(),
                "finish": response.finish,
            }
            for response in responses
        ],
    }
