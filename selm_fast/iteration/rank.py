"""Rank: of each prompt's candidates the best becomes chosen and the worst rejected, as token ids."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import RunFailed, Stopped
from selm_fast.iteration.candidates import (
    BASE_RESPONSE,
    OFFLINE_CHOSEN,
    OFFLINE_REJECTED,
    Candidate,
    RankCounts,
    choose,
    response_name,
    row_line,
)
from selm_fast.iteration.job import Job
from selm_fast.iteration.prompts import Prompt, load_prompts
from selm_fast.iteration.rankers import PairRMRanker, Ranker, Texts, open_ranker
from selm_fast.iteration.rollout import BASE, POLICY, finished_lines, portion_prompts
from selm_fast.training import storage
from selm_fast.training.progress import Phase

ROWS, HELD_OUT = "rows", "held_out"
_Lines = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its candidates.

    given: where nothing is to be ranked, the scores that the rows bring along, or 1 and 0 by their order alone.
    min_margin: least difference of score; that of order alone has no size.
    """

    prompt: Prompt
    candidates: list[Candidate]
    explored_ids: list[int] | None
    given: tuple[float, float] | None = None
    min_margin: float = 0.0


def rank(job: Job) -> None:
    """This process's chunks of ranked rows, those of the portion and those of the held-out prompts."""
    chunks, skipped = _chunks(job)
    missing = [name for name in job.mine(chunks) if not (job.scratch / name).exists()]
    if not missing:
        return
    job.scratch.mkdir(parents=True, exist_ok=True)
    texts = {name: _texts(chunks[name]) for name in missing}
    with ExitStack() as stack:
        ranker = stack.enter_context(open_ranker(job.config)) if any(texts.values()) else None
        total = sum(map(ranker.work, texts.values())) if ranker is not None else 0
        with job.display.phase("ranking", total, ranker.unit if ranker is not None else "prompts") as phase:
            for name in missing:
                _check_stop(job)
                scores = _scores(job, ranker, texts[name], phase) if ranker is not None and texts[name] else []
                counts, lines = _choose(chunks[name], scores)
                head = {"counts": asdict(counts), "chunks": list(chunks), "unusable": dict(skipped)}
                storage.write_atomic(job.scratch / name, (json.dumps(head) + "\n" + "".join(lines)).encode())
        if isinstance(ranker, PairRMRanker) and ranker.rows:
            job.display.say(f"PairRM scored {ranker.rows:,} rows: {ranker.rows / ranker.seconds:.1f} rows/s")


def finish_rank(job: Job) -> dict[str, Any]:
    """Put the chunks together. Raises RunFailed where too many prompts gave no pair."""
    results = {ROWS: RankCounts(), HELD_OUT: RankCounts()}
    texts: dict[str, list[bytes]] = {ROWS: [], HELD_OUT: []}
    first = json.loads((job.scratch / f"{ROWS}-00000").read_bytes().partition(b"\n")[0])
    for name in first["chunks"]:
        kind = name.rpartition("-")[0]
        head, _, text = (job.scratch / name).read_bytes().partition(b"\n")
        results[kind].merge(RankCounts(**json.loads(head)["counts"]))
        texts[kind].append(text)
    counts = results[ROWS]
    try:
        _check_skipped(job, counts)
    except RunFailed:
        shutil.rmtree(job.scratch)  # the ranker may be another one when the same command is given again
        raise
    # Rows that never were prompts count, but are no fault of the ranker's; data.max_skipped has let them pass.
    counts.merge(RankCounts(prompts=sum(first["unusable"].values()), skipped=first["unusable"]))
    _tell(job, counts)
    storage.write_atomic(job.folder / f"{ROWS}.jsonl", b"".join(texts[ROWS]))
    if results[HELD_OUT].groups:  # without any, training has nothing to evaluate on
        storage.write_atomic(job.folder / f"{HELD_OUT}.jsonl", b"".join(texts[HELD_OUT]))
    held_out = results[HELD_OUT].to_json() if results[HELD_OUT].prompts else None
    return counts.to_json() | {"held_out": held_out}


def held_out_prompts(job: Job, tokenizer: Tokenizer, *, pair_ids: bool = False) -> list[Prompt]:
    """The prompts that every iterate is asked, in the order of their rows."""
    source = job.paths.eval_rows
    assert source is not None
    return load_prompts(
        source, job.config.data, tokenizer, first=job.config.evaluation.prompts, pairs=False, pair_ids=pair_ids
    ).prompts


def _chunks(job: Job) -> tuple[dict[str, list[Question]], Counter[str]]:
    """What is to be ranked, in chunks of `rollout.shard_prompts` prompts by file name; what was skipped before."""
    tokenizer = load_tokenizer(job.paths.tokenizer)
    size = job.config.rollout.shard_prompts
    portion = portion_prompts(job, tokenizer, pair_ids=job.config.rank.offline_pair)
    chunks: dict[str, list[Question]] = {}
    for kind, found in ((ROWS, _questions(job, portion.prompts)), (HELD_OUT, _held_out(job, tokenizer))):
        questions = list(found)
        for number, start in enumerate(range(0, len(questions), size)):
            chunks[f"{kind}-{number:05d}"] = questions[start : start + size]
    return chunks, portion.skipped


def _questions(job: Job, prompts: Sequence[Prompt]) -> Iterator[Question]:
    """The portion's prompts with their candidates: responses of the policy, of the base, and the offline pair."""
    config = job.config
    explores = config.exploration_weight != 0
    folder = job.paths.stage(job.stage.iteration, "rollout")
    policy = finished_lines(folder, POLICY) if config.rollout.responses else {}
    base = finished_lines(folder, BASE) if config.samples_base else {}
    for prompt in prompts:
        own = _responses(policy, prompt.row, response_name)
        of_base = _responses(base, prompt.row, lambda _: BASE_RESPONSE)
        offline = _offline(prompt) if config.rank.offline_pair else []
        wanted = of_base if config.samples_base else own if explores else []
        given = None if policy or base else prompt.scores or (1.0, 0.0)
        margin = 0.0 if given is not None and prompt.scores is None else config.rank.min_margin
        yield Question(prompt, own + of_base + offline, wanted[0].ids if wanted else None, given, margin)


def _held_out(job: Job, tokenizer: Tokenizer) -> Iterator[Question]:
    """The held-out prompts with the greedy responses of the iterate before and their offline pair."""
    if job.paths.eval_rows is None or job.config.ranker is None:
        return
    greedy = finished_lines(job.paths.stage(job.stage.iteration - 1, "evaluate"), POLICY)
    for prompt in held_out_prompts(job, tokenizer, pair_ids=True):
        if prompt.offline is None or not (responses := _responses(greedy, prompt.row, response_name)):
            continue
        explored = responses[0].ids if job.config.exploration_weight != 0 else None
        yield Question(prompt, responses + _offline(prompt), explored, min_margin=job.config.rank.min_margin)


def _responses(lines: _Lines, row: int, name: Callable[[int], str]) -> list[Candidate]:
    """Responses to one prompt that say anything at all, named by their number from 1."""
    found = lines[row]["responses"] if row in lines else []
    return [Candidate(name(n), r["text"], r["ids"]) for n, r in enumerate(found, start=1) if r["text"]]


def _offline(prompt: Prompt) -> list[Candidate]:
    assert prompt.offline is not None
    names = (OFFLINE_CHOSEN, OFFLINE_REJECTED)
    return [Candidate(name, text, ids) for name, (text, ids) in zip(names, prompt.offline, strict=True)]


def _texts(questions: Sequence[Question]) -> list[tuple[str, list[str]]]:
    """What a ranker reads: of the questions that need one, in their order."""
    return [(q.prompt.text, [c.text for c in q.candidates]) for q in questions if q.given is None and q.candidates]


def _scores(job: Job, ranker: Ranker, texts: Texts, phase: Phase) -> list[list[float]]:
    """Scores of a chunk; a stop is looked for between its batches."""
    left = ranker.work(texts)

    def on_done(count: int) -> None:
        nonlocal left
        left -= count
        phase.advance(count)
        if left:
            _check_stop(job)

    return ranker.score(texts, on_done)


def _check_stop(job: Job) -> None:
    if job.stop.requested:
        raise Stopped(f"stopped in {job.stage.title}; what is ranked is saved")


def _choose(questions: Sequence[Question], scores: Sequence[list[float]]) -> tuple[RankCounts, list[str]]:
    """Counts and lines of a chunk.  scores: of the questions of `_texts`."""
    ranked = iter(scores)
    counts = RankCounts()
    lines = []
    for question in questions:
        values = list(() if not question.candidates else question.given or next(ranked))
        choice = choose(question.candidates, values, question.min_margin)
        counts.add(question.candidates, values, choice, question.explored_ids)
        if not isinstance(choice, str):
            prompt = question.prompt
            lines.append(row_line(prompt.row, prompt.ids, question.candidates, values, choice, question.explored_ids))
    return counts, lines


def _tell(job: Job, counts: RankCounts) -> None:
    """Say what came out: lengths show whether the ranker merely likes long answers."""
    found = counts.to_json()
    tokens = found["mean_tokens"]
    job.display.say(
        f"{counts.groups} of {counts.prompts} prompts gave a pair; mean tokens: chosen {tokens['chosen']:.1f}, "
        f"rejected {tokens['rejected']:.1f}; the policy's own response is chosen in {found['responses_win']:.0%}"
    )
    for reason, count in counts.skipped.items():
        job.display.say(f"  skipped: {count} {reason}")


def _check_skipped(job: Job, counts: RankCounts) -> None:
    skipped = sum(counts.skipped.values())
    total = counts.groups + skipped
    reasons = "\n".join(f"  {count:>7,}  {reason}" for reason, count in counts.skipped.items())
    if counts.groups == 0:
        raise RunFailed(f"none of {total} prompts gave a pair to train on:\n{reasons}")
    if skipped > job.config.rank.max_skipped * total:
        raise RunFailed(
            f"{skipped} of {total} prompts ({skipped / total:.1%}) gave no pair; at most rank.max_skipped = "
            f"{job.config.rank.max_skipped:.1%} may be: look at the ranker, or raise it\n{reasons}"
        )
