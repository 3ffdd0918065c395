"""Rounding to bf16 by chance: exact where it can be, unbiased elsewhere, and random bits that look like it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selm_fast.ops.stochastic_rounding import BF16_MAX, random_bits, round_, step_key
from tests.ops.adamw_cases import bits_of, number

ALL_BITS = torch.arange(1 << 16, dtype=torch.int32)
SALTS = (0, 1, -1, 0x123456789ABCDEF, -(1 << 63), (1 << 63) - 1)
OFFSETS = (0, 1000, (1 << 31) - 3, 1 << 32, (1 << 33) + 7, (1 << 45) + (1 << 31))


def bits(count: int, *, step: int = 1, salt: int = 0, start: int = 0) -> Tensor:
    return random_bits(step_key(number(step), salt), start, torch.arange(count, dtype=torch.int32))


class TestRound:
    @pytest.mark.parametrize(
        "x", [1.0 + 2**-20, 1.0078, -3.14159, 1.9999, -0.02, 1e-30, 1e-39, -3e-41, 3.38e38, 2.0**-126 * 0.999]
    )
    def test_up_as_often_as_x_is_far_from_the_lower_neighbour(self, x: float) -> None:
        """Of all 65,536 random numbers exactly as many round away from 0 as x is above its lower neighbour."""
        xs = torch.full((1 << 16,), x)
        lower = (xs.view(torch.int32) & -0x10000).view(torch.float32)
        share = int(xs.view(torch.int32)[0]) & 0xFFFF
        rounded = round_(xs.clone(), ALL_BITS)
        up = rounded != lower
        assert int(up.sum()) == share > 0
        assert (rounded[up] == (lower.view(torch.int32) + 0x10000).view(torch.float32)[up]).all()
        assert rounded.double().mean().item() == pytest.approx(xs[0].item(), rel=1e-12, abs=0)

    def test_what_bf16_holds_stays(self) -> None:
        every = (ALL_BITS << 16).view(torch.float32)
        every = every[every.isfinite()]
        for random in (0, 1, 0x8000, 0xFFFF):
            rounded = round_(every.clone(), torch.full(every.shape, random, dtype=torch.int32))
            assert torch.equal(rounded.view(torch.int32), every.view(torch.int32))

    def test_bf16_holds_the_result(self) -> None:
        x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        rounded = round_(x.clone(), bits(10_000) & 0xFFFF)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert not torch.equal(rounded, x.bfloat16().float())

    def test_never_infinite(self) -> None:
        largest = torch.finfo(torch.float32).max
        for x in (largest, BF16_MAX, math.nextafter(BF16_MAX, math.inf), BF16_MAX * (1 + 2**-10)):
            for sign in (1, -1):
                rounded = round_(torch.full((1 << 16,), sign * x), ALL_BITS)
                assert rounded.eq(sign * BF16_MAX).all()

    def test_nan_stays(self) -> None:
        assert round_(torch.full((1 << 16,), torch.nan), ALL_BITS).isnan().all()


class TestRandomBits:
    def test_equal_those_of_integers_of_any_size(self) -> None:
        for salt in SALTS:
            for start in OFFSETS:
                for step in (1, 2, 100_000):
                    expected = [bits_of(salt, step, start + i) for i in range(3)]
                    assert [x & 0xFFFFFFFF for x in bits(3, step=step, salt=salt, start=start).tolist()] == expected

    def test_each_half_is_uniform(self) -> None:
        """chi^2 of 256 bins has mean 255 and standard deviation 22.6."""
        for start in OFFSETS:
            drawn = bits(1 << 18, start=start)
            for half in (drawn & 0xFFFF, (drawn >> 16) & 0xFFFF):
                for byte in (half & 0xFF, half >> 8):
                    counts = byte.bincount(minlength=256).double()
                    chi2 = ((counts - 1024) ** 2 / 1024).sum().item()
                    assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6

    def test_nothing_else_follows_from_one(self) -> None:
        """Moments, neighbours, steps, salts and ranges of 2^32 are uncorrelated: 5 standard deviations of 2^-9."""
        drawn = bits(1 << 18)
        others = {
            "moment": (drawn & 0xFFFF, (drawn >> 16) & 0xFFFF),
            "neighbour": (drawn[1:] & 0xFFFF, drawn[:-1] & 0xFFFF),
            "row": (drawn[4096:] & 0xFFFF, drawn[:-4096] & 0xFFFF),
            "step": (drawn & 0xFFFF, bits(1 << 18, step=2) & 0xFFFF),
            "salt": (drawn & 0xFFFF, bits(1 << 18, salt=1) & 0xFFFF),
            "range": (drawn & 0xFFFF, bits(1 << 18, start=1 << 32) & 0xFFFF),
        }
        for name, (a, b) in others.items():
            correlation = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()
            assert abs(correlation) < 5 * 2**-9, name

    def test_one_element_over_time(self) -> None:
        drawn = torch.stack([bits(8, step=step) for step in range(1, 2001)])
        for half in (drawn & 0xFFFF, (drawn >> 16) & 0xFFFF):
            shares = half.double() / 65536
            assert (shares.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 2000)
            pairs = (shares[1:] - 0.5) * (shares[:-1] - 0.5)
            assert pairs.mean(0).abs().max() < 5 / 12 / math.sqrt(1999)
