"""The grid dither: bf16 copies stay as they were, to the bit, and from there on rounding is unbiased."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from selm_fast.training.dither import dither_

SMALLEST = 2.0**-124  # numbers below stay on the grid


def bits(values: Tensor) -> Tensor:
    """The encoding of bf16 or fp32 numbers."""
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


def every_bf16() -> Tensor:
    """All 65536 bf16 patterns as fp32 masters: zeros, subnormals, infinities and every NaN among them."""
    return (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32)


def offsets(value: float, count: int, *, seed: int = 0, name: str = "w") -> Tensor:
    """How far `count` masters of one value are moved, in units of the fp32 encoding."""
    master = torch.full((count,), value)
    before = bits(master).clone()
    dither_(master, seed=seed, name=name)
    return bits(master).long() - before


@pytest.mark.parametrize("seed", range(12))
def test_the_bf16_copy_of_every_number_is_the_same_to_the_bit(seed: int) -> None:
    master = every_bf16()
    before = master.bfloat16()
    dither_(master, seed=seed, name="layer.weight")
    assert torch.equal(bits(master.bfloat16()), bits(before))


def test_the_largest_offsets_keep_the_copy_whatever_the_seed() -> None:
    """Offsets of 32767 in the encoding, one short of the tie, both ways, on every number: the worst there is."""
    master = every_bf16()
    magnitude = master.abs()
    movable = (magnitude >= SMALLEST) & magnitude.isfinite()
    for offset in (32767, -32767):
        moved = (bits(master) + offset).view(torch.float32)[movable]
        assert torch.equal(bits(moved.bfloat16()), bits(master[movable].bfloat16()))
    drawn = offsets(1.5, 400_000)
    assert drawn.min() == -32767
    assert drawn.max() == 32767


def test_zeros_tiny_and_non_finite_numbers_stay_and_all_others_move() -> None:
    master = every_bf16()
    moved = torch.zeros(65536, dtype=torch.bool)
    for seed in range(4):
        fresh = every_bf16()
        dither_(fresh, seed=seed, name="w")
        moved |= bits(fresh) != bits(master)
    magnitude = master.abs()
    assert torch.equal(moved, (magnitude >= SMALLEST) & magnitude.isfinite())
    for value in (0.0, -0.0, math.inf, -math.inf, 1e-40):
        assert not offsets(value, 100).any()


def test_the_largest_finite_numbers_do_not_become_infinite() -> None:
    for sign in (1, -1):
        master = torch.full((100_000,), sign * torch.finfo(torch.bfloat16).max)
        dither_(master, seed=0, name="w")
        assert master.isfinite().all()
        assert master.bfloat16().isfinite().all()


def test_elements_off_the_grid_stay() -> None:
    """A second call moves nothing that the first one moved; masters that were trained stay as they are."""
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(10_000, generator=generator)
    trained[bits(trained) & 0xFFFF == 0] += 1e-6
    before = trained.clone()
    dither_(trained, seed=0, name="w")
    assert torch.equal(trained, before)
    mixed = before.clone()
    mixed[::2] = mixed[::2].bfloat16().float()
    expected = mixed.clone()
    dither_(mixed, seed=0, name="w")
    assert torch.equal(mixed[1::2], expected[1::2])
    assert (mixed[::2] != expected[::2]).float().mean() > 0.999


def test_an_offset_depends_on_seed_name_and_position_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator).bfloat16().float()
    drawn = offsets(1.5, 1000)
    again = values.clone()
    dither_(again, seed=0, name="w")
    assert torch.equal((bits(again) - bits(values)).long(), drawn)  # not on the value
    assert torch.equal(offsets(1.5, 2000)[:1000], drawn)  # not on the size
    square = torch.full((20, 50), 1.5)
    dither_(square, seed=0, name="w")
    assert torch.equal(bits(square).view(-1).long() - bits(torch.tensor(1.5)), drawn)  # nor on the shape
    torch.manual_seed(7)
    assert torch.equal(offsets(1.5, 1000), drawn)  # nor on the program's random numbers
    for other in (offsets(1.5, 1000, seed=1), offsets(1.5, 1000, name="v"), offsets(1.5, 1001)[1:]):
        assert (other == drawn).float().mean() < 0.01


def test_offsets_do_not_change_where_large_tensors_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = offsets(1.5, 1000)
    monkeypatch.setattr("selm_fast.training.dither._CHUNK", 96)
    assert torch.equal(offsets(1.5, 1000), drawn)


def test_the_offsets_of_one_release_are_those_of_the_next() -> None:
    """A resumed run and a second machine draw the same: splitmix64 of the position, salted by seed and name."""
    seed, name, wrap = 42, "model.layers.0.mlp.up_proj.weight", (1 << 64) - 1
    salt = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    expected = []
    for position in range(200):
        x = (position * 0x9E3779B97F4A7C15 + salt) & wrap
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        expected.append(max(((x ^ (x >> 31)) & 0xFFFF) - 0x8000, -0x7FFF))
    assert offsets(1.5, 200, seed=seed, name=name).tolist() == expected


@pytest.mark.parametrize(("seed", "name"), [(0, "w"), (42, "model.embed_tokens.weight"), (7, "lm_head.weight")])
def test_offsets_are_uniform_over_the_cell(seed: int, name: str) -> None:
    """In units of the encoding; chi-square over 64 bins, and neighbours that know nothing of each other."""
    count, bins = 1 << 18, 64
    drawn = offsets(-1.5, count, seed=seed, name=name)
    histogram = torch.bincount((drawn + 32768) * bins // 65536, minlength=bins).double()
    expected = count / bins
    assert ((histogram - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert abs(drawn.double().mean().item()) < 5 * 65536 / math.sqrt(12 * count)
    unit = drawn.double() / drawn.double().std()
    for lag in (1, 2, 64, 4096):
        assert abs((unit[:-lag] * unit[lag:]).mean().item()) < 5 / math.sqrt(count)


@pytest.mark.parametrize("value", [1.5, 1.0, -1.0, 2.0**-6, -0.0234375, 3.0])
@pytest.mark.parametrize("share", [0.003, 0.05, 0.4, -0.003, -0.05, -0.4])
def test_the_mean_movement_of_the_copies_is_that_of_the_masters(value: float, share: float) -> None:
    """An update of a share of the gap, added to many dithered masters. Below a power of two the gap is half as wide."""
    count = 1 << 18
    on_grid = torch.tensor(value)
    away = on_grid.sign() * share  # towards larger or smaller magnitude
    neighbour = (bits(on_grid.bfloat16()) + (1 if share > 0 else -1)).to(torch.int16).view(torch.bfloat16).float()
    gap = (neighbour - on_grid).abs().item()
    update = away.item() * gap
    master = torch.full((count,), value)
    dither_(master, seed=3, name="w")
    before = master.bfloat16().double()
    movement = (master.double() + update).float().bfloat16().double() - before
    # Each copy moves by one gap with probability |share|: the mean has this standard error.
    error = gap * math.sqrt(abs(share) * (1 - abs(share)) / count)
    assert movement.mean().item() == pytest.approx(update, abs=5 * error)
    assert set((movement / (math.copysign(gap, update))).round().tolist()) == {0.0, 1.0}


def test_without_the_dither_such_updates_are_lost() -> None:
    """What it is for: lr 5e-7 on weights of 0.02, whose half gap is 120 times that."""
    master = torch.full((1 << 18,), 0.02).bfloat16().float()
    plain = (master + 5e-7).bfloat16().double() - master.bfloat16().double()
    assert not plain.any()
    dithered = master.clone()
    dither_(dithered, seed=0, name="w")
    moved = ((dithered + 5e-7).bfloat16().double() - master.double()).mean().item()
    assert moved == pytest.approx(5e-7, rel=0.1)


def test_masters_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous fp32"):
        dither_(torch.zeros(4, dtype=torch.bfloat16), seed=0, name="w")
    with pytest.raises(ValueError, match="contiguous fp32"):
        dither_(torch.zeros(4, 4).t()[1:], seed=0, name="w")
