"""llm-blender 0.0.2, so that it imports and ranks as it did, with transformers 5: what PairRM is held against.

The package is as its authors left it in 2024. What is put in its way, and why:

- `transformers.utils.hub.TRANSFORMERS_CACHE`, which it imports, is gone: a folder stands in for it during the import.
- vllm is hidden during the import: where it is installed, importing it takes seconds and a GPU, and no ranking uses it.
- `encode_texts` calls `batch_encode_plus`, which is gone: the tokenizer is called instead, with the same arguments.
- `build_pretrained_model` downloads the base model, only to overwrite its weights, and since transformers 5 keeps the
  fp16 of its files: the encoder is made of its settings in fp32, and takes the checkpoint's weights.
- `build_tokenizer` gets transformers 5's DebertaV2Tokenizer, which drops the character map of tokenizer.json, so that
  ranks change: the file is loaded as it is.
- A prefix such as "<|source|>" in a text makes it fail: prefixes in texts become spaces, as "[SEP]" does anyway.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers.utils.hub
from transformers import AutoModel, DebertaV2Config, PreTrainedTokenizerFast

from selm_fast.pairrm.checkpoint import WEIGHTS, Checkpoint, find
from selm_fast.pairrm.rows import PREFIXES


class Blender:
    """llm-blender with the checkpoint of a folder, on the CPU, in fp32."""

    def __init__(self, folder: str) -> None:
        """Raises ImportError where llm-blender is not installed, Refused where the folder is no PairRM."""
        checkpoint = find(folder)
        with _quiet(), _patched(checkpoint) as module, tempfile.TemporaryDirectory() as own:
            settings = {
                "ranker_type": "pairranker",
                "model_type": "deberta",
                "model_name": folder,
                "source_maxlength": checkpoint.limits.source,
                "candidate_maxlength": checkpoint.limits.candidate,
            }
            Path(own, "config.json").write_text(json.dumps(settings), "utf-8")
            Path(own, WEIGHTS).symlink_to(checkpoint.weights.resolve())
            self._checkpoint = checkpoint
            self._blender = module.Blender()
            self._blender.loadranker(own, device="cpu")

    @property
    def encoder(self) -> torch.nn.Module:
        """The DeBERTa that it runs."""
        encoder: torch.nn.Module = self._blender.ranker.pretrained_model
        return encoder

    def scores(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]], *, batch_size: int
    ) -> list[list[float]]:
        """Scores of each prompt's candidates; prompts with as many candidates are scored together, as it demands."""
        by_count: dict[int, list[int]] = defaultdict(list)
        for index, texts in enumerate(candidates):
            by_count[len(texts)].append(index)
        found: dict[int, list[float]] = {}
        with _quiet(), _patched(self._checkpoint):
            for indices in by_count.values():
                scores = self._blender.rank(
                    [_without_prefixes(prompts[index]) for index in indices],
                    [[_without_prefixes(text) for text in candidates[index]] for index in indices],
                    return_scores=True,
                    batch_size=batch_size,
                    disable_tqdm=True,
                )
                found |= dict(zip(indices, scores.tolist(), strict=True))
        return [found[index] for index in range(len(candidates))]

    def ranks(self, scores: Sequence[Sequence[float]]) -> list[list[int]]:
        """Its ranks of such scores: 1 is best, and equal scores share a rank."""
        of = importlib.import_module("llm_blender.gpt_eval.utils").get_ranks_from_scores
        return [of([row]).tolist()[0] for row in scores]


def _without_prefixes(text: str) -> str:
    for prefix in PREFIXES:
        text = text.replace(prefix, " ")
    return text


def _module() -> ModuleType:
    """The package's `blender.blender`. Raises ImportError where it is not installed."""
    name = "llm_blender.blender.blender"
    if sys.modules.get(name) is None:
        cache = mock.patch.object(transformers.utils.hub, "TRANSFORMERS_CACHE", tempfile.gettempdir(), create=True)
        with cache, _hidden("vllm"):
            importlib.import_module(name)
    return sys.modules[name]


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A module that nothing imported yet cannot be imported while the block runs."""
    hide = name not in sys.modules
    if hide:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules[name]


@contextlib.contextmanager
def _patched(checkpoint: Checkpoint) -> Iterator[ModuleType]:
    """llm-blender with what is put in its way while the block runs."""
    module = _module()
    collator, model_util, blender_utils = (
        importlib.import_module(f"llm_blender.{name}")
        for name in ("pair_ranker.collator", "pair_ranker.model_util", "blender.blender_utils")
    )

    def encode_texts(texts: list[str], tokenizer: Any, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(texts, max_length=max_length, padding="max_length", return_tensors="pt", truncation=True)
        return found["input_ids"], found["attention_mask"]

    def build_pretrained_model(*_: Any, **__: Any) -> Any:
        model = AutoModel.from_config(DebertaV2Config.from_dict(checkpoint.encoder), dtype=torch.float32)
        model.config.out_hidden_state_size = model.config.hidden_size
        return model

    def build_tokenizer(*_: Any, **__: Any) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(checkpoint.tokenizer), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
            unk_token="[UNK]",
        )  # fmt: skip

    with (
        mock.patch.object(collator, "encode_texts", encode_texts),
        mock.patch.object(model_util, "build_pretrained_model", build_pretrained_model),
        mock.patch.object(blender_utils, "build_tokenizer", build_tokenizer),
    ):
        yield module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what it prints; its warnings, on the root logger, would also set up a handler there."""
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(logging, "warning"):
        yield
