"""What every contestant is given: the same weights, the same token ids, the same settings, in one folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from selm_fast.roofline import Shape

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 16384, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "head_dim": 64,
        "tie_word_embeddings": True, "rope_theta": 500000.0,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip
# Whole, it does not fit on one GPU of 141 GB with an optimiser in fp32; a layer and the head cost the same here.
SHAPES["8b-quarter"] = SHAPES["8b"] | {"num_hidden_layers": 8}
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Of generated rows, tokens: means of real ones (AlpacaEval prompts, answers of three models; for the large shapes of
# UltraFeedback), and the shares in which the explored response is the chosen or the rejected one.
LENGTHS = {"small": (44, 294, 216, 254)} | dict.fromkeys(("1b", "8b", "8b-quarter"), (218, 340, 340, 340))
ALIASED = (0.49, 0.19)
SPREAD = 0.6  # of the logarithm of a length
# The parity gate's reference and weight of exploration: far enough from the model, and large enough, for every term of
# the loss to count. (The weights of a model are drawn with a deviation of .02.)
REFERENCE_NOISE = 0.02
PARITY_ALPHA = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is equal for all. Learning rate and decay are those of the paper; beta times alpha is the weight of SELM."""

    groups: int = 8  # groups of an optimiser step
    max_length: int = 1024
    max_prompt_length: int = 512
    beta: float = 0.1
    alpha: float = 1e-3
    lr: float = 5e-7
    max_grad_norm: float = 1.0
    seed: int = 0
    max_tokens: int = 3072  # selm_fast: packed tokens of a micro-batch, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids of one group."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    explored: list[int]

    def distinct(self, exploring: bool) -> list[list[int]]:
        """The responses that differ; all that a step has to encode."""
        found = [self.chosen, self.rejected]
        return [*found, self.explored] if exploring and self.explored not in found else found

    def useful_tokens(self, exploring: bool) -> int:
        """Tokens that a step cannot do without: the prompt once, and each distinct response once."""
        return len(self.prompt) + sum(map(len, self.distinct(exploring)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A folder: `model/`, `reference/` (other weights, for the parity gate), `tokenizer/`, `rows.json`."""

    folder: Path
    shape: str
    device: str
    dtype: str  # "fp32" | "bf16"
    source: str  # where the rows come from, in words
    settings: Settings = field(default_factory=Settings)

    @property
    def model(self) -> Path:
        """Weights that training starts from."""
        return self.folder / "model"

    @property
    def reference(self) -> Path:
        """Weights that differ a little from the model's."""
        return self.folder / "reference"

    @property
    def tokenizer(self) -> Path:
        """A tokenizer whose ids the rows have."""
        return self.folder / "tokenizer"

    @property
    def compute(self) -> torch.dtype:
        """What matmuls compute in; weights and optimiser state are fp32."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def rows(self) -> list[Row]:
        """Every row, in an order that is random and fixed."""
        return [Row(**row) for row in json.loads((self.folder / "rows.json").read_text("utf-8"))]


def make_workload(
    folder: Path, *, shape: str, device: str, dtype: str, settings: Settings, data: Path | None, generated: int
) -> Workload:
    """Write the folder. data: one with selm_train.jsonl and tokenizer/; None: `generated` rows of random ids.

    Raises FileNotFoundError for a data folder without these.
    """
    name = f"{data.name}/selm_train.jsonl" if data else f"{generated} generated"
    workload = Workload(folder=folder, shape=shape, device=device, dtype=dtype, source=name, settings=settings)
    config = LlamaConfig(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if data is None:
        make_tokenizer(config.vocab_size).save_pretrained(workload.tokenizer)
        rows = generate(generated, config.vocab_size, LENGTHS[shape], settings)
    else:
        workload.tokenizer.symlink_to((data / "tokenizer").resolve())
        rows = read(data / "selm_train.jsonl", workload)
    random.Random(settings.seed).shuffle(rows)
    (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), "utf-8")
    write_models(workload, config)
    return workload


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for every id."""
    words = {word: nth for nth, word in enumerate(SPECIAL.values())}
    words |= {f"w{nth}": nth for nth in range(len(words), vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def generate(count: int, vocab: int, means: Sequence[int], settings: Settings) -> list[Row]:
    """Rows of random ids whose lengths are log-normal around `means` (prompt, chosen, rejected, explored)."""
    generator = random.Random(settings.seed)

    def ids(mean: float, limit: int) -> list[int]:
        length = round(mean * generator.lognormvariate(-(SPREAD**2) / 2, SPREAD))
        return [generator.randrange(len(SPECIAL), vocab) for _ in range(min(max(length, 2), limit))]

    rows = []
    for _ in range(count):
        prompt = ids(means[0], settings.max_prompt_length)
        chosen, rejected, explored = ([*ids(mean, settings.max_length - len(prompt) - 1), 2] for mean in means[1:])
        draw = generator.random()
        if draw < ALIASED[0]:
            explored = chosen
        elif draw < sum(ALIASED):
            explored = rejected
        rows.append(Row(prompt=prompt, chosen=chosen, rejected=rejected, explored=explored))
    return rows


def read(path: Path, workload: Workload) -> list[Row]:
    """Real rows, tokenised and cut as selm_fast does, so that all contestants have the same ids."""
    from selm_fast.config import Config
    from selm_fast.data.dataset import load_groups
    from selm_fast.data.tokenizer import load_tokenizer

    settings = workload.settings
    limits = {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length}
    config = Config.model_validate({"data": limits})
    groups = load_groups(str(path), config.data, load_tokenizer(str(workload.tokenizer)), wants_explored=True).groups
    return [
        Row(prompt=list(g.prompt), chosen=list(g.chosen), rejected=list(g.rejected), explored=list(g.explored or ()))
        for g in groups
    ]


def write_models(workload: Workload, config: LlamaConfig) -> None:
    """Random weights, and the same a little displaced; fp32, safetensors."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(workload.settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(workload.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=REFERENCE_NOISE)
    model.save_pretrained(workload.reference)


def bytes_needed(shape: str) -> int:
    """Bytes that any contestant holds at least: weights, the reference's, gradients and two moments, all in fp32."""
    return 5 * 4 * Shape.from_config(LlamaConfig(**SHAPES[shape]).to_dict()).weights


def parity_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """The shortest rows of each kind (explored is chosen, rejected, neither) in turn: the gate shall be quick."""
    kinds: dict[str, list[Row]] = {"chosen": [], "rejected": [], "neither": []}
    for row in sorted(rows, key=lambda row: row.useful_tokens(True)):
        kind = "chosen" if row.explored == row.chosen else "rejected" if row.explored == row.rejected else "neither"
        kinds[kind].append(row)
    turns = [row for nth in range(count) for kind in kinds.values() for row in kind[nth : nth + 1]]
    return turns[:count]
