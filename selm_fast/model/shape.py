"""The sizes of a transformers model, its parameters counted: it may be on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from selm_fast.roofline import CONFIG_NAMES, Shape


def shape_of(model: Any) -> Shape:
    """The sizes of a causal language model: not every architecture has those that its configuration suggests.

    Raises ValueError where the configuration lacks one.
    """
    config = model.config.get_text_config()
    # Asked one by one: an architecture may have other names for them. Where it says nothing, an MLP is 4 x hidden wide.
    sizes = {name: getattr(config, name, None) for name in CONFIG_NAMES}
    sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * (sizes["hidden_size"] or 0)
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    body = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1 and id(weight) not in tables)
    return replace(Shape.from_config(sizes), body=body, weights=sum(weight.numel() for weight in model.parameters()))
