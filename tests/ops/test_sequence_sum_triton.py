"""The Triton sequence sums against the exact sum of their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.triton_cases import DEVICE, ON_GPU, anywhere, poisoned_memory

sums_triton = pytest.importorskip("selm_fast.ops.sequence_sum_triton")

pytestmark = anywhere

# Both sides of every block edge, and sequences of nothing at both ends and in the middle.
LENGTHS = [0, 1, 2, 1023, 0, 0, 1024, 1025, 3, 2048, 2049, 1, 0]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """A kernel that reads what nobody wrote shows it."""
    with poisoned_memory():
        yield


def make(dtype: torch.dtype, lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens, none of which is 0, and the border of each sequence."""
    tokens = -(torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) + 0.1) * 30
    cu_responses = torch.tensor([0, *lengths]).cumsum(0)
    return tokens.to(DEVICE, dtype), cu_responses.to(DEVICE)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, *(pytest.param(d, marks=ON_GPU) for d in (torch.bfloat16, torch.float16))],
)
def test_equals_the_exact_sum(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    tokens, cu_responses = make(dtype)
    got = sums_triton.sequence_sums(tokens, cu_responses.to(index_dtype))
    assert got.dtype == torch.float64
    values = [sequence.tolist() for sequence in tokens.double().cpu().split(LENGTHS)]
    for mine, exact in zip(got.tolist(), map(math.fsum, values), strict=True):
        # All terms are negative, so the error is that of some additions of the sum itself; 0 of nothing.
        assert abs(mine - exact) <= 16 * 2.0**-53 * abs(exact)


def test_tokens_may_have_a_stride() -> None:
    tokens, cu_responses = make(torch.float32)
    apart = torch.full((3 * tokens.shape[0],), torch.nan, device=DEVICE)
    apart[::3] = tokens
    assert torch.equal(
        sums_triton.sequence_sums(apart[::3], cu_responses), sums_triton.sequence_sums(tokens, cu_responses)
    )


def test_neighbours_do_not_change_a_bit() -> None:
    tokens, cu_responses = make(torch.float32)
    together = sums_triton.sequence_sums(tokens, cu_responses)
    for number, sequence in enumerate(tokens.split(LENGTHS)):
        before, after = torch.full((number,), torch.nan, device=DEVICE), torch.full((5,), torch.nan, device=DEVICE)
        packed = torch.cat([before, sequence, after])
        borders = torch.tensor([0, number, number + len(sequence), len(packed)], device=DEVICE)
        assert sums_triton.sequence_sums(packed, borders)[1] == together[number]


def test_the_same_bits_from_run_to_run() -> None:
    first, second = (sums_triton.sequence_sums(*make(torch.float32)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing(lengths: list[int]) -> None:
    assert sums_triton.sequence_sums(*make(torch.float32, lengths)).tolist() == [0.0] * len(lengths)


def test_a_nan_stays_in_its_sequence() -> None:
    tokens, cu_responses = make(torch.float32)
    tokens[1500] = torch.nan
    nan = sums_triton.sequence_sums(tokens, cu_responses).isnan()
    assert nan.nonzero().flatten().tolist() == [6]
