"""The Triton kernel of AdamW against the plain-torch reference: the same bits, every one."""

from __future__ import annotations

import pytest
import torch

from selm_fast.ops.adamw import Tensors, by_torch
from tests.ops.adamw_cases import MOMENTS, copied, make, number, same_bits, settings
from tests.ops.triton_cases import DEVICE, anywhere

adamw_triton = pytest.importorskip("selm_fast.ops.adamw_triton")

pytestmark = anywhere

BLOCK = adamw_triton.BLOCK_N


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("numel", [1, 16, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 352])
def test_the_bits_of_the_reference(numel: int, moments: torch.dtype) -> None:
    """Several steps, so long that each last bit of one shows, and nothing beyond the tensor is touched."""
    guarded = make(numel + 8, moments, DEVICE)
    first = copied(guarded)
    expected = Tensors(*(t[:numel].clone() for t in guarded))
    chosen = settings(lr=0.5, salt=(1 << 62) + 12345, offset=(1 << 32) - 500)
    for nth in (1, 2, 100_000):
        for grad_scale in (None, number(0.37, DEVICE)):
            adamw_triton.adamw_step(
                Tensors(*(t[:numel] for t in guarded)), number(nth, DEVICE), chosen, grad_scale, None
            )
            by_torch(expected, number(nth, DEVICE), chosen, grad_scale, None)
            assert same_bits(Tensors(*(t[:numel].clone() for t in guarded)), expected)
    assert all(torch.equal(t[numel:], old[numel:]) for t, old in zip(guarded, first, strict=True))


@pytest.mark.parametrize("salt", [0, 1, -1, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("offset", [0, (1 << 31) - 100, (1 << 32) - 100, (1 << 45) + 16, (1 << 62) - 1])
def test_positions_and_salts_of_64_bits(salt: int, offset: int) -> None:
    got = make(300, torch.bfloat16, DEVICE)
    expected = copied(got)
    chosen = settings(salt=salt, offset=offset)
    adamw_triton.adamw_step(got, number(9, DEVICE), chosen, None, None)
    by_torch(expected, number(9, DEVICE), chosen, None, None)
    assert same_bits(got, expected)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e15, 1e19, 3e38])
def test_gradients_near_the_ends_of_fp32(size: float, moments: torch.dtype) -> None:
    """Squares underflow, to subnormals and to 0, and overflow; a moment in bf16 is never infinite."""
    got = make(300, moments, DEVICE)
    got = Tensors(got.param, got.grad.sign() * size, torch.zeros_like(got.exp_avg), torch.zeros_like(got.exp_avg_sq))
    expected = copied(got)
    for nth in (1, 2):
        adamw_triton.adamw_step(got, number(nth, DEVICE), settings(), None, None)
        by_torch(expected, number(nth, DEVICE), settings(), None, None)
    assert same_bits(got, expected)
    assert got.param.isfinite().all()
    if moments == torch.bfloat16:
        assert got.exp_avg.isfinite().all() and got.exp_avg_sq.isfinite().all()


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("moments", MOMENTS)
def test_skip(moments: torch.dtype, flag: bool) -> None:
    got = make(BLOCK + 100, moments, DEVICE)
    expected = copied(got)
    for skip in (torch.tensor(flag, device=DEVICE), number(0.25 * flag, DEVICE)):
        adamw_triton.adamw_step(got, number(4, DEVICE), settings(), number(2, DEVICE), skip)
        by_torch(expected, number(4, DEVICE), settings(), number(2, DEVICE), skip)
        assert same_bits(got, expected)
