"""Every row is in one batch, and no batch exceeds what it may."""

from __future__ import annotations

import random

import pytest

from selm_fast.pairrm.batches import batches
from selm_fast.pairrm.work import flops, num_rows


@pytest.mark.parametrize(("max_tokens", "max_area"), [(1, 1), (4096, 2**40), (10**9, 300_000), (4096, 300_000)])
def test_batches_hold_every_row_and_keep_their_limits(max_tokens: int, max_area: int) -> None:
    drawn = random.Random(0)
    lengths = [drawn.randint(9, 2048) for _ in range(300)]
    found = batches(lengths, max_tokens=max_tokens, max_area=max_area)
    assert sorted(index for batch in found for index in batch) == list(range(300))
    by_length = [lengths[index] for batch in found for index in batch]
    assert by_length == sorted(lengths, reverse=True)
    for batch, following in zip(found, [*found[1:], None], strict=True):
        longest = lengths[batch[0]]

        def fits(rows: int, longest: int = longest) -> bool:
            return rows * longest <= max_tokens and rows * longest**2 <= max_area

        assert len(batch) == 1 or fits(len(batch))
        assert following is None or not fits(len(batch) + 1)  # no batch ends early


def test_no_rows_no_batches() -> None:
    assert batches([], max_tokens=1, max_area=1) == []


def test_rows_are_ordered_pairs_of_distinct_candidates() -> None:
    assert num_rows([]) == 0
    assert num_rows([["a"], ["a", "a"], ["a", "b"], ["a", "b", "a"], ["a", "b", "c"], ["a", "b", "c", ""]]) == 22


def test_flops_are_those_of_the_matmuls() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DebertaV2Config

    from benchmarks.pairrm_checkpoint import SETTINGS
    from selm_fast.pairrm.deberta import project_positions, states_at
    from selm_fast.pairrm.encoder import PairEncoder

    config = DebertaV2Config(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, **SETTINGS
    )
    model = PairEncoder(config).pretrained_model
    positions = project_positions(model)
    ids, lengths = torch.full((2, 40), 5), torch.tensor([40, 40])
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        states_at(model, positions, ids, lengths, torch.tensor([[1, 9, 20]] * 2))
    unseen = 2 * 2 * 64 * 40 * (40 + 40 + 3)  # content to content, which is added in place
    assert flops(2, 40, config.to_dict()) == counted.get_total_flops() + unseen
