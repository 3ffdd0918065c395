"""Where the tests of Triton kernels run, what uninitialised memory holds there, and how errors are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from selm_fast.ops.backend import interpreted

HAS_GPU = torch.cuda.is_available()
# The interpreter rounds fp32 to 16 bits by truncation: 16 bits are for the hardware.
INTERPRETER = pytest.param(
    "cpu",
    torch.float32,
    id="interpreter",
    marks=pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
PLACES = [
    INTERPRETER,
    *(
        pytest.param("cuda", dtype, id=f"cuda-{name}", marks=ON_GPU)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
    ),
]
DEVICE = "cuda" if HAS_GPU else "cpu"

everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)
# Tests without a dtype run once, wherever Triton does; on a GPU they are of its tests.
anywhere = [pytest.mark.gpu] if HAS_GPU else [pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]

# Absolute part of a bound, as a share of the exact result's norm: both computations may be right to the last bit.
FLOOR = {torch.float64: 4e-16, torch.float32: 2e-7, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Everything that torch.empty gives holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def assert_as_accurate(got: Tensor, peer: Tensor, exact: Tensor, floor: float | None = None) -> None:
    """The error of `got` is at most twice that of torch's own computation; both have infinities where `exact` has.

    floor: what is forgiven beyond that, as a share of the exact norm; FLOOR of the dtype unless told.
    """
    assert got.dtype == peer.dtype and got.shape == peer.shape == exact.shape
    wild = ~exact.isfinite()
    assert torch.equal(got.double()[wild], exact.double()[wild]), "infinities differ"
    got_error, peer_error, size = (
        torch.where(wild, 0.0, t).norm().item()
        for t in (got.double() - exact.double(), peer.double() - exact.double(), exact.double())
    )
    bound = 2 * peer_error + (FLOOR[got.dtype] if floor is None else floor) * size
    assert got_error <= bound, f"{got_error:.3g} against {peer_error:.3g}"
