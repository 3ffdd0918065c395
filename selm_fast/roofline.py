"""FLOPs and bytes of a training step, from a model's shape and the lengths of its groups: arithmetic alone.

With Nb parameters in the body's matmuls, T tokens, N rows of the head, D hidden, V vocabulary, and
A = 4 x layers x heads x head size x sum over branches of (query, key) pairs, a query seeing the keys up to its own:

    F_train     = 2 Nb T (3 + r) + A (3.5 + r) + 2 V D N (3 keep | 4 recompute)
    F_reference = 2 Nb T         + A           + 2 V D N

r: what activation checkpointing computes again, 1 full, 0.05 selective, 0 none. (torch leaves out each layer's last
matmul, whose result nobody needs: in Llama-3-8B 27% of the body.) Attention's backward is 2.5 forwards, because it
forms the scores again. *Useful* are the FLOPs of the layout that encodes nothing twice, without anything that is
computed again (attention's backward is then two forwards), and they give the utilisation:

    MFU = useful FLOPs / (seconds x devices x peak FLOP/s of one device)

The model is a dense decoder; a sliding window is taken to be longer than a branch, norms, rotary embeddings and the
optimiser to cost no FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from selm_fast.workload import GroupLengths, Layout, Work

__all__ = [
    "CONFIG_NAMES",
    "Checkpointing",
    "Flops",
    "GroupLengths",
    "HeadMode",
    "Layout",
    "Settings",
    "Shape",
    "Traffic",
    "Work",
    "bound",
    "flops",
    "traffic",
    "useful_flops",
]

Checkpointing = Literal["none", "selective", "full"]
HeadMode = Literal["keep", "recompute"]

CONFIG_NAMES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
RECOMPUTED: dict[Checkpointing, float] = {"none": 0.0, "selective": 0.05, "full": 1.0}
FP32 = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder. body: parameters that go through matmuls outside the head.  weights: all, each once."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool
    body: int
    weights: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a transformers configuration: a dense decoder with gated MLPs and two RMS norms a layer, as Llama's.

        Raises ValueError where a size is missing.
        """
        found = [config.get(name) for name in CONFIG_NAMES]
        if missing := [name for name, value in zip(CONFIG_NAMES[:5], found, strict=False) if not value]:
            raise ValueError(f"the model's configuration lacks {', '.join(missing)}; expected that of a decoder")
        hidden, layers, heads, intermediate, vocab = (int(value or 0) for value in found[:5])
        key_heads, head_size, tied = int(found[5] or heads), int(found[6] or hidden // heads), bool(found[7])
        body = layers * hidden * (2 * (heads + key_heads) * head_size + 3 * intermediate)
        weights = body + (1 if tied else 2) * vocab * hidden + (2 * layers + 1) * hidden
        return cls(
            hidden=hidden, layers=layers, heads=heads, key_heads=key_heads, head_size=head_size,
            intermediate=intermediate, vocab=vocab, tied=tied, body=body, weights=weights,
        )  # fmt: skip

    @property
    def head(self) -> int:
        """Parameters of the head, which a tied embedding shares."""
        return self.vocab * self.hidden

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query and key in every head of every layer, forward: a score and a weighted value."""
        return 4 * self.layers * self.heads * self.head_size


@dataclass(frozen=True, slots=True)
class Passes:
    """FLOPs of one part of the model, by pass."""

    forward: float
    backward: float
    recompute: float
    reference: float

    @property
    def total(self) -> float:
        """All passes."""
        return self.forward + self.backward + self.recompute + self.reference


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of a step, by part of the model."""

    body: Passes
    attention: Passes
    head: Passes

    @property
    def total(self) -> float:
        """All parts, all passes."""
        return self.body.total + self.attention.total + self.head.total

    @property
    def reference(self) -> float:
        """The reference pass."""
        return self.body.reference + self.attention.reference + self.head.reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a step is computed. compute_bytes: of a number, 4 or 2.  reference: whether its pass is counted in.

    micro_batches: into which the step's work is cut, evenly.
    """

    checkpointing: Checkpointing = "none"
    head: HeadMode = "keep"
    reference: bool = False
    compute_bytes: int = 2
    micro_batches: int = 1


def flops(shape: Shape, work: Work, settings: Settings) -> Flops:
    """What a step computes: `F_train`, and `F_reference` where the settings has it."""
    r, reference = RECOMPUTED[settings.checkpointing], float(settings.reference)
    body = 2.0 * shape.body * work.tokens
    attention = float(shape.pair_flops * work.pairs)
    head = 2.0 * shape.head * work.head_rows
    return Flops(
        body=Passes(body, 2 * body, r * body, reference * body),
        attention=Passes(attention, 2.5 * attention, r * attention, reference * attention),
        head=Passes(head, 2 * head, (settings.head == "recompute") * head, reference * head),
    )


def useful_flops(shape: Shape, work: Work, *, reference: bool = False) -> float:
    """What a step must compute, however it is done; work: of the layout "aliases".

    reference: whether its pass is counted in, as where the time it is divided by has it too.
    """
    forward = flops(shape, work, Settings(reference=True)).reference
    return (3.0 + reference) * forward


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a step must at least move between memory and processor, were every kernel's input read only once.

    body, head: weights, once a pass and micro-batch; gradients, written and added up in fp32; the inputs and outputs of
    matmuls, once forward, twice backward.  attention: queries, keys, values and results, likewise.
    logits: written and read again, where they are kept.  optimizer: AdamW on fp32, after a norm and its clipping.
    """

    body: float
    attention: float
    head: float
    logits: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.body + self.attention + self.head + self.logits + self.optimizer


def traffic(shape: Shape, work: Work, settings: Settings) -> Traffic:
    """The bytes that `flops` moves."""
    size, full, reference = settings.compute_bytes, settings.checkpointing == "full", settings.reference
    queries, keys = (count * shape.head_size for count in (shape.heads, shape.key_heads))
    later = 1 - 1 / settings.micro_batches  # share of micro-batches that find a gradient to add to
    gradient = size + (size + FP32 + FP32 * later if size < FP32 else 3 * FP32 * later)
    matmuls = 4 * shape.hidden + 2 * (queries + keys) + 3 * shape.intermediate
    passes = 3 + full + reference
    return Traffic(
        body=settings.micro_batches * shape.body * ((2 + full + reference) * size + gradient)
        + passes * size * work.tokens * shape.layers * matmuls,
        attention=passes * size * shape.layers * 2 * (work.tokens * queries + work.keys * keys),
        head=settings.micro_batches * shape.head * ((2 + (settings.head == "recompute") + reference) * size + gradient)
        + (3 + (settings.head == "recompute") + reference) * size * work.head_rows * shape.hidden,
        logits=2.0 * (settings.head == "keep") * size * work.head_rows * shape.vocab,
        optimizer=shape.weights * (10 * FP32 + (size + FP32 if size < FP32 else 0)),
    )


def bound(flops: Flops, traffic: Traffic, *, peak: float, bandwidth: float) -> dict[str, float]:
    """The least seconds of each part: the slower of its FLOPs at `peak` 1/s and its bytes at `bandwidth` bytes/s."""
    return {
        "body": max(flops.body.total / peak, traffic.body / bandwidth),
        "attention": max(flops.attention.total / peak, traffic.attention / bandwidth),
        "head": max(flops.head.total / peak, (traffic.head + traffic.logits) / bandwidth),
        "optimizer": traffic.optimizer / bandwidth,
    }
