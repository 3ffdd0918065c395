"""What an estimate starts from: lengths of the rows, size of the model, speed of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from transformers.utils.hub import cached_file

from selm_fast.config import Config
from selm_fast.data.sources import read_rows
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import Refused
from selm_fast.iteration.paths import Paths
from selm_fast.model.shape import shape_of
from selm_fast.roofline import Shape

CHARACTERS_A_TOKEN: Final = 4.0  # of English under common tokenizers, where no tokenizer is at hand
_SAMPLE_ROWS: Final = 512


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of the rows: prompt, and offline response (0 where there are none).

    responses: distinct ones of a row with `reference_response` (0 where rows have none).
    """

    prompt: float
    response: float
    responses: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model.  compute_bytes: of a weight while it computes, generates and is exported."""

    shape: Shape
    compute_bytes: int

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape.weights


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one device. flops: of a matmul, 1/s.  bandwidth: of reading memory, bytes/s."""

    name: str
    flops: float
    bandwidth: float


def mean_lengths(rows: str, num_rows: int, tokenizer: str | None) -> Lengths:
    """Mean tokens of a sample of rows, by the tokenizer or, where it is not at hand, by their characters."""
    every = max(1, num_rows // _SAMPLE_ROWS)
    sample = [row for _, row in islice(read_rows(rows), 0, None, every)]
    prompts = [_text(row.get("prompt")) or _context(row.get("chosen")) for row in sample]
    pairs = [[_last(row[name]) for name in ("chosen", "rejected") if row.get(name) is not None] for row in sample]
    explored = [_last(row.get("reference_response") or "") for row in sample]
    responses = [response for pair in pairs for response in pair]
    folder = None if tokenizer is None else on_disk(tokenizer)
    distinct = sum(len({*pair, *([one] if one else [])}) for pair, one in zip(pairs, explored, strict=True))
    return Lengths(
        _mean_tokens(prompts, folder), _mean_tokens(responses, folder), distinct / len(sample) if any(explored) else 0.0
    )


def _mean_tokens(texts: list[str], tokenizer: Path | None) -> float:
    if not texts:
        return 0.0
    if tokenizer is None:
        return sum(map(len, texts)) / len(texts) / CHARACTERS_A_TOKEN
    ids = load_tokenizer(str(tokenizer)).encode([text.encode("utf-8", "replace").decode() for text in texts])
    return sum(map(len, ids)) / len(texts)


def on_disk(source: str) -> Path | None:
    """Folder of a model or tokenizer, or of the hub's copy on this disk; an estimate asks no network for one."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = cached_file(source, "config.json", local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _text(value: Any) -> str:
    """Text of a column: plain, or of its messages."""
    return value if isinstance(value, str) else "".join(str(turn.get("content", "")) for turn in value or ())


def _context(value: Any) -> str:
    return _text(value[:-1]) if isinstance(value, list) else ""


def _last(value: Any) -> str:
    return value if isinstance(value, str) else _text(value[-1:])


def model_size(paths: Paths) -> Model | None:
    """Size of the model by its config.json, None where that is not at hand."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from selm_fast.training.machine import choose_device

    folder = on_disk(paths.start if paths.config.prepare else str(paths.config.model.assets))
    if folder is None:
        return None
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
        shape = shape_of(model)
    except (OSError, ValueError) as error:
        raise Refused(f"model.path {folder} has no configuration of a causal language model: {error}") from error
    _, dtype = choose_device(paths.config)
    return Model(shape, dtype.itemsize)


def device_speed(config: Config) -> Speed:
    """Speed of a matmul and of a copy on the device that would train, in its compute dtype."""
    import torch

    from selm_fast.training.machine import best_seconds, choose_device, matmul_flops

    device, dtype = choose_device(config)
    data = torch.empty(2**30 if device.type == "cuda" else 2**27, device=device, dtype=torch.uint8)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Speed(name, matmul_flops(device, dtype), 2 * data.nbytes / best_seconds(data.clone, device))
