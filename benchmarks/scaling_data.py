"""The data path alone: rows to token ids, an epoch to a plan, a plan to batches; rows/s, and is it linear in rows?

Rows are made up: words of random letters, drawn as unevenly as words are, in conversations as long as those of
UltraFeedback; the tokenizer is a byte-level BPE trained on them. What is planned and packed at a million rows is groups
that share their lists of ids with others, so that they fit in memory; the work is the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import measure
from selm_fast.config import DataConfig
from selm_fast.data.dataset import load_groups
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan, plan_epoch
from selm_fast.data.tokenizer import inspect_tokenizer

PAPER_ROWS, MANY_ROWS = 61_135, 1_000_000
QUICK_ROWS = 2 * PAPER_ROWS  # in place of MANY_ROWS
SAMPLE_ROWS = {False: 4096, True: 512}  # tokenised, by `quick`
SAMPLE_STEPS = {False: 64, True: 16}  # packed
GROUPS_PER_STEP, MAX_TOKENS = 128, 16_384
PROMPT, RESPONSE = 218, 340  # tokens, mean
POOL = 2048  # lists of ids that a million groups are made of
# An 8B model on eight GPUs at the bound of docs/performance.md.
TOKENS_PER_SECOND = 13_200 * 8
MOST_OF_A_STEP = 0.05
MOST_TIME_A_ROW = 1.5  # of many rows, in units of that of few: caches hold less of them
WORDS, VOCABULARY = 4000, 4096
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def run_data(*, quick: bool) -> dict[str, Any]:
    """Time every part; the verdicts say whether planning is a small part of a step, and linear."""
    tokenized = tokenizing(SAMPLE_ROWS[quick])
    few, many = (planning(rows, SAMPLE_STEPS[quick]) for rows in (PAPER_ROWS, QUICK_ROWS if quick else MANY_ROWS))
    ratios = {part: many["us_a_row"][part] / few["us_a_row"][part] for part in few["us_a_row"]}
    share = max(plan["share_of_a_step"] for plan in (few, many))
    return {
        "tokenizing": tokenized,
        "planning": [few, many],
        "time_a_row_many_to_few": ratios,
        "targets": [
            measure.target("planning and packing, share of a step of an 8B model on 8 GPUs", share, MOST_OF_A_STEP),
            measure.target("time a row, many rows to few, planning", ratios["plan"], MOST_TIME_A_ROW),
            measure.target("time a row, many rows to few, digest", ratios["digest"], MOST_TIME_A_ROW),
            measure.target("time a row, many rows to few, packing", ratios["pack"], MOST_TIME_A_ROW),
        ],
    }


def tokenizing(sample: int) -> dict[str, Any]:
    """rows/s from texts to token groups, of a quarter of the sample and of all of it; what 61,135 rows would take."""
    words = make_words()
    tokenizer = inspect_tokenizer(make_tokenizer(words, VOCABULARY))
    config = DataConfig(max_length=1024, max_prompt_length=512)
    rates, groups = {}, []
    for count in (sample // 4, sample):
        rows = make_rows(count, words)
        wall, busy = time.perf_counter(), time.process_time()
        groups = load_groups(None, config, tokenizer, rows=rows, vocab_size=VOCABULARY, wants_explored=True).groups
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        rates[count] = {"rows": count, "rows_per_s": count / wall, "rows_per_cpu_s": count / busy}
    tokens = sum(group.num_tokens() for group in groups) / len(groups)
    return {
        "sample": list(rates.values()),
        "packed_tokens_a_row": tokens,
        "seconds_of_paper_rows": PAPER_ROWS / rates[sample]["rows_per_s"],
        "seconds_of_many_rows": MANY_ROWS / rates[sample]["rows_per_s"],
    }


def planning(count: int, sample_steps: int) -> dict[str, Any]:
    """CPU time of an epoch's plan, of its digest, and of packing some of its steps."""
    groups = make_groups(count)
    plan, plan_s = timed(lambda: plan_epoch(groups, groups_per_step=GROUPS_PER_STEP, max_tokens=MAX_TOKENS, seed=0))
    _, digest_s = timed(plan.digest)
    steps = range(0, len(plan.steps) - 1, max(1, len(plan.steps) // sample_steps))
    packed, pack_s = timed(lambda: sum(pack_step(plan, step) for step in steps))
    seconds = {"plan": plan_s / count, "digest": digest_s / count, "pack": pack_s / packed}
    tokens = sum(group.num_tokens() for group in groups) / count
    return {
        "rows": count,
        "packed_rows": packed,
        "packed_tokens_a_row": tokens,
        "us_a_row": {part: value * 1e6 for part, value in seconds.items()},
        "rows_per_s": {part: 1 / value for part, value in seconds.items()},
        "share_of_a_step": sum(seconds.values()) / (tokens / TOKENS_PER_SECOND),
    }


def pack_step(plan: Plan, step: int) -> int:
    """Pack a step's batches; -> its groups."""
    return sum(batch.num_groups for batch in plan.batches(step))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds of CPU time."""
    began = time.process_time()
    found = function()
    return found, time.process_time() - began


def make_groups(count: int) -> list[TokenGroup]:
    """Groups of random ids and lengths; in two of three the explored response is the chosen one."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 128_000, 1024).tolist()
    lengths = _lengths(rng, RESPONSE, POOL, most=800)
    responses = [[nth, *ids[1 - length :]] for nth, length in enumerate(lengths)]  # no two are equal
    prompts = [ids[:length] for length in _lengths(rng, PROMPT, POOL, most=512)]
    first, of_prompt = (rng.integers(0, POOL, count).tolist() for _ in range(2))
    found = []
    for row, (at, prompt) in enumerate(zip(first, of_prompt, strict=True)):
        chosen, rejected, other = (responses[(at + step) % POOL] for step in (0, 1, 7))
        found.append(TokenGroup(prompts[prompt], chosen, rejected, chosen if row % 3 else other, row))
    return found


def _lengths(rng: np.random.Generator, mean: int, count: int, most: int) -> list[int]:
    """Lengths whose logarithm is spread by 0.6, as of real texts; of this mean before they are cut."""
    drawn: list[int] = np.exp(rng.normal(np.log(mean) - 0.18, 0.6, count)).astype(int).clip(8, most).tolist()
    return drawn


def make_words() -> list[str]:
    """Words of random letters, the common ones short."""
    rng = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    return [
        "".join(rng.choices(letters, range(len(letters), 0, -1), k=2 + rng.randrange(2 + nth * 8 // WORDS)))
        for nth in range(WORDS)
    ]


def make_tokenizer(words: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, with a chat template; <|eos|> is 0."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|eos|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", chat_template=TEMPLATE)


def make_rows(count: int, words: list[str]) -> list[dict[str, Any]]:
    """UltraFeedback-binarized rows with a reference response, which is the chosen one in two of three."""
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, WORDS + 1)
    drawn = rng.choice(WORDS, 1_000_000, p=weights / weights.sum()).tolist()
    at = rng.integers(0, len(drawn) - 1024, (count, 4)).tolist()
    lengths = [_lengths(rng, mean * 2 // 3, count, most=700) for mean in (PROMPT, RESPONSE, RESPONSE, RESPONSE)]

    def text(row: int, nth: int) -> str:
        return " ".join(words[word] for word in drawn[at[row][nth] : at[row][nth] + lengths[nth][row]])

    found = []
    for row in range(count):
        prompt, chosen, rejected, other = (text(row, nth) for nth in range(4))
        turn = {"role": "user", "content": prompt}
        answers = {"chosen": chosen, "rejected": rejected, "reference_response": chosen if row % 3 else other}
        conversation = {name: [turn, {"role": "assistant", "content": answer}] for name, answer in answers.items()}
        conversation["reference_response"] = conversation["reference_response"][1:]
        found.append({"prompt": prompt, **conversation})
    return found
