"""What is refused, and why: models whose responses cannot share an encoded prompt, and what this package does not
serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selm_fast.errors import Refused

SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
OTHER_HEADS = ("classifier", "summary")  # their settings say nothing of a language model
VISION_OR_AUDIO = ("vision_config", "audio_config", "speech_config")


def check_source(source: str, *, trust_remote_code: bool) -> None:
    """Refuse a local folder that cannot be loaded: adapters, pickled weights. Hub names pass.

    Raises Refused with the way out.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if folder.is_absolute() or source.startswith((".", "~")):
            raise Refused(f"model folder {source} does not exist")
        return
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise Refused(
                f"{source} is a LoRA adapter; LoRA is not served: merge it into its base model and give that folder"
            )
        raise Refused(f"{source} has no config.json: expected the folder of a transformers model")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = (
            f"; it has {', '.join(pickled)}, and pickled weights run code on load: convert them to safetensors"
            if pickled
            else ""
        )
        raise Refused(f"{source} has no *.safetensors weights{found}")
    check_config(
        json.loads((folder / "config.json").read_text("utf-8")), trust_remote_code=trust_remote_code, source=source
    )


def check_config(config: dict[str, Any], *, trust_remote_code: bool, source: str) -> None:
    """Refuse a model by its configuration: remote code, quantised weights, vision, state-space layers, dropout.

    Raises Refused with the reason.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type", "unknown")
    if kind not in CONFIG_MAPPING and config.get("auto_map") and not trust_remote_code:
        raise Refused(
            f"{source} ({kind}) brings its own Python code (auto_map); set model.trust_remote_code to true if you "
            "trust its authors"
        )
    if config.get("quantization_config"):
        raise Refused(
            f"{source} ({kind}) has quantised weights; they are not served: give the folder of the unquantised model"
        )
    for part in VISION_OR_AUDIO:
        if config.get(part):
            raise Refused(f"{source} ({kind}) has a {part}: vision and audio models are not served, only text models")
    if config.get("is_encoder_decoder"):
        raise Refused(f"{source} ({kind}) is an encoder-decoder; only decoder-only language models are served")
    odd = sorted(set(config.get("layer_types") or ()) - SHAREABLE_LAYERS)
    if odd:
        raise Refused(
            f"{source} ({kind}) has {', '.join(odd)} layers, whose state runs through prompt and response in order: "
            "its responses cannot share an encoded prompt"
        )
    for name, value in config.items():
        if name.startswith(OTHER_HEADS) or not isinstance(value, int | float) or value <= 0:
            continue
        if "dropout" in name or "layerdrop" in name or name.endswith("pdrop"):
            raise Refused(
                f"{source} ({kind}) has {name} = {value}: with dropout on, responses cannot share an encoded prompt "
                "and step 0 is not "
                f"exact; set {name} to 0 in its config.json"
            )


def check_model(model: Any, source: str) -> None:
    """Refuse a model by its class: no attention interface, recurrent state, no plain linear head.

    Raises Refused with the reason.
    """
    import torch

    kind = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise Refused(f"{source} ({kind}) carries recurrent state: its responses cannot share an encoded prompt")
    if not getattr(model, "_supports_attention_backend", False):
        raise Refused(
            f"{source} ({kind}) does not take its attention from transformers' attention interface, so it cannot "
            "read packed batches"
        )
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise Refused(f"{source} ({kind}) has no linear language-model head")
