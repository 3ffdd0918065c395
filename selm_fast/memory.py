"""The memory that a run takes on each device, by part and by phase: arithmetic on a model's shape alone.

A process that is alone on a CPU holds everything whole. Everywhere else FSDP2 (`fully_shard` of each decoder layer, and
of the root, which has embedding, head and last norm) shards over n ranks, one GPU being n = 1. With P parameters in
all, L in a layer, R in the root, and s bytes a number of the compute dtype, torch/distributed/fsdp/_fully_shard of
torch 2.13 allocates, in bytes:

    masters      4 P / n
    gradients    4 P / n, all of them from a step's second micro-batch on
    gathered     s R from the root's forward to the end of the backward pass, and of the layers
                 n > 1: 2 s L. Forward, the layer at work and its all-gather's output, which is freed after the next
                 layer's copy-out (`wait_for_unshard`); backward, the layer at work and the output of the one that is
                 prefetched. And s L / n, the all-gather's input, where it is cast (`_get_param_all_gather_inputs`)
                 n = 1: s L, for nothing is gathered: the shards are copied in the compute dtype
    reduced      4 L, the copy-in of a layer's gradients, kept until the next layer's is made
                 (`reduce_scatter_max_input_buffers` is 1), and 4 L / n, the output, which becomes the gradients or is
                 added to them (`foreach_reduce`). The root's come when the backward pass is over, beside its gradients
                 in the compute dtype: (s + 4 + 4 / n) R

A step peaks in the head, in the backward pass of the last layer or of the next, when all activations are there still,
where a layer's gradients are reduced, or where the root's are, when no activations are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from selm_fast.roofline import FP32, Settings, Shape
from selm_fast.workload import Work

HEAD_TILE: Final = (4096, 6144)  # rows and vocabulary of a tile on a GPU, as selm_fast.ops.head cuts them
FILE: Final = 2**29  # bytes of one file of a checkpoint, as selm_fast.training.storage cuts them
PHASES: Final = ("load", "reference pass", "step", "optimiser")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device at one moment, by what holds them.

    weights: as they compute, where nothing is sharded.  masters: fp32; alone on a CPU in fp32 they are the weights.
    gradients: fp32.  moments: both of AdamW.  gathered, reduced: FSDP's, see above.
    activations: what the layers keep for the backward pass, and the rows that the head reads.
    head: its newest gradient, beside kept logits, a tile in fp32 and one in the compute dtype, and gradients of its
    rows and of a tile's weights; or beside its copy in fp32, which is added up where nothing is sharded.
    layer: one layer at work in the backward pass: what is computed again, and its gradients.
    attention: gathered keys and values, and their gradients.
    runtime: what is there beside tensors.
    """

    weights: float = 0.0
    masters: float = 0.0
    gradients: float = 0.0
    moments: float = 0.0
    gathered: float = 0.0
    reduced: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    layer: float = 0.0
    attention: float = 0.0
    runtime: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Model:
    """What memory depends on beside the work.

    ranks: over which FSDP shards; None: one process that holds everything whole.
    fused: whether norms and gated MLPs are this package's kernels (`selm_fast.model.fused_layers`), as on a CPU.
    moment_bytes: of one of AdamW's two moments.  head_tile: rows and vocabulary of a tile.
    runtime: bytes beside tensors: CUDA's context, libraries, Python.
    """

    shape: Shape
    ranks: int | None = None
    moment_bytes: int = FP32
    head_tile: tuple[int, int] = HEAD_TILE
    runtime: float = 0.0
    fused: bool = False

    @property
    def shards(self) -> int:
        """Parts that the state is cut into."""
        return self.ranks or 1

    @property
    def root(self) -> int:
        """Parameters of FSDP's root group: embedding, head unless it is the embedding, last norm."""
        return self.shape.head * (1 if self.shape.tied else 2) + self.shape.hidden

    @property
    def layer(self) -> float:
        """Parameters of one decoder layer."""
        return (self.shape.weights - self.root) / self.shape.layers

    def moments(self, work: Work, settings: Settings) -> dict[str, Memory]:
        """What is held at each moment of a step at which it may peak. work: of one rank.

        A token of a Llama's layer keeps, in the compute dtype, two normed rows before and after their weights (4 x
        hidden), queries, keys, values and attention's result, and 4 x intermediate; in fp32 both norms' inputs, the
        reciprocals of their sizes, and a logsumexp of each head. Fused, a norm keeps its input as it came and no row
        before the weights, and an MLP gates and ups alone, of which it makes the other two again. Selective
        checkpointing keeps what matmuls and attention give, full the input.
        """
        shape, size, state = self.shape, settings.compute_bytes, self._state(settings)
        cut = _Cut.of(work, settings)
        queries, keys = (count * shape.head_size for count in (shape.heads, shape.key_heads))
        everything = size * 2 * (queries + keys) + FP32 * (2 + shape.heads)
        if self.fused:
            everything += size * (4 * shape.hidden + 2 * shape.intermediate)
        else:
            everything += size * (4 * shape.hidden + 4 * shape.intermediate) + FP32 * 2 * shape.hidden
        a_token = {
            "none": everything,
            "selective": size * (3 * shape.hidden + 2 * (queries + keys) + 2 * shape.intermediate) + FP32 * shape.heads,
            "full": size * shape.hidden,
        }[settings.checkpointing]
        again = {"none": 0, "selective": everything - a_token, "full": everything}[settings.checkpointing]
        # Of the embedding, and of the last norm.
        ends = (3 * size + FP32) * shape.hidden if not self.fused else 2 * size * shape.hidden + FP32
        activations = cut.tokens * (shape.layers * a_token + ends) + size * cut.rows * shape.hidden
        tiles = (settings.head == "keep") * size * cut.rows * shape.vocab + self._tile(size + FP32, cut)
        tiles += cut.rows * shape.hidden * (FP32 + size) + (
            FP32 * self.head_tile[1] * shape.hidden if size < FP32 else 0
        )
        newest = float(size * shape.head)
        layer = cut.tokens * (again + size * shape.intermediate)
        attention = 4 * size * cut.keys * keys
        if self.ranks is None:
            head = newest + max(tiles, FP32 * shape.head if size < FP32 else 0)
            return {
                "head": Memory(**state, activations=activations, head=head),
                "last layer": Memory(**state, activations=activations, layer=layer, attention=attention),
            }
        one, root, n = self.layer, self.root, self.shards
        output = self._output(size)
        # From the second layer of the backward pass on, one layer's activations fewer.
        fewer = activations - cut.tokens * a_token
        whole, work_of_one = size * (root + one) + output, layer + size * one
        return {
            "head": Memory(**state, gathered=size * root + output, activations=activations, head=newest + tiles),
            "last layer": Memory(
                **state, gathered=whole, activations=activations, head=newest, layer=work_of_one, attention=attention
            ),
            "next layer": Memory(
                **state, gathered=whole, reduced=FP32 * one, activations=fewer, head=newest, layer=work_of_one,
                attention=attention,
            ),
            "reduction": Memory(
                **state, gathered=size * root + output, reduced=FP32 * one * (1 + 1 / n), activations=fewer,
                head=newest, layer=size * one,
            ),
            "root": Memory(**state, reduced=root * (size + FP32 + FP32 / n)),
        }  # fmt: skip

    def phases(self, work: Work, settings: Settings) -> dict[str, Memory]:
        """What each of `PHASES` holds when it holds most. work: of one rank, in `settings.micro_batches`."""
        state = self._state(settings)
        standing = {name: state[name] for name in ("weights", "masters", "runtime")}
        return {
            # Shards are cut from one whole tensor after the other, of which the head is the largest.
            "load": Memory(**standing, gathered=0.0 if self.ranks is None else float(FP32 * self.shape.head)),
            "reference pass": self._reference(work, settings, standing),
            "step": max(self.moments(work, settings).values(), key=lambda memory: memory.total),
            "optimiser": Memory(**state),
        }

    def host(self) -> dict[str, float]:
        """Bytes of the host's memory that all ranks together take beside their devices.

        load: each rank's copy of the largest tensor.  checkpoint: each rank's newest file, once as tensors and once as
        the bytes that are written.
        """
        shape, n = self.shape, self.shards
        state = shape.weights * (FP32 + 2 * self.moment_bytes) / n
        file = min(state, max(FILE, FP32 * shape.head / n))
        return {"load": float(n * FP32 * shape.head), "checkpoint": 2 * n * file}

    def checkpoint_bytes(self) -> int:
        """A checkpoint on disk: masters and moments."""
        return self.shape.weights * (FP32 + 2 * self.moment_bytes)

    def _state(self, settings: Settings) -> dict[str, float]:
        weights, size = self.shape.weights, settings.compute_bytes
        copies = self.ranks is None and size < FP32
        return {
            "weights": float(size * weights if copies else 0),
            "masters": FP32 * weights / self.shards,
            "gradients": FP32 * weights / self.shards,
            "moments": 2 * self.moment_bytes * weights / self.shards,
            "runtime": self.runtime,
        }

    def _reference(self, work: Work, settings: Settings, standing: Mapping[str, float]) -> Memory:
        """Nothing is kept, and one layer's intermediate results stand at a time."""
        shape, size, cut = self.shape, settings.compute_bytes, _Cut.of(work, settings)
        a_token = size * 3 * (shape.hidden + shape.intermediate) + FP32 * shape.hidden
        keys = shape.key_heads * shape.head_size
        held = 0.0 if self.ranks is None else size * (self.root + self.layer) + self._output(size)
        return Memory(
            **standing, gathered=held, activations=size * cut.rows * shape.hidden, head=self._tile(FP32, cut),
            layer=cut.tokens * a_token, attention=2 * size * cut.keys * keys,
        )  # fmt: skip

    def _output(self, size: int) -> float:
        """Bytes of an all-gather of one layer: its output, and its input where that is cast."""
        if self.shards == 1:
            return 0.0
        return size * self.layer * (1 + (1 / self.shards if size < FP32 else 0))

    def _tile(self, size: int, cut: _Cut) -> float:
        rows, vocab = self.head_tile
        return float(min(rows, cut.rows) * min(vocab, self.shape.vocab) * size)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One micro-batch's tokens, rows of the head, and key rows."""

    tokens: float
    rows: float
    keys: float

    @classmethod
    def of(cls, work: Work, settings: Settings) -> _Cut:
        count = settings.micro_batches
        return cls(work.tokens / count, work.head_rows / count, work.keys / count)


def peak(phases: Mapping[str, Memory]) -> tuple[str, Memory]:
    """The phase that takes most, and what it holds."""
    return max(phases.items(), key=lambda item: item[1].total)
