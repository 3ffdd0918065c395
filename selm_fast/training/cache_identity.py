"""What names a reference cache: everything that could change a value in it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

import selm_fast
from selm_fast import ops
from selm_fast.config import Config
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.model import Policy


def versions() -> dict[str, str]:
    """Of what computes; "" for a library that is not there."""
    found = {module.__name__: module.__version__ for module in (selm_fast, torch, transformers)}
    for name in ("triton", "flash_attn", "flash_attn_3") if torch.version.cuda else ():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found | {"csrc": ops.extension.library() or ""}


def cache_identity(
    config: Config, policy: Policy, weights: str, tokenizer: Tokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that could change a reference log-prob, by name; what cannot (learning rate, beta) is left out.

    weights: their `weights_digest`.
    """
    device = policy.head.weight.device
    model_config = policy.model.config.to_dict()
    model_config.pop("_name_or_path", None)  # where the weights lie is not what they say
    on_cpu = device.type == "cpu"
    return {
        "weights": weights,
        "model_config": hashlib.sha256(json.dumps(model_config, sort_keys=True, default=str).encode()).hexdigest(),
        "tokenizer": tokenizer.digest(),
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "dtype": str(dtype).removeprefix("torch."),
        "compile": config.model.compile,
        "ops": ops.backends(device.type, attention=policy.attention_backend(dtype)),
        # Another number of threads cuts a matmul elsewhere and changes its last bit.
        "processor": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        if on_cpu
        else torch.cuda.get_device_name(device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }
