"""Whether a run fits the memory of its devices, and which settings to change where it does not.

`Plan` is a run as `selm_fast.memory` sees it. `check_room` of `selm_fast.training.machine` asks it before training,
`selm-fast estimate` shows it, and `selm_fast.training.advice` consults it when memory has run out all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.memory import Memory, Model, peak
from selm_fast.ops import extension
from selm_fast.ops.head import KEEP_BUDGET_BYTES, TILE_ROWS, TILE_VOCAB
from selm_fast.roofline import GroupLengths, HeadMode, Settings, Shape, Work

# Assumed: CUDA's context and kernels, workspaces of cuBLAS, buffers of NCCL; on a CPU, Python and its libraries.
RUNTIME: Final = {"cuda": 1.5 * 2**30, "cpu": 0.6 * 2**30}
# What of a GPU's memory a plan may take: torch's allocator loses some to fragments.
USABLE: Final = 0.95
# How far above a device's memory an estimate must be for a run to be refused: nearer than this the model may be wrong
# (tests/test_memory.py finds steps up to a sixth below it).
SURELY: Final = 1.2
LEAST_TOKENS: Final = 2048  # of a micro-batch, below which matmuls become slow

# Mean tokens of a group where rows are not at hand: UltraFeedback's, in which an explored response is one of the pair
# in about two groups of three.
PROMPT: Final = 223.0
RESPONSE: Final = 345.0
EXPLORED: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class Change:
    """A setting to change. name: as on the command line.  total: bytes at the peak once it and those before are."""

    name: str
    value: str | int
    total: float

    def __str__(self) -> str:
        return f"{self.name} {self.value} -> {self.total / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Plan:
    """A run's settings with what they act on.

    group: the work of a mean group.  ranks: processes; None: one, alone on a CPU.  device: what each computes on.
    """

    config: Config
    shape: Shape
    group: Work
    ranks: int | None = 1
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the compute dtype."""
        dtype = self.config.dtype
        return 2 if dtype == "bfloat16" or (dtype == "auto" and self.device == "cuda") else 4

    @property
    def micro_batch(self) -> Work:
        """The largest micro-batch: as full as it may be, or all that a rank has of a step."""
        batch = self.config.batch
        groups = min(batch.max_tokens / self.group.tokens, max(1, -(-batch.groups // (self.ranks or 1))))
        return scaled(self.group, groups)

    @property
    def settings(self) -> Settings:
        """How a micro-batch is computed."""
        head = head_mode(self.config, self.shape, self.micro_batch.head_rows, self.compute_bytes)
        again = self.config.model.activation_checkpointing
        return Settings(checkpointing=again, head=head, compute_bytes=self.compute_bytes)

    @property
    def model(self) -> Model:
        """What memory depends on beside the work."""
        moments = 2 if self.config.optim.moments == "bfloat16" else 4
        tile = TILE_ROWS[self.device], TILE_VOCAB[self.device]
        fused = self.device == "cpu" and extension.available()
        return Model(self.shape, self.ranks, moments, tile, RUNTIME[self.device], fused)

    @cached_property
    def phases(self) -> dict[str, Memory]:
        """Memory of one device by phase."""
        return self.model.phases(self.micro_batch, self.settings)

    @property
    def total(self) -> float:
        """Bytes at the peak, on one device."""
        return peak(self.phases)[1].total

    def fits(self, memory: float) -> bool:
        """Whether a device of so many bytes holds it."""
        return self.total <= USABLE * memory

    def changed(self, name: str, value: Any) -> Plan:
        """The plan with one setting changed; `nproc` is one, too."""
        if name == "nproc":
            return replace(self, ranks=value)
        section, _, leaf = name.rpartition(".")
        inner = getattr(self.config, section) if section else self.config
        own = inner.model_copy(update={leaf: value})
        return replace(self, config=self.config.model_copy(update={section: own}) if section else own)


def scaled(work: Work, factor: float) -> Work:
    """So many times the work."""
    return Work(
        tokens=work.tokens * factor, head_rows=work.head_rows * factor, pairs=work.pairs * factor,
        keys=work.keys * factor, groups=work.groups * factor,
    )  # fmt: skip


def mean_group(groups: Sequence[TokenGroup]) -> Work:
    """The work of a mean group of a data set."""
    found = [GroupLengths.of(group.prompt, (group.chosen, group.rejected, group.explored)) for group in groups]
    return scaled(Work.of(found), 1 / len(found))


def assumed_group(config: Config, prompt: float = 0, response: float = 0, responses: float = 0) -> Work:
    """The work of a group of mean lengths in tokens, cut as rows are; what is 0 is assumed.

    responses: distinct ones, of which a run that explores has three at most and any other two.
    """
    prompt = min(prompt or PROMPT, config.data.max_prompt_length)
    response = min(response or RESPONSE, config.data.max_length - prompt)
    explores = config.exploration_weight != 0
    return Work.of_means(1, prompt, response, (responses or 2 + EXPLORED) if explores else 2)


def head_mode(config: Config, shape: Shape, rows: float, compute_bytes: int) -> HeadMode:
    """What the head does in a micro-batch with so many rows: `auto` keeps logits within a budget."""
    if config.head_mode != "auto":
        return config.head_mode
    return "keep" if rows * shape.vocab * compute_bytes <= KEEP_BUDGET_BYTES else "recompute"


def advise(plan: Plan, memory: float, *, most_ranks: int = 8, phase: str | None = None) -> tuple[list[Change], bool]:
    """Settings to change, one after the other, until the plan fits a device of `memory` bytes; and whether it does.

    First what costs time alone, then the moments' dtype, smaller micro-batches, and more processes. What turns out not
    to be needed is left out. most_ranks: processes that there may be.  phase: which must fit (None: all).
    """

    def total(of: Plan) -> float:
        return of.total if phase is None else of.phases[phase].total

    room = USABLE * memory
    made: dict[str, Any] = {}
    current = plan
    for name, value in _steps(plan, most_ranks):
        if total(current) <= room:
            break
        tried = current.changed(name, value)
        if total(tried) < total(current):
            made[name] = value
            current = tried
    fits = total(current) <= room
    for name in list(made) if fits else []:
        fewer = {other: value for other, value in made.items() if other != name}
        if total(_all_changed(plan, fewer)) <= room:
            made = fewer
    changes, current = list[Change](), plan
    for name, value in made.items():
        current = current.changed(name, value)
        changes.append(Change(name, value, total(current)))
    return changes, fits


def _steps(plan: Plan, most_ranks: int) -> Iterator[tuple[str, Any]]:
    """Changes in the order in which they are tried."""
    if plan.settings.head == "keep":
        yield "head_mode", "recompute"
    again = plan.config.model.activation_checkpointing
    if again == "none":
        yield "model.activation_checkpointing", "selective"
    if again != "full":
        yield "model.activation_checkpointing", "full"
    if plan.config.optim.moments == "float32":
        yield "optim.moments", "bfloat16"
    tokens = plan.config.batch.max_tokens // 2
    while tokens >= max(LEAST_TOKENS, longest_group(plan.config)):
        yield "batch.max_tokens", tokens
        tokens //= 2
    ranks = 2 * (plan.ranks or most_ranks)
    while ranks <= most_ranks:
        yield "nproc", ranks
        ranks *= 2


def longest_group(config: Config) -> int:
    """Tokens of the longest group that rows may make: each response as long as it may be after a short prompt."""
    return (3 if config.exploration_weight != 0 else 2) * config.data.max_length


def _all_changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    for name, value in changes.items():
        plan = plan.changed(name, value)
    return plan
