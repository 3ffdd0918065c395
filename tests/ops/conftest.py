"""One thread for every test here, and the back ends that this machine has."""

from __future__ import annotations

import pytest
import torch

from selm_fast.ops import extension
from selm_fast.ops.backend import interpreted


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Every test asks for `one_thread`."""


ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(params=["torch", "cpp", pytest.param("triton", marks=ON_GPU)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each back end in turn: Triton on a GPU, or through its interpreter."""
    if request.param == "cpp" and not extension.available():
        pytest.skip(f"the extension of csrc/ is absent: {extension.status()}")
    if request.param == "triton" and not (torch.cuda.is_available() or interpreted()):
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture(autouse=True)
def on_a_gpu_or_not_at_all(request: pytest.FixtureRequest) -> None:
    """Tests marked gpu skip themselves: Triton's interpreter, for one, rounds fp32 to 16 bits by cutting."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def device(backend: str) -> str:
    """Where the back end's tensors live."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
