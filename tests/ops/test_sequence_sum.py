"""`sequence_sum`: exact to fp64, and blind to whatever else is in the pack."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selm_fast.ops import sequence_sum


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_responses of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def random_logps(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probs from -20 to -1e-8, near-certain tokens among them: no sum of these is exact in fp64."""
    return -torch.exp(torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 21.4 - 18.4).to(dtype)


@given(lengths=st.lists(st.integers(0, 50), max_size=12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_exact_arithmetic_to_the_last_bits_of_fp64(lengths: list[int], seed: int) -> None:
    logps = random_logps(sum(lengths), seed)
    sums = sequence_sum(logps, offsets(lengths))
    assert sums.dtype == torch.float64
    assert sums.shape == (len(lengths),)
    start = 0
    for length, total in zip(lengths, sums.tolist(), strict=True):
        expected = math.fsum(logps[start : start + length].tolist())
        assert abs(total - expected) <= 1e-14 * abs(expected)  # 50 additions in fp32 would err by 1e-6
        start += length


def test_long_sequences_lose_nothing() -> None:
    """512 tokens and more: a sum in fp32 errs by 1e-4 nats, which is more than a step moves."""
    logps = random_logps(5000)
    sums = sequence_sum(logps, offsets([512, 4488])).tolist()
    for total, part in zip(sums, (logps[:512], logps[512:]), strict=True):
        assert total == pytest.approx(math.fsum(part.tolist()), rel=1e-13)


def test_a_sequence_has_the_same_bits_among_any_neighbours() -> None:
    logps = random_logps(300, seed=1)
    alone = sequence_sum(logps, offsets([300]))
    for before in (1, 2, 3, 7, 64, 1000):
        for after in (0, 5, 511):
            packed = torch.cat([random_logps(before, 2), logps, random_logps(after, 3)])
            assert torch.equal(sequence_sum(packed, offsets([before, 300, after]))[1:2], alone)


def test_empty_sequences_sum_to_zero() -> None:
    logps = random_logps(5)
    sums = sequence_sum(logps, offsets([0, 2, 0, 0, 3, 0]))
    expected = [0.0, math.fsum(logps[:2].tolist()), 0.0, 0.0, math.fsum(logps[2:].tolist()), 0.0]
    assert sums.tolist() == pytest.approx(expected, rel=1e-14)
    assert sums[0].item() == sums[2].item() == sums[-1].item() == 0.0
    assert sequence_sum(torch.zeros(0), torch.zeros(1, dtype=torch.int32)).shape == (0,)
    assert sequence_sum(torch.zeros(0), offsets([0, 0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_token_gets_its_sequences_gradient(dtype: torch.dtype) -> None:
    logps = random_logps(9, dtype=dtype).requires_grad_()
    upstream = torch.tensor([2.0, -3.0, 0.25, 8.0], dtype=torch.float64)
    sequence_sum(logps, offsets([2, 0, 4, 3])).backward(upstream)
    assert logps.grad.dtype == dtype
    assert logps.grad.tolist() == [2.0] * 2 + [0.25] * 4 + [8.0] * 3


def test_gradient_where_every_sequence_is_empty() -> None:
    logps = torch.zeros(0, requires_grad=True)
    sequence_sum(logps, offsets([0, 0])).sum().backward()
    assert logps.grad.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_may_be_any_integers(dtype: torch.dtype) -> None:
    logps = random_logps(6)
    assert torch.equal(sequence_sum(logps, offsets([4, 2], dtype)), sequence_sum(logps, offsets([4, 2])))


@pytest.mark.parametrize(
    ("logps", "cu", "message"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 4]), "token_logps must be"),
        (torch.zeros(4, dtype=torch.long), torch.tensor([0, 4]), "token_logps must be"),
        (torch.zeros(4), torch.tensor([[0, 4]]), "cu_responses must be"),
        (torch.zeros(4), torch.tensor([], dtype=torch.int32), "cu_responses must be"),
        (torch.zeros(4), torch.tensor([0.0, 4.0]), "cu_responses must be"),
        (torch.zeros(4), torch.tensor([0, 3]), "rise from 0 to N = 4"),
        (torch.zeros(4), torch.tensor([0, 5]), "rise from 0 to N = 4"),
        (torch.zeros(4), torch.tensor([1, 4]), "rise from 0 to N = 4"),
        (torch.zeros(4), torch.tensor([0, 3, 2, 4]), "rise from 0 to N = 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(logps: Tensor, cu: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_sum(logps, cu)


def test_the_custom_op_is_sound() -> None:
    """Schema, fake kernels and autograd registration, under dynamic shapes too."""
    logps = random_logps(9).requires_grad_()
    torch.library.opcheck(torch.ops.selm_fast.sequence_sum.default, (logps, offsets([4, 0, 5]), "torch"))
