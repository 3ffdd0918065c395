"""The back ends of a GPU, on one: error against float64, determinism, no host sync."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import attention_choice, shared_prefix_attention
from selm_fast.ops.attention import attention_backend
from selm_fast.ops.attention_layout import Case

from .attention_layouts import HEADS, SCALE, Rows, inputs, layout, ours, rms, run, separately

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Longer than a kernel's tile of 64 or 128 rows and keys, and not a multiple of it; branches of one query, too.
ROWS = layout((150, 131, 1, 200), (1, 1, 3), (30, 64, 65), (257, 128, 90, 5))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 70},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"window": 70, "softcap": 1.5},
}


def on_gpu(rows: Rows, heads: str, dtype: torch.dtype, size: int) -> list[Tensor]:
    return [t.cuda() for t in inputs(rows, heads, dtype, size)]


def skip_unless_served(backend: str, dtype: torch.dtype, heads: str, size: int, settings: dict[str, Any]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    case = Case(device, dtype, *HEADS[heads], size, "window" in settings, "softcap" in settings)
    reason = attention_choice.BACKENDS[backend].refusal(case)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")


@pytest.fixture
def no_host_sync() -> Iterator[None]:
    """Waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["varlen", "flash_attn_3", "flash_attn", "torch"])
def test_errors_are_at_most_twice_those_of_separate_sequences_through_torch(
    backend: str, dtype: torch.dtype, setting: str, heads: str, size: int
) -> None:
    """Against fp64: rms error of the output and of every gradient."""
    settings = SETTINGS[setting]
    skip_unless_served(backend, dtype, heads, size, settings)
    tensors = on_gpu(ROWS, heads, dtype, size)
    exact = run(separately, [t.double() for t in tensors], ROWS, **settings)
    got = run(ours(ROWS, backend, "cuda"), tensors, **settings)
    torchs = run(separately, tensors, ROWS, **settings)
    for value, own, expected in zip(got, torchs, exact, strict=True):
        assert value.dtype == dtype
        assert rms(value - expected) <= 2 * rms(own - expected)


def test_fp32_on_a_gpu_is_that_of_float64() -> None:
    tensors = on_gpu(ROWS, "gqa", torch.float32, 64)
    exact = run(separately, [t.double() for t in tensors], ROWS)
    for value, expected in zip(run(ours(ROWS, device="cuda"), tensors), exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["varlen", "flash_attn_3", "flash_attn"])
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    """dq is added up over blocks of keys, dk over branches: fixed orders, on a pack that fills the GPU and on one that
    does not."""
    skip_unless_served(backend, torch.bfloat16, "gqa", 128, {})
    for rows in (ROWS, layout(*[(200, 150, 150, 150)] * 24)):
        tensors = on_gpu(rows, "gqa", torch.bfloat16, 128)
        first = run(ours(rows, backend, "cuda"), tensors)
        for _ in range(3):
            for one, other in zip(first, run(ours(rows, backend, "cuda"), tensors), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["varlen", "flash_attn_3", "flash_attn"])
def test_a_group_does_not_see_its_neighbours(backend: str) -> None:
    """Outputs to the bit; of the gradients only the order in which dq is added up may differ."""
    skip_unless_served(backend, torch.bfloat16, "gqa", 64, {})
    alone, among = layout((50, 140, 33)), layout((3, 2, 2), (50, 140, 33), (80, 10))
    tensors = on_gpu(among, "gqa", torch.bfloat16, 64)
    inside = slice(6, 6 + alone.num_rows)
    got = run(ours(among, backend, "cuda"), tensors)
    single = run(ours(alone, backend, "cuda"), [t[inside] for t in tensors])
    assert torch.equal(got[0][inside], single[0])
    for packed, own in zip(got[1:], single[1:], strict=True):
        assert rms(packed[inside] - own) <= 2**-9 * rms(own)


@pytest.mark.parametrize("backend", ["varlen", "flash_attn_3", "flash_attn"])
def test_neither_forward_nor_backward_waits_for_the_gpu(backend: str, request: pytest.FixtureRequest) -> None:
    skip_unless_served(backend, torch.bfloat16, "gqa", 64, {"window": 70})
    attend, tensors = ours(ROWS, backend, "cuda"), on_gpu(ROWS, "gqa", torch.bfloat16, 64)
    run(attend, tensors, window=70)  # the self-test waits, once
    request.getfixturevalue("no_host_sync")
    run(attend, tensors, window=70)


def test_this_gpu_is_served_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for window in (None, 70):
            served = attention_backend("cuda", window=window)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert served == "varlen"


def test_a_compiled_caller_gives_the_same() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prefix_attention(q, k, v, **arguments, scale=SCALE) * 2

    arguments = ROWS.arguments("cuda")
    tensors = on_gpu(ROWS, "gqa", torch.bfloat16, 64)
    for one, other in zip(run(torch.compile(attend, fullgraph=True), tensors), run(attend, tensors), strict=True):
        torch.testing.assert_close(one, other)
