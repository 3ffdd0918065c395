"""A small Llama: fitted to a world's prior, and its whole distribution over responses."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.exploration.environment import Environment, Floats, Ints, Settings, stream
from selm_fast.model.attention import NAME

PROMPTS = 32  # of each step
LR = 5e-3


def make_base(environment: Environment, seed: int, *, steps: int = 300) -> transformers.LlamaForCausalLM:
    """A two-layer Llama in fp32, fitted to the prior of all prompts: the base model."""
    model = untrained(environment.settings, seed)
    rng = stream("base model", seed)
    prior = torch.from_numpy(np.exp(environment.prior))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        some = rng.choice(len(environment.prompts), min(PROMPTS, len(environment.prompts)), replace=False)
        logps = all_logps(model, environment.prompts[some], environment.settings)
        loss = -(prior[some] * logps).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def untrained(settings: Settings, seed: int) -> transformers.LlamaForCausalLM:
    """Random weights."""
    config = transformers.LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=48, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def all_logps(model: Any, prompts: Ints, settings: Settings) -> Tensor:
    """(len(prompts), R) fp64 log-probs (nats) of every response to each prompt; differentiable.

    By the model's own forward and head, and padded to nothing: every prompt is read with each beginning of a response.
    """
    beginnings = np.array(list(product(range(settings.vocabulary), repeat=settings.response_tokens - 1)))
    count, width = len(prompts), settings.prompt_tokens
    inputs = np.concatenate((np.repeat(prompts, len(beginnings), 0), np.tile(beginnings, (count, 1))), 1)
    packed = model.config._attn_implementation == NAME
    if packed:  # a model that a `Policy` holds reads packed batches only
        model.set_attn_implementation("sdpa")
    try:
        logits = model(input_ids=torch.from_numpy(inputs), use_cache=False).logits[:, width - 1 :].double()
    finally:
        if packed:
            model.set_attn_implementation(NAME)
    by_token = logits.log_softmax(-1).unflatten(0, (count, len(beginnings)))  # (P, beginnings, L, V)
    total = by_token[:, :, -1]
    for place in range(settings.response_tokens - 1):
        said = torch.from_numpy(beginnings[:, place]).expand(count, -1).unsqueeze(-1)
        total = total + by_token[:, :, place].gather(-1, said)
    return total.flatten(1)


@torch.no_grad()
def distribution(model: Any, environment: Environment) -> Floats:
    """(P, R) log-probs (nats) of every response to every prompt."""
    return all_logps(model, environment.prompts, environment.settings).numpy()
