"""What scoring computes: the rows there are, and their FLOPs; arithmetic alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

PLACES: Final = 3  # prefixes of a row, whose last hidden states are all that the head reads


def deberta_v3_large() -> dict[str, Any]:
    """The settings of PairRM's encoder, with the names of its config.json, which a PairRM does not bring."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("encoder.json").read_text("utf-8"))
    return found


def num_rows(candidates: Sequence[Sequence[str]]) -> int:
    """Rows that scoring takes: the ordered pairs of distinct candidates of each prompt."""
    counts = (len(set(texts)) for texts in candidates)
    return sum(count * (count - 1) for count in counts)


def flops(rows: int, tokens: float, config: Mapping[str, Any]) -> float:
    """FLOPs of so many rows of so many tokens each: matmuls of the encoder, whose attention is disentangled.

    With H hidden, I intermediate, P relative positions (2 position_buckets) and T tokens, a layer takes of a row, at
    Q places,

        Q (2 (2 H^2 + 2 H I) + 4 T H + 2 P H) + T (4 H^2 + 2 P H)

    for queries, output and feed-forward, content to content and its values, content to position, and for keys, values
    and position to content (DeBERTa, arXiv 2006.03654, equation 4); Q is T, in the last layer 3. The head is left out.
    config: of the encoder, with the names of its config.json.
    """
    hidden: int = config["hidden_size"]
    inner: int = config["intermediate_size"]
    positions: int = 2 * config["position_buckets"]
    layers: int = config["num_hidden_layers"]

    def layer(places: float) -> float:
        at_places = 4 * hidden * (hidden + inner) + 4 * tokens * hidden + 2 * positions * hidden
        return places * at_places + tokens * (4 * hidden**2 + 2 * positions * hidden)

    return rows * ((layers - 1) * layer(tokens) + layer(PLACES))
