"""Every setting of one training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of settings; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class ModelConfig(Section):
    """What is trained, and against what."""

    path: str | None = Field(
        None, description="folder or hub name of a causal language model in safetensors, or the folder of a run"
    )
    init: Path | None = Field(None, description="a config.json: train from random weights instead of `path`")
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer (default: `path`)")
    reference: str | None = Field(
        None, description="folder or hub name of the reference model (default: the policy before its first step)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="recompute in the backward pass: 'selective' all but matmuls and attention; 'full' each layer, "
        "least memory, about a third more work",
    )
    compile: bool = Field(False, description="torch.compile each decoder layer; in bf16 on a CPU, from torch 2.13 on")

    @field_validator("path", "init", "tokenizer", "reference")
    @classmethod
    def _home(cls, source: str | Path | None) -> str | Path | None:
        """`~/model` in a recipe is a folder, which no shell has spelt out."""
        return source if source is None else type(source)(os.path.expanduser(source))

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.init is not None:
            raise ValueError("model.path and model.init are both given; a model comes from one of them")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("model.init needs model.tokenizer: a config.json brings no tokenizer")
        return self

    @property
    def assets(self) -> str | None:
        """Where the configuration and tokenizer of `path` are: itself, or `assets` of the run that it is."""
        if self.path is None or not (folder := Path(self.path) / "assets").is_dir():
            return self.path
        return str(folder)


class DataConfig(Section):
    """The rows and how they become token ids."""

    train: str | None = Field(None, description="JSONL or Parquet file, or a `datasets` name as NAME:SPLIT")
    eval: str | None = Field(None, description="rows to evaluate on, in the same formats")
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="tokens of prompt and response together")
    max_prompt_length: PositiveCount = Field(512, description="tokens of the prompt; its last ones are kept")
    max_skipped: Fraction = Field(0.05, description="share of rows that may be skipped before it is an error")
    max_cut: Fraction = Field(
        0.9,
        description="share of a rollout's responses that may be cut at a limit before it is an error",
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length is {self.max_prompt_length} and data.max_length is {self.max_length}: "
                "no room is left for a response; make max_prompt_length smaller"
            )
        return self


class BatchConfig(Section):
    """How groups are spread over optimiser steps and micro-batches."""

    groups: PositiveCount = Field(128, description="groups (prompts) of one optimiser step")
    max_tokens: PositiveCount = Field(16384, description="packed tokens of one micro-batch, at most")
    shuffle: bool = Field(True, description="shuffle the groups at each epoch, by seed")


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = Field(5e-7, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup: Fraction = Field(0.1, description="share of the steps that warm up linearly")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="decay of the first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the second moment")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this global norm")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of AdamW's moments; bfloat16, rounded stochastically, saves 4 bytes a weight"
    )


class CacheConfig(Section):
    """Reference log-probabilities, computed once."""

    dir: Path = Field(Path("~/.cache/selm_fast/reference"), description="where reference log-probs are kept")
    require: bool = Field(False, description="refuse to run where the cache does not hold every log-prob already")


class LogConfig(Section):
    """What is written down while training."""

    every: PositiveCount = Field(1, description="steps between two looks at the metrics")
    tensorboard: bool = Field(False, description="write TensorBoard events too (extra: tensorboard)")


class CheckpointConfig(Section):
    """When the run is saved."""

    every: PositiveCount = Field(100, description="steps between checkpoints; the last step is always saved")
    keep: PositiveCount = Field(2, description="checkpoints kept")


class Config(Section):
    """Every setting of one training run (SELM, arXiv 2405.19332; DPO; XPO, arXiv 2405.21046)."""

    method: Literal["selm", "dpo", "xpo"] = Field(
        "selm", description="weight of the exploration term: selm alpha*beta, xpo alpha, dpo none"
    )
    beta: Positive = Field(0.01, description="inverse temperature of the implicit reward")
    alpha: NonNegative = Field(1e-3, description="exploration coefficient of selm and xpo")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="share of labels taken as flipped")
    epochs: PositiveCount = Field(1, description="passes over the rows")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="order of rows, random weights, grid dither")
    output_dir: Path | None = Field(None, description="folder of this run: metrics, checkpoints, model")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' takes a GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype over fp32 masters; 'auto': bfloat16 on a GPU, float32 on a CPU"
    )
    grid_dither: bool | None = Field(
        None, description="spread fp32 masters inside their bf16 cells (default: on where compute is bfloat16)"
    )
    head_mode: Literal["auto", "keep", "recompute"] = Field(
        "auto", description="keep the head's logits for the backward pass, or compute them twice"
    )
    timeout_s: Positive = Field(600.0, description="seconds that a process waits for the others in a step")
    max_bad_steps: PositiveCount = Field(3, description="steps in a row with a non-finite gradient before giving up")
    eval_every: PositiveCount | None = Field(
        None, description="steps between evaluations (always before the first step and after the last)"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _alpha_has_a_meaning(self) -> Self:
        if self.method == "dpo" and "alpha" in self.model_fields_set and self.alpha != 0:
            raise ValueError(
                f"method dpo has no exploration term, yet alpha is {self.alpha}; use method selm or drop it"
            )
        return self

    @property
    def exploration_weight(self) -> float:
        """The weight c of ratio(y_e) in the loss: the one number that tells the methods apart."""
        return {"selm": self.alpha * self.beta, "xpo": self.alpha, "dpo": 0.0}[self.method]

    @property
    def tokenizer_source(self) -> str | None:
        """Folder or name the tokenizer is loaded from."""
        return self.model.tokenizer or self.model.assets

    def to_json(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return self.model_dump(mode="json")
