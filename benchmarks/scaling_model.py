"""The table of docs/performance.md: what each saving is worth on an 8B model, by the FLOP model.

    python benchmarks/scaling_model.py

The lengths are like those of UltraFeedback: of 24 groups in batches of 8, one of each batch is long and sets the width
that the others are padded to. Means: prompt 223, response 345, padded sequence 859 tokens; in 16 groups the explored
response is the chosen one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selm_fast.roofline import Checkpointing, GroupLengths, HeadMode, Layout, Settings, Shape, Work, flops

LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
BATCH = 8
ORDINARY = (200, (336, 307, 336))  # prompt, responses
LONG = ((384, (612, 612, 612)), (384, (612, 612, 612)), (384, (202, 202, 202)))
PEAK = 790e12  # FLOP/s of a large bf16 matmul on an H200

ROWS: tuple[tuple[str, Layout, Checkpointing, HeadMode], ...] = (
    ("padded, three sequences (authors' code)", "padded", "full", "keep"),
    ("+ packing", "packed", "full", "keep"),
    ("+ head on response rows only, fused", "response_head", "full", "recompute"),
    ("+ shared prefix", "shared_prefix", "full", "recompute"),
    ("+ aliases not encoded twice", "aliases", "full", "recompute"),
    ("+ selective checkpointing", "aliases", "selective", "recompute"),
)


def groups() -> list[GroupLengths]:
    """Lengths of 24 groups."""
    found = []
    for index in range(BATCH * len(LONG)):
        prompt, lengths = LONG[index // BATCH] if index % BATCH == 0 else ORDINARY
        aliases = int(index % 3 != 2)
        found.append(GroupLengths(prompt, lengths[: 3 - aliases], lengths[3 - aliases :]))
    return found


def rows() -> Iterator[tuple[str, float, float, float]]:
    """Name, tokens a group, FLOPs a group of training and reference pass, and tokens/s of training alone at `PEAK`."""
    shape, sample = Shape.from_config(LLAMA_3_8B), groups()
    for name, layout, checkpointing, head in ROWS:
        work = Work.of(sample, layout, batch=BATCH)
        needed = flops(shape, work, Settings(checkpointing=checkpointing, head=head, reference=True))
        training = needed.total - needed.reference
        yield name, work.tokens / len(sample), needed.total / len(sample), PEAK * work.tokens / training


def table() -> str:
    """`rows` as Markdown, each saving on top of those above it."""
    lines = ["| cumulative | tokens/group | TFLOP/group, training + reference | speed-up | tokens/s at 790 TFLOP/s |"]
    lines.append("|---|---|---|---|---|")
    first = next(rows())[2]
    for name, tokens, needed, speed in rows():
        lines.append(f"| {name} | {tokens:,.0f} | {needed / 1e12:.1f} | {first / needed:.2f} | {speed:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
