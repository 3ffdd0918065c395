"""The back ends of a GPU without one: what they ask of their kernels, by the kernels' documentation and schemas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from selm_fast.ops import attention_choice, attention_flash, attention_varlen, kv_gather
from selm_fast.ops.attention_layout import Layout, Scores

from .attention_layouts import LAYOUTS, SCALE, dense, inputs, run

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window beyond every key": {"window": 1000},
}
CAPPED: dict[str, dict[str, Any]] = {"softcap": {"softcap": 1.5}, "window and softcap": {"window": 4, "softcap": 1.5}}


def documented(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool, left: int, right: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash attention by its documentation: query i of a branch sees keys i + Lk - Lq - left to i + Lk - Lq + right,
    -1 being no bound and causal right = 0. -> out (T, H, Dh), logsumexp (H, T)."""
    right = 0 if causal else right
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    for b in range(len(cu_q) - 1):
        qb = q[cu_q[b] : cu_q[b + 1]].transpose(0, 1)
        kb, vb = (t[cu_k[b] : cu_k[b + 1]].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = qb @ kb.transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(kb.shape[1]) - torch.arange(qb.shape[1]).unsqueeze(1) - (kb.shape[1] - qb.shape[1])
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= (distance > right) if right >= 0 else False
        hidden |= (distance < -left) if left >= 0 else False
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ vb).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def documented_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, _ = documented(*leaves, *settings)
        return list(torch.autograd.grad(out, leaves, grad))


def check(backend: Any, heads: str, settings: dict[str, Any]) -> None:
    """Through the back end's functions, in fp64, against the dense computation."""
    scores = Scores(SCALE, settings.get("window"), settings.get("softcap"))
    for rows in LAYOUTS.values():
        tensors = [t.double() for t in inputs(rows, heads)]
        layout = Layout(**rows.arguments())
        q, k, v, grad = tensors
        out, lse = backend.forward(q, k, v, layout, scores)
        got = [out, *backend.backward(grad, q, k, v, out, lse, layout, scores)]
        for value, expected in zip(got, run(dense, tensors, rows, **settings), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            assert value.is_contiguous()
        assert lse.shape == (q.shape[1], rows.num_rows)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """torch.nn.attention.varlen on a CPU, with the signature of a version, as its documentation says."""
    calls: list[str] = []
    from torch.nn.attention import varlen as module

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
               return_aux: Any, scale: float, window_size: tuple[int, int]) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert return_aux.lse and cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        calls.append("forward")
        return documented(q, k, v, cu_q, cu_k, scale, window_size == (-1, 0), *window_size)

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1)):  # fmt: skip
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size)

    def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
                   num_splits=None):  # fmt: skip
        if not enable_gqa and query.size(1) != key.size(1):
            raise ValueError("Try setting enable_gqa=True for GQA.")
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size)

    def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state,
                 scale=None, window_size=None):  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled() and rng_state.dtype == torch.uint64
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert is_causal == (window_size == [-1, 0])  # as varlen_attn tells its own backward
        calls.append("backward")
        return documented_backward(grad_out, query, key, value, cu_seq_q, cu_seq_k, scale, is_causal, *window_size)

    monkeypatch.setattr(module, "varlen_attn", {"2.11": torch_2_11, "2.13": torch_2_13}[request.param])
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", backward)
    attention_varlen._varlen_attn.cache_clear()
    request.addfinalizer(attention_varlen._varlen_attn.cache_clear)
    return calls


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("heads", ["mha", "gqa", pytest.param("mqa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("varlen", ["2.11", "2.13"], indirect=True)
def test_varlen_is_asked_for_what_is_meant(varlen: list[str], heads: str, setting: str) -> None:
    check(attention_varlen, heads, SETTINGS[setting])
    assert varlen == ["forward", "backward"] * len(LAYOUTS)


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("varlen", ["2.13"], indirect=True)
def test_the_deterministic_switch_is_set_for_the_backward_and_put_back(
    varlen: list[str], before: tuple[bool, bool]
) -> None:
    try:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        check(attention_varlen, "gqa", {})
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
    assert varlen and after == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_installed_varlen_takes_these_arguments_without_a_host_sync(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real signatures and schemas on fake CUDA tensors, which have no values: reading one on the host would raise."""
    monkeypatch.setattr(kv_gather, "resolve", lambda *_: "torch")  # Triton launches kernels on real tensors only
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # torch 2.15 asks, to choose a kernel
    scores = Scores(SCALE, SETTINGS[setting].get("window"), None)
    with FakeTensorMode():
        q, grad = (torch.empty(30, 6, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(30, 2, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        index = torch.empty(50, dtype=torch.int64, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        layout = Layout(index, ends, ends, 12, 20)
        out, lse = attention_varlen.forward(q, k, v, layout, scores)
        grads = attention_varlen.backward(grad, q, k, v, out, lse, layout, scores)
        for value, like in zip((out, *grads), (q, q, k, v), strict=True):
            assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device)
        assert (lse.shape, lse.dtype) == ((6, 30), torch.float32)


def flash_attn_2() -> ModuleType:
    """The functions of flash_attn 2.7 and 2.8 that are used, with their signatures."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False):  # fmt: skip
        assert dropout_p == 0.0
        out, lse = documented(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right, softcap
        )
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes, deterministic, rng_state=None, zero_tensors=False):  # fmt: skip
        assert dropout_p == 0.0 and alibi_slopes is None and deterministic
        grads = documented_backward(
            dout, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right,
            softcap,
        )  # fmt: skip
        for total, grad in zip((dq, dk, dv), grads, strict=True):
            total.copy_(grad)
        return torch.empty(1)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def flash_attn_3() -> ModuleType:
    """The functions of flash_attn 3 that are used, with their signatures."""
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
            cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
            page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None,
            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1,
            window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
            num_splits=1, pack_gqa=None, sm_margin=0):  # fmt: skip
        out, lse = documented(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right, softcap
        )
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
            sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None,
            is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False,
            sm_margin=0):  # fmt: skip
        assert deterministic
        grads = documented_backward(
            dout, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal, window_size_left, window_size_right,
            softcap,
        )  # fmt: skip
        for total, grad in zip((dq, dk, dv), grads, strict=True):
            total.copy_(grad)
        return torch.empty(1)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


FLASH: dict[str, tuple[Callable[[], ModuleType], attention_flash.Flash]] = {
    "flash_attn": (flash_attn_2, attention_flash.Flash2()),
    "flash_attn_3": (flash_attn_3, attention_flash.Flash3()),
}


@pytest.mark.parametrize("setting", SETTINGS | CAPPED)
@pytest.mark.parametrize("heads", ["mha", "gqa", pytest.param("mqa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", FLASH)
def test_flash_attn_is_asked_for_what_is_meant(
    version: str, heads: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, backend = FLASH[version]
    module = make()
    monkeypatch.setitem(sys.modules, module.__name__.partition(".")[0], module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    check(backend, heads, (SETTINGS | CAPPED)[setting])


@pytest.mark.parametrize("version", FLASH)
def test_a_flash_attn_with_other_arguments_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the releases before 2.7, and those of version 3 whose window is one argument."""
    make, backend = FLASH[version]
    module = make()
    name = "_flash_attn_varlen_forward" if version == "flash_attn" else "_flash_attn_forward"

    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            dropout_p=0.0, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        raise AssertionError("not reached")

    monkeypatch.setattr(module, name, old)
    monkeypatch.setitem(sys.modules, module.__name__.partition(".")[0], module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backend, "refusal", lambda case: None)
    monkeypatch.setattr(attention_choice, "BACKENDS", attention_choice.BACKENDS | {version: backend})
    case = attention_choice.Case(torch.device("cpu"), torch.float32, 4, 2, 16, False, False)
    attention_choice.failure.cache_clear()
    assert "TypeError" in (attention_choice.failure(version, case) or "")
    attention_choice.failure.cache_clear()
