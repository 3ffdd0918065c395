"""One micro-batch as the model sees it: groups laid end to end, each prompt once, nothing padded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """T packed tokens in B attention branches; N response tokens of S distinct sequences in G groups.

    A group is `[prompt + first response | second | third]`. The first branch is ordinary causal attention. A further
    branch begins with a copy of the last prompt token, and its keys are the rows of the prompt's others and its own. No
    branch takes its response's last token as input, so each response row predicts one target and none is used twice.
    """

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64; a response continues its prompt's positions
    cu_seqlens_q: Tensor  # (B+1,) int32, query rows of each branch
    cu_seqlens_k: Tensor  # (B+1,) int32, key rows of each branch
    kv_index: Tensor  # (Tk,) int64, which of the T rows each key row is
    max_seqlen_q: int
    max_seqlen_k: int
    response_rows: Tensor  # (N,) int64, the row whose hidden state predicts targets[i]
    targets: Tensor  # (N,) int64
    cu_responses: Tensor  # (S+1,) int32, response tokens by sequence
    # (S,) digest of (prompt ids, response ids): index of the reference cache. Of a batch of no groups: ()
    sequence_keys: tuple[bytes, ...]
    row_ids: tuple[int, ...]  # (G,) dataset rows, for messages
    pairs: Pairs  # sequences of a group are contiguous; no sequence serves two groups

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.row_ids)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; copies from the host to a GPU wait for nothing that the GPU has to do."""
        moved: dict[str, Any] = {
            field.name: sent(value, torch.device(device))
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        roles = (self.pairs.chosen, self.pairs.rejected, self.pairs.explored)
        chosen, rejected, explored = (sent(role, torch.device(device)) for role in roles)
        return dataclasses.replace(self, **moved, pairs=Pairs(chosen=chosen, rejected=rejected, explored=explored))


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; from pageable memory the host would wait for the copy, and for all before it."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
