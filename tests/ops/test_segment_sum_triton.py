"""The Triton segment sum against additions one after the other: fp32 sums in order leave no room for a difference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.triton_cases import DEVICE, anywhere, everywhere, poisoned_memory

segment_triton = pytest.importorskip("selm_fast.ops.segment_sum_triton")

NUM_ROWS, NUM_KEYS = 12, 61


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """A kernel that reads what nobody wrote shows it."""
    with poisoned_memory():
        yield


def sorted_index(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`order` and `bounds` for the backward of x[index]."""
    order = torch.argsort(index, stable=True)
    return order, torch.searchsorted(index[order], torch.arange(num_rows + 1, device=index.device))


def one_after_the_other(source: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Each row added to its place in the order of rows, in fp32; rounded once."""
    total = torch.zeros(out.shape)
    for row, place in zip(source.cpu().float(), index.tolist(), strict=True):
        total[place] += row
    return total.to(out)


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 7), (2, 64), (1, 1023), (8, 128), (5, 205)])
@pytest.mark.parametrize("source_is_fp32", [False, True])
@everywhere
def test_equals_additions_in_order(
    heads: int, size: int, source_is_fp32: bool, device: str, dtype: torch.dtype
) -> None:
    """Rows that nobody reads, rows read once, and rows read more often than is asked for at once."""
    generator = torch.Generator().manual_seed(size)
    source = torch.randn(NUM_KEYS, heads, size, generator=generator).to(
        device, torch.float32 if source_is_fp32 else dtype
    )
    index = torch.randint(1, NUM_ROWS - 1, (NUM_KEYS,), generator=generator)  # nobody reads the first and the last
    index[index == 4] = 5
    index[30] = 4
    counts = index.bincount(minlength=NUM_ROWS)
    assert counts.min() == 0 and counts[4] == 1 and counts.max() > segment_triton.ROWS_IN_FLIGHT
    order, bounds = sorted_index(index.to(device), NUM_ROWS)
    for bounds_dtype in (torch.int64, torch.int32):
        out = torch.empty(NUM_ROWS, heads, size, dtype=dtype, device=device)
        segment_triton.segment_sum(source, order, bounds.to(bounds_dtype), out)
        assert torch.equal(out, one_after_the_other(source, index, out))


class TestSegmentSum:
    pytestmark = anywhere

    def test_without_keys(self) -> None:
        none, out = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(3, 2, 4, device=DEVICE)
        segment_triton.segment_sum(torch.empty(0, 2, 4, device=DEVICE), *sorted_index(none, 3), out)
        assert out.eq(0).all()

    @pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
    def test_without_rows_or_columns(self, shape: tuple[int, int, int]) -> None:
        none, out = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(shape, device=DEVICE)
        segment_triton.segment_sum(torch.empty(0, *shape[1:], device=DEVICE), *sorted_index(none, shape[0]), out)
        assert out.numel() == 0

    def test_a_nan_stays_in_its_segment(self) -> None:
        source, index = torch.ones(5, 1, 3, device=DEVICE), torch.tensor([0, 1, 0, 1, 2], device=DEVICE)
        source[3, 0, 1] = torch.nan
        out = torch.empty(3, 1, 3, device=DEVICE)
        segment_triton.segment_sum(source, *sorted_index(index, 3), out)
        assert out.isnan().nonzero().tolist() == [[1, 0, 1]]

    def test_the_same_bits_from_run_to_run(self) -> None:
        source = torch.randn(50, 4, 65, device=DEVICE)
        order, bounds = sorted_index(torch.arange(50, device=DEVICE) % 3, 3)
        first, second = (torch.empty(3, 4, 65, device=DEVICE) for _ in range(2))
        segment_triton.segment_sum(source, order, bounds, first)
        segment_triton.segment_sum(source, order, bounds, second)
        assert torch.equal(first, second)
