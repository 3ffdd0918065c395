"""Tiny random models of every family served, groups to feed them, and their own log-probs, a sequence at a time."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from torch import Tensor

from selm_fast.data.groups import TokenGroup
from selm_fast.model.attention import NAME

VOCAB = 97
WINDOW = 5  # shorter than most sequences of `some_groups`, so that a window which is ignored shows
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Values that are not the defaults wherever a default of 1 or None would hide that a setting is ignored.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.3, "logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),  # its head has a bias
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
}


def tiny_config(family: str = "llama", **changed: Any) -> Any:
    """The configuration of a tiny model."""
    kind, settings = FAMILIES[family]
    return getattr(transformers, kind)(**{**BASE, **settings, **changed})


def tiny_model(family: str = "llama", *, seed: int = 0, **changed: Any) -> Any:
    """A model in fp32 whose weights, norms and biases too, are all random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changed), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def some_groups(count: int = 5, *, seed: int = 0, vocab: int = VOCAB) -> list[TokenGroup]:
    """Groups of every kind: one-token prompts and responses, two or three responses, explored ones that are aliases."""
    generator = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [generator.randrange(vocab) for _ in range(generator.randint(low, high))]

    groups = []
    for nth in range(count):
        prompt, chosen, rejected = ids(1, 1) if nth == 1 else ids(2, 14), ids(2, 9), ids(1, 9)
        explored = (ids(1, 9), None, chosen, rejected, ids(1, 1))[nth % 5]
        groups.append(TokenGroup(prompt, chosen, rejected, explored))
    return groups


def own_token_logps(model: Any, groups: list[TokenGroup]) -> list[Tensor]:
    """Log-probs of every distinct response's tokens, by the model's own eager forward of prompt and response alone."""
    model.set_attn_implementation("eager")
    logps = []
    try:
        for group in groups:
            for response in group.responses():
                logits = model(input_ids=torch.tensor([group.prompt + response]), use_cache=False).logits[0]
                high = logits.to(torch.promote_types(logits.dtype, torch.float32))
                predictions = high[len(group.prompt) - 1 : -1].log_softmax(-1)
                logps.append(predictions.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    finally:
        model.set_attn_implementation(NAME)
    return logps


def take_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, which are emptied; every parameter must have one."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    """Norm of the difference of every parameter's gradient at most `relative` times the norm of that gradient."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, size = (got[name].double() - value.double()).norm().item(), value.double().norm().item()
        assert error <= relative * size, f"{name}: {error:.3g} of {size:.3g}"
