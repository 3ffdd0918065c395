"""DeBERTa-v3's last hidden states at a few places of each row, from the modules of transformers' DebertaV2Model.

With Q_c, K_c, V of the states, Q_r, K_r the projections of 2 B relative positions, d a head's size, and bucket b(i - j)
of the distance of two tokens, attention's scores are (DeBERTa, arXiv 2006.03654, equation 4)

    A_ij = (Q_c_i . K_c_j  +  Q_c_i . K_r_b(i-j)  +  K_c_j . Q_r_b(i-j)) / sqrt(3 d)

What transformers computes, with less work: positions are projected once and not in every pass, the scale is in the
queries, the three terms are added in place, nothing is masked where nothing is padded, and the last layer is computed
at the wanted places alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer, make_log_bucket_position


@dataclass(frozen=True, slots=True)
class Positions:
    """Projections of the relative positions in one layer: (heads, 2 B, d), the queries scaled."""

    keys: Tensor
    queries: Tensor


def project_positions(model: DebertaV2Model) -> list[Positions]:
    """Of each layer; they depend on weights alone."""
    found = []
    with torch.inference_mode():
        relative = model.encoder.get_rel_embedding().unsqueeze(0)
        for layer in _layers(model):
            attention = layer.attention.self
            heads = attention.num_attention_heads
            keys, queries = (
                by_head(project(relative), heads)[0] for project in (attention.key_proj, attention.query_proj)
            )
            found.append(Positions(keys, queries * scale(queries.shape[-1])))
    return found


def states_at(
    model: DebertaV2Model, positions: list[Positions], ids: Tensor, lengths: Tensor, places: Tensor
) -> Tensor:
    """The last hidden states at some places of each row: (N, P, hidden).

    ids: (N, T) int64, padded on the right; lengths: (N,) int64, of the rows without padding; places: (N, P) int64.
    """
    states = model.embeddings(ids)
    num_rows, longest = ids.shape
    rows = torch.arange(num_rows, device=ids.device).unsqueeze(1)
    blocked = torch.arange(longest, device=ids.device) >= lengths.unsqueeze(1)
    padding = blocked[:, None, None] if bool(blocked.any()) else None
    buckets = relative_buckets(model, longest, ids.device)
    *layers, last = _layers(model)
    for layer, own in zip(layers, positions, strict=False):
        states = _layer(layer, own, states, states, buckets[None, None], padding)
    wanted = states[rows, places]
    return _layer(last, positions[-1], wanted, states, buckets[places].unsqueeze(1), padding)


def relative_buckets(model: DebertaV2Model, length: int, device: torch.device) -> Tensor:
    """Which relative position two tokens have: (T, T) int64, by place of query and of key."""
    encoder = model.encoder
    distances = torch.arange(1 - length, length, device=device)
    found = make_log_bucket_position(distances, encoder.position_buckets, encoder.max_relative_positions).long()
    found = (found + encoder.position_buckets).clamp(0, 2 * encoder.position_buckets - 1)
    places = torch.arange(length, device=device)
    by_place: Tensor = found[places[:, None] - places + length - 1]
    return by_place


def scale(head_size: int) -> float:
    """Of three terms of a dot product each."""
    return 1 / math.sqrt(3 * head_size)


def by_head(states: Tensor, heads: int) -> Tensor:
    """(N, T, heads x d) as (N, heads, T, d)."""
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)


def _layers(model: DebertaV2Model) -> list[DebertaV2Layer]:
    found: list[Any] = list(model.encoder.layer)
    return found


def _layer(
    layer: DebertaV2Layer,
    positions: Positions,
    queries: Tensor,
    states: Tensor,
    buckets: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """A layer at some places: (N, P, hidden). queries: (N, P, hidden), its input there.  states: (N, T, hidden), all.

    buckets: (N or 1, 1, P, T) int64.  padding: (N, 1, 1, T) bool, keys that are none.
    """
    own = layer.attention.self
    heads = own.num_attention_heads
    q, k, v = (
        by_head(project(given), heads)
        for project, given in ((own.query_proj, queries), (own.key_proj, states), (own.value_proj, states))
    )
    q = q * scale(q.shape[-1])
    index = buckets.expand(*q.shape[:-1], k.shape[-2])
    scores = torch.gather(q @ positions.keys.mT, -1, index)
    scores += torch.gather(positions.queries @ k.mT, -2, index)
    scores.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT)
    if padding is not None:
        scores.masked_fill_(padding, -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    attended = layer.attention.output(context, queries)
    found: Tensor = layer.output(layer.intermediate(attended), attended)
    return found
