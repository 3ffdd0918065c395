"""The table of docs/memory.md: what training takes of each GPU for models that people train, by the memory model.

    python benchmarks/memory_table.py

Each model is trained with the shipped defaults (micro-batches of 16,384 tokens, groups like UltraFeedback's) on eight
GPUs of 80 GB (79 GiB to torch), and on one of 139 GiB with moments in bfloat16; where that does not fit, with the
changes that `selm-fast estimate` would name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scaling_model import LLAMA_3_8B
from selm_fast.config import Config, OptimConfig
from selm_fast.memory import peak
from selm_fast.roofline import Shape
from selm_fast.training.room import Change, Plan, advise, assumed_group

MODELS = {
    "Llama-3-8B": LLAMA_3_8B,
    "Mistral-7B": LLAMA_3_8B | {"vocab_size": 32000},
    "Qwen3-8B": LLAMA_3_8B
    | {"num_hidden_layers": 36, "intermediate_size": 12288, "vocab_size": 151936, "head_dim": 128},
    "Phi-3-mini": {
        "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 8192, "vocab_size": 32064,
    },
}  # fmt: skip
EIGHT = Config(), 8, 79  # settings, GPUs, GiB of each
ONE = Config(optim=OptimConfig(moments="bfloat16")), 1, 139
SETUPS = {"8 x 80 GB": EIGHT, "1 x 139 GiB, bf16 moments": ONE}
PARTS = {
    "masters": ("masters",),
    "gradients": ("gradients",),
    "moments": ("moments",),
    "FSDP's buffers": ("gathered", "reduced"),
    "activations": ("activations",),
    "one layer, head": ("layer", "attention", "head"),
}


def planned(name: str, setup: tuple[Config, int, int]) -> tuple[Plan, list[Change]]:
    """A model on some GPUs as it fits them, and the settings that were changed for it."""
    config, ranks, gib = setup
    plan = Plan(config, Shape.from_config(MODELS[name]), assumed_group(config), ranks)
    changes, fits = advise(plan, gib * 2**30, most_ranks=ranks)
    assert fits, f"{name} does not fit {ranks} GPUs of {gib} GiB"
    for change in changes:
        plan = plan.changed(change.name, change.value)
    return plan, changes


def rows() -> Iterator[list[str]]:
    """A line for each model and set-up, GiB at the peak."""
    for name in MODELS:
        for setup, given in SETUPS.items():
            plan, changes = planned(name, given)
            phase, held = peak(plan.phases)
            parts = [sum(held.parts[part] for part in group) for group in PARTS.values()]
            needs = ", ".join(f"{change.name.rpartition('.')[2]} {change.value}" for change in changes)
            numbers = [f"{size / 2**30:.1f}" for size in (*parts, plan.total)]
            yield [name, f"{plan.shape.weights / 1e9:.2f}", setup, needs or "the defaults", *numbers, phase]


def table() -> str:
    """`rows` as Markdown."""
    head = ["model", "parameters, 1e9", "GPUs", "settings", *PARTS, "peak", "in phase"]
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


if __name__ == "__main__":
    print(table())
