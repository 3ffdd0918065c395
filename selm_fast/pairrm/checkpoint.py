"""The files of a PairRM, found and looked at without loading weights: PairRM's own format and PairRM-hf's.

PairRM's config.json describes a ranker, not its encoder: that is DeBERTa-v3, in the sizes that the tensors have.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from selm_fast.errors import Refused
from selm_fast.pairrm.rows import Limits, RowTokenizer
from selm_fast.pairrm.work import deberta_v3_large

WEIGHTS: Final = "model.safetensors"
ENCODER: Final = "pretrained_model."
HEAD: Final = "head_layer."
HEAD_SIZE: Final = 64  # of attention, in every DeBERTa-v3
_PREFIX_IDS: Final = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")  # of PairRM-hf
_DEBERTA_V3: Final = {
    "relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LAYER: Final = re.compile(rf"{re.escape(ENCODER)}encoder\.layer\.(\d+)\.")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a PairRM's files are, and its sizes. source: as given.  encoder: the settings of a DebertaV2Config."""

    source: str
    tokenizer: Path
    weights: Path
    encoder: dict[str, Any]
    limits: Limits


def check_checkpoint(source: str) -> None:
    """Refuse what cannot be a PairRM: a folder by its files, tokens and shapes of tensors, a hub name by its form.

    Raises Refused with what is missing.
    """
    if _is_folder(source):
        load_tokenizer(find(source))


def find(source: str) -> Checkpoint:
    """The files of a folder or, from the cache or the hub, of a name; of the hub nothing but *.json and *.safetensors.

    Raises Refused where it is not a PairRM.
    """
    _is_folder(source)
    config_file, weights, tokenizer = (_file(source, name) for name in ("config.json", WEIGHTS, "tokenizer.json"))
    try:
        config = json.loads(config_file.read_text("utf-8"))
    except ValueError as error:
        raise Refused(f"{config_file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise Refused(f"{config_file}: expected a mapping, and it is {type(config).__name__}")
    shapes = shapes_of(weights)
    kind, ranker = config.get("model_type"), config.get("ranker_type")
    if (ranker, kind) == ("pairranker", "deberta"):
        encoder = _encoder_of(shapes, source)
    elif kind == "deberta-v2":
        encoder = config
    else:
        raise Refused(
            f"{source}: config.json has ranker_type {ranker!r} and model_type {kind!r}; expected 'pairranker' and "
            "'deberta' (PairRM), or model_type 'deberta-v2' (PairRM-hf): give a PairRM"
        )
    _check_kind(encoder, source)
    _check_shapes(shapes, encoder, source)
    limits = Limits()
    lengths = {name: config.get(f"{name}_maxlength") or getattr(limits, name) for name in ("source", "candidate")}
    return Checkpoint(source, tokenizer, weights, encoder, Limits(**lengths))


def load_tokenizer(checkpoint: Checkpoint) -> RowTokenizer:
    """The tokenizer of a PairRM. Raises Refused where its tokens are not those that the encoder knows."""
    tokenizer = RowTokenizer(checkpoint.tokenizer, checkpoint.limits)
    vocab = checkpoint.encoder["vocab_size"]
    if tokenizer.num_ids > vocab:
        raise Refused(
            f"{checkpoint.source}: tokenizer.json has token ids up to {tokenizer.num_ids - 1} and the encoder "
            f"{vocab} embeddings: they are not of one checkpoint"
        )
    said = tuple(checkpoint.encoder.get(name, id) for name, id in zip(_PREFIX_IDS, tokenizer.prefix_ids, strict=True))
    if said != tokenizer.prefix_ids:
        raise Refused(
            f"{checkpoint.source}: config.json says {', '.join(_PREFIX_IDS)} = {said} and tokenizer.json "
            f"{tokenizer.prefix_ids}: they are not of one checkpoint"
        )
    return tokenizer


def _is_folder(source: str) -> bool:
    """Whether it is a folder. Raises Refused where it can be no name on the hub either."""
    path = Path(os.path.expanduser(source))
    is_folder = bool(source) and path.is_dir()
    if not is_folder and (path.exists() or not _HUB_NAME.fullmatch(source)):
        raise Refused(f"{source!r} is neither a folder nor a name on the hub; expected one such as llm-blender/PairRM")
    return is_folder


def _file(source: str, name: str) -> Path:
    """A file of the folder or name, fetched if it has to be. Raises Refused where there is none."""
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"; it has {', '.join(pickled)}, and pickles run code on load" if pickled and name == WEIGHTS else ""
        raise Refused(f"{source} has no {name}{found}: expected the folder of a PairRM, its weights as {WEIGHTS}")
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(source, name)))
    except (OSError, ValueError) as error:
        raise Refused(f"cannot get {name} of {source}: {error}") from error


def shapes_of(weights: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, by name. Raises Refused where it is damaged."""
    try:
        with safe_open(weights, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Refused(f"{weights} cannot be read: {error}") from error


def _encoder_of(shapes: Shapes, source: str) -> dict[str, Any]:
    """The settings of a DeBERTa-v3 that has these tensors."""
    names = {
        "words": "embeddings.word_embeddings.weight",
        "positions": "encoder.rel_embeddings.weight",
        "inner": "encoder.layer.0.intermediate.dense.weight",
    }
    missing = [ENCODER + name for name in names.values() if len(shapes.get(ENCODER + name, ())) != 2]
    if missing:
        raise Refused(f"{source}: {WEIGHTS} has no matrix {', '.join(missing)}: it is not a PairRM")
    words, positions, inner = (shapes[ENCODER + name] for name in names.values())
    if words[1] % HEAD_SIZE:
        raise Refused(f"{source}: its encoder is {words[1]} wide; expected a multiple of {HEAD_SIZE}, as in DeBERTa-v3")
    layers = {int(found[1]) for found in map(_LAYER.match, shapes) if found}
    return deberta_v3_large() | {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "num_attention_heads": words[1] // HEAD_SIZE,
        "position_buckets": positions[0] // 2,
        "intermediate_size": inner[0],
        "num_hidden_layers": max(layers) + 1,
    }


def _check_kind(encoder: Mapping[str, Any], source: str) -> None:
    """Raises Refused where the encoder is not built as DeBERTa-v3 is."""
    terms = encoder.get("pos_att_type")
    found = {name: encoder.get(name) for name in _DEBERTA_V3}
    found["pos_att_type"] = sorted(terms.split("|") if isinstance(terms, str) else terms or [])
    expected = _DEBERTA_V3 | {"pos_att_type": ["c2p", "p2c"]}
    for name, value in expected.items():
        if found[name] != value:
            raise Refused(
                f"{source}: config.json has {name} = {found[name]}, expected {value}: PairRM's encoder is a "
                "DeBERTa-v3, and no other is served"
            )


def _check_shapes(shapes: Shapes, encoder: Mapping[str, Any], source: str) -> None:
    """Raises Refused where the words or the head are not those of such an encoder."""
    try:
        hidden, vocab = int(encoder["hidden_size"]), int(encoder["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{source}: config.json has no whole number as {error}: expected that of a DeBERTa-v2") from error
    expected = {
        f"{ENCODER}embeddings.word_embeddings.weight": (vocab, hidden),
        f"{HEAD}1.weight": (hidden, 2 * hidden),
        f"{HEAD}1.bias": (hidden,),
        f"{HEAD}4.weight": (1, hidden),
        f"{HEAD}4.bias": (1,),
    }
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"is {shapes[name]}" if name in shapes else "is not there"
            raise Refused(f"{source}: in {WEIGHTS} {name} {found}, expected {shape}: it is not a PairRM")
