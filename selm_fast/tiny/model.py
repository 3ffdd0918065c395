"""A model and rows to begin a run with: a small Llama from random weights, fine-tuned on the annotator's responses."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from selm_fast.tiny import instructions
from selm_fast.training import storage

TRAIN_ROWS = 1440
EVAL_ROWS = 256
STEPS = 800  # of making the model
CAREFUL_SHARE: Final = 0.6  # of the steps: the model learns how a constraint is met, then how seldom it is
BATCH: Final = 32  # responses of a step
LR: Final = 3e-3
WARMUP: Final = 50  # steps
LINE_SECONDS: Final = 5.0  # between two lines of progress

_PAD, _EOS, _UNKNOWN, _USER, _ASSISTANT = "<|pad|>", "<|eos|>", "<|unknown|>", "<|user|>", "<|assistant|>"
_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare(folder: Path, seed: int) -> None:
    """Write eval.jsonl, train.jsonl and model/ in `folder`; equal seeds give equal bytes.

    What an earlier call left there is replaced; the model comes last. Raises RunFailed on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    rng = random.Random(seed)
    prompts = _distinct_prompts(EVAL_ROWS + TRAIN_ROWS, rng)
    held_out = prompts[:EVAL_ROWS]
    storage.write_atomic(folder / "eval.jsonl", _rows(held_out, rng))
    storage.write_atomic(folder / "train.jsonl", _rows(prompts[EVAL_ROWS:], rng))
    tokenizer = _make_tokenizer()
    model = _make_model(tokenizer, seed)
    with _one_thread():
        _fit(model, tokenizer, rng, kept_back=set(held_out))
    with storage.new_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch: matmuls as small as these gain nothing from two, and on a busy machine wait for the second.

    Measured on two cores beside another job: 450 steps took 393 s with two threads and 17 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _distinct_prompts(count: int, rng: random.Random) -> list[str]:
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[instructions.write_prompt(rng)] = None
    distinct = list(prompts)
    rng.shuffle(distinct)  # prompts that name one word run out, so that later ones name more
    return distinct


def _rows(prompts: list[str], rng: random.Random) -> bytes:
    """Rows as in UltraFeedback-binarized, JSON lines: the better and the worse of two responses of the annotator."""
    lines = []
    for prompt in prompts:
        scores: list[float] = []
        while len(set(scores)) < 2:
            responses = [instructions.annotate(prompt, rng) for _ in range(2)]
            scores = [instructions.reward(prompt, response) for response in responses]
        row: dict[str, Any] = {"prompt": prompt}
        for name, value in (("chosen", max(scores)), ("rejected", min(scores))):
            response = responses[scores.index(value)]
            row[name] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            row[f"score_{name}"] = value
        lines.append(json.dumps(row) + "\n")
    return "".join(lines).encode()


def _make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each word and each sign of the prompts and responses; decoding puts spaces between them."""
    numbers = list(map(str, instructions.LENGTHS))
    phrases = re.findall(r"\w+", " ".join(instructions.PHRASES.values()))
    special = [_PAD, _EOS, _UNKNOWN, _USER, _ASSISTANT]
    vocabulary = list(dict.fromkeys([*special, ":", ",", ".", *phrases, *numbers, *instructions.WORDS]))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=_EOS, pad_token=_PAD, unk_token=_UNKNOWN, chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _make_model(tokenizer: transformers.PreTrainedTokenizerFast, seed: int) -> transformers.LlamaForCausalLM:
    """A two-layer Llama in fp32 with random weights: the least depth that can copy a word by what precedes it."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False, **special,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**special)
    return model


def _fit(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    kept_back: Collection[str],
) -> None:
    """Cross entropy of an annotator's responses to new prompts at every step, none of them among `kept_back`.

    The annotator is careful at first, as pretraining knows more than fine-tuning shows. From the imperfect one alone
    the model would hardly find out what most constraints mean, and exploration would meet too few of them to learn.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP, 2 * (STEPS - step) / STEPS)
    )
    line_at = time.monotonic() + LINE_SECONDS
    for step in range(1, STEPS + 1):
        probabilities = instructions.CAREFUL if step <= CAREFUL_SHARE * STEPS else instructions.IMPERFECT
        texts: list[str] = []
        while len(texts) < BATCH:
            if (prompt := instructions.write_prompt(rng)) not in kept_back:
                response = instructions.annotate(prompt, rng, probabilities)
                texts.append(f"{_USER}{prompt}{_ASSISTANT}{response}{_EOS}")
        ids, labels = _ids_and_labels(texts, tokenizer)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # padding comes last: no token attends to it
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if time.monotonic() >= line_at or step == STEPS:
            line_at = time.monotonic() + LINE_SECONDS
            print(f"making a model to begin with: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)


def _ids_and_labels(texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """(len(texts), longest) int64 each: ids, padded on the right, and labels, -100 outside the responses."""
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    answer = tokenizer.get_vocab()[_ASSISTANT]
    for index, row in enumerate(rows):
        begin = row.index(answer) + 1
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, begin : len(row)] = ids[index, begin : len(row)]
    return ids, labels
