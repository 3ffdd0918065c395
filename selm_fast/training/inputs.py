"""What a run reads before any weight is loaded: the model's sizes, its tokenizer, the rows, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from selm_fast.config import Config
from selm_fast.data.dataset import Dataset, load_groups
from selm_fast.data.packing import Plan, plan_epoch
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import Refused
from selm_fast.model import support
from selm_fast.model.shape import shape_of
from selm_fast.roofline import Shape
from selm_fast.training.final import is_run
from selm_fast.training.progress import Display


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model. vocab: rows of its embedding.  weights: how many.  shape: None where its configuration lacks it."""

    vocab: int
    weights: int
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is trained on, and how a batch of it is read. held_out: None where there is none."""

    sizes: Sizes
    tokenizer: Tokenizer
    data: Dataset
    held_out: Dataset | None

    def facts(self) -> dict[str, Any]:
        """What identifies them, for the record of a run."""
        held_out = self.held_out.digest if self.held_out is not None else None
        return {"data": self.data.digest, "eval_data": held_out, "tokenizer": self.tokenizer.digest()}

    def plans(self, config: Config, ranks: int) -> Plans:
        """How the rows are packed for so many processes. Raises Refused where a group is longer than a batch."""
        batch = config.batch
        limits = {"groups_per_step": batch.groups, "max_tokens": batch.max_tokens, "seed": config.seed, "ranks": ranks}
        try:
            epochs = [
                plan_epoch(self.data.groups, epoch=epoch, shuffle=batch.shuffle, **limits)
                for epoch in range(config.epochs)
            ]
            held_out = plan_epoch(self.held_out.groups, shuffle=False, **limits) if self.held_out is not None else None
        except ValueError as error:
            raise Refused(f"batch.max_tokens is too small: {error}") from error
        return Plans(epochs, held_out)

    def tell(self, display: Display) -> None:
        """Say what the rows are and what was left out of them."""
        for dataset in filter(None, (self.data, self.held_out)):
            report = dataset.report
            used = f"{report.rows_used} of {report.rows_read} rows used"
            display.say(f"{report.source}: {used}, {report.packed_tokens} packed tokens")
            for reason, count in report.skipped.items():
                display.say(f"  skipped: {count} {reason}")
            for note, count in report.notes.items():
                if count:
                    display.say(f"  note: {count} {note}")
            for warning in report.warnings:
                display.say(f"  warning: {warning}")


@dataclass(frozen=True, slots=True)
class Plans:
    """One plan an epoch, and one of the held-out rows."""

    epochs: list[Plan]
    held_out: Plan | None

    def of_reference(self) -> list[Plan]:
        """Those that the reference pass runs over: one epoch's packs hold every sequence."""
        return [self.epochs[0], *([self.held_out] if self.held_out is not None else [])]


def read_inputs(config: Config, rows: Iterable[Mapping[str, Any]] | None = None) -> Inputs:
    """The inputs that settings name. rows: in the place of data.train.

    Raises Refused for what is missing, or not what it should be.
    """
    sizes = measure(config)  # a missing model is told of before its tokenizer
    tokenizer = load_tokenizer(str(config.tokenizer_source))
    wants_explored = config.exploration_weight != 0
    train = None if rows is not None else config.data.train
    data = load_groups(train, config.data, tokenizer, rows=rows, vocab_size=sizes.vocab, wants_explored=wants_explored)
    held_out = None
    if config.data.eval is not None:
        held_out = load_groups(
            config.data.eval, config.data, tokenizer, vocab_size=sizes.vocab, wants_explored=wants_explored
        )
    return Inputs(sizes, tokenizer, data, held_out)


def measure(config: Config) -> Sizes:
    """The sizes of the model to train, without loading it. Raises Refused."""
    source = str(config.model.assets or config.model.init)
    trust = config.model.trust_remote_code
    if config.model.path is not None and not is_run(config.model.path):
        support.check_source(source, trust_remote_code=trust)
    try:
        found = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
        support.check_config(found.to_dict(), trust_remote_code=trust, source=source)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(found, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{source} has no configuration of a causal language model of transformers: {error}") from error
    try:
        shape = shape_of(model)
    except ValueError:
        shape = None
    weights = sum(weight.numel() for weight in model.parameters())
    return Sizes(model.get_input_embeddings().weight.shape[0], weights, shape)
