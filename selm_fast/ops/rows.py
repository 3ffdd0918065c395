"""Which module of row kernels belongs to a back end; `rows_torch` says what each function does."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def row_kernels(backend: str) -> ModuleType:
    """rows_torch, rows_triton or rows_cpp: imported when first used, for Triton is not needed on a CPU."""
    return import_module(f"selm_fast.ops.rows_{backend}")
