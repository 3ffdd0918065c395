"""A PairRM with random weights and a tokenizer like DeBERTa-v3's, for tests and measurements: the shape is stated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DebertaV2Config

from selm_fast.pairrm.encoder import PairEncoder
from selm_fast.pairrm.rows import PREFIXES, SPECIAL, Limits

Form = Literal["PairRM", "PairRM-hf"]
SETTINGS = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Unigram over words, NFKC, spaces collapsed, [CLS] text [SEP], and PairRM's prefixes last."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [*SPECIAL, "[UNK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    marks = re.compile("|".join(map(re.escape, (*special, *PREFIXES))))
    tokenizer.train_from_iterator((marks.sub(" ", text) for text in texts), trainer)  # or they become words, too
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", SPECIAL["[CLS]"]), ("[SEP]", SPECIAL["[SEP]"])]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in PREFIXES])
    return tokenizer


def make_checkpoint(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    hidden: int,
    layers: int,
    heads: int,
    form: Form = "PairRM",
    limits: Limits | None = None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint -> its folder. Weights are of the size that lets every token have its say in the score."""
    words = tokenizer.get_vocab_size(with_added_tokens=True)
    config = DebertaV2Config(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, **SETTINGS,
    )  # fmt: skip
    network = PairEncoder(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "LayerNorm" in name:
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.1 * drawn
        else:
            scale = 1.0 if "embeddings" in name else parameter.shape[1] ** -0.5
            parameter.data = scale * drawn
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(config, form, limits or Limits()), indent=1), "utf-8")
    return folder


def _config(config: DebertaV2Config, form: Form, limits: Limits) -> dict[str, Any]:
    lengths = {"source_maxlength": limits.source, "candidate_maxlength": limits.candidate, "n_tasks": 1}
    if form == "PairRM-hf":
        return config.to_dict() | lengths | {"source_prefix_id": config.vocab_size - len(PREFIXES)}
    return {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "microsoft/deberta-v3-large"} | lengths
