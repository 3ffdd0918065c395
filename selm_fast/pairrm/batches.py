"""Rows to batches: rows of like length together, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence


def batches(lengths: Sequence[int], *, max_tokens: int, max_area: int) -> list[list[int]]:
    """Indices of rows by batch, the longest rows first: what does not fit in memory shows at once.

    lengths: tokens of each row.
    max_tokens: rows x longest row of a batch; max_area: rows x (longest row)^2, which attention's memory grows with.
        A row that exceeds one of them is a batch of its own.
    """
    found: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows = len(found[-1]) + 1 if found else 1
        if not found or rows * longest > max_tokens or rows * longest**2 > max_area:
            found.append([])
            longest = lengths[index]
        found[-1].append(index)
    return found
