"""Many training steps of a small model through `selm_fast.train`: are the process's memory and a step's time flat?"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.scaling_data import make_tokenizer, make_words
from selm_fast.config import Config
from selm_fast.training.progress import Display
from selm_fast.training.run_train import Run
from selm_fast.training.signals import StopFlag

STEPS, QUICK_STEPS = 500, 120
WARM_UP = 0.2  # share of the steps that are not looked at
GROUPS = 2  # of a step
PROMPT, RESPONSE = 24, 40  # tokens
VOCABULARY = 512
EOS = 0  # as make_tokenizer numbers it
# Over the steps that are looked at, along the median of all slopes between two of them (Theil-Sen). Times are the least
# of BLOCK steps, in units of the least of a fixed piece of work that runs after each: a slower machine slows both.
BLOCK = 20
LEAST_BLOCKS = 15  # fewer say nothing about time
MOST_GROWTH = 4 * 2**20  # bytes; the hidden states of one layer, kept each step, would be 28 MiB in 400 steps
MOST_SLOWING = 0.1  # of the median
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def run_steps(steps: int, device: str) -> dict[str, Any]:
    """Train in a process of its own -> medians, and growth over the last steps with verdicts."""
    memory, seconds, fixed = measure.in_fresh_process(train_steps, steps, device, torch.get_num_threads())
    skipped = round(WARM_UP * steps)
    units = [least / unit for least, unit in zip(blocks(seconds[skipped:]), blocks(fixed[skipped:]), strict=True)]
    growth, slowing = over_the_run(memory[skipped:]), over_the_run(units) / float(np.median(units))
    looked_at = len(seconds) - skipped
    targets = [measure.target("growth of memory over the steps, MiB", growth / 2**20, MOST_GROWTH / 2**20)]
    if len(units) >= LEAST_BLOCKS:
        targets.append(measure.target("growth of a step's time over the steps, share of it", slowing, MOST_SLOWING))
    return {
        "steps": steps,
        "looked_at": looked_at,
        "step_ms": measure.summary([value * 1e3 for value in seconds[skipped:]]),
        "fixed_work_ms": measure.summary([value * 1e3 for value in fixed[skipped:]]),
        "memory_mib": {"first": memory[skipped] / 2**20, "last": memory[-1] / 2**20, "peak": max(memory) / 2**20},
        "growth_bytes_a_step": growth / looked_at,
        "slowing_a_step": slowing / looked_at,
        "targets": targets,
    }


def blocks(values: list[float]) -> list[float]:
    """The least of every BLOCK values."""
    return [min(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]


def over_the_run(values: list[float]) -> float:
    """What a series grows by from its first to its last value, along the median of the slopes between any two."""
    y = np.asarray(values, dtype=float)
    first, second = np.triu_indices(len(y), 1)
    return float(np.median((y[second] - y[first]) / (second - first))) * (len(y) - 1)


def train_steps(steps: int, device: str, threads: int) -> tuple[list[float], list[float], list[float]]:
    """After each step but the first: resident set (bytes), CPU time (s; wall time on a GPU) of it and of fixed work."""
    torch.set_num_threads(threads)
    clock = time.process_time if device == "cpu" else time.perf_counter
    memory, began, ended = list[float](), list[float](), list[float]()
    fixed_work = make_fixed_work(device)

    def on_log(_: dict[str, Any]) -> None:
        memory.append(float(measure.resident_bytes() or 0) if device == "cpu" else float(torch.cuda.memory_reserved()))
        began.append(clock())
        fixed_work()
        ended.append(clock())

    with tempfile.TemporaryDirectory() as name, StopFlag() as stop:
        folder = Path(name)
        make_tokenizer(make_words(), VOCABULARY).save_pretrained(folder / "tokenizer")
        (folder / "config.json").write_text(json.dumps(MODEL), "utf-8")
        Run(config(folder, device), Display(quiet=True), stop, on_log).train(rows(steps))
    of_steps = np.array(began[1:]) - np.array(ended[:-1])
    of_fixed = np.array(ended[1:]) - np.array(began[1:])
    return memory[1:], of_steps.tolist(), of_fixed.tolist()


def make_fixed_work(device: str) -> Callable[[], None]:
    """Small matmuls and what is done element by element, forward and backward, as a training step has them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(GROUPS * (PROMPT + 3 * RESPONSE), 64, generator=generator).to(device)
    up, down = (torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((64, 176), (176, 64)))

    def work() -> None:
        out = x
        for _ in range(3):
            out = torch.nn.functional.rms_norm(out + torch.nn.functional.silu(out @ up) @ down, (64,))
        out.sum().backward()
        up.grad = down.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    return work


def config(folder: Path, device: str) -> Config:
    """Settings of the run: every step is logged, and only the last one saved."""
    return Config.model_validate(
        {
            "output_dir": str(folder / "run"),
            "device": device,
            "model": {"init": str(folder / "config.json"), "tokenizer": str(folder / "tokenizer")},
            "batch": {"groups": GROUPS, "max_tokens": 2048},
            "cache": {"dir": str(folder / "cache")},
            "checkpoint": {"every": 10**9},
        }
    )


def rows(steps: int) -> list[dict[str, Any]]:
    """Token ids of equal lengths, so that steps are equal; enough for so many steps."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    return [
        {
            "prompt_ids": ids(PROMPT),
            "chosen_ids": [*ids(RESPONSE - 1), EOS],
            "rejected_ids": [*ids(RESPONSE - 1), EOS],
            "reference_response_ids": [*ids(RESPONSE - 1), EOS],
        }
        for _ in range(steps * GROUPS)
    ]
