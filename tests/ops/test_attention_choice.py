"""Which back end serves attention, and that one which errs is found out before it does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import attention_choice, attention_flash, attention_reference, extension
from selm_fast.ops.attention import attention_backend
from selm_fast.ops.attention_choice import BACKENDS, choose, failure
from selm_fast.ops.attention_layout import Case

from .attention_layouts import LAYOUTS, SETTINGS, inputs, ours, run

CPU = torch.device("cpu")
FIRST = "cpp" if extension.available() else "flash_cpu"  # of those that serve a CPU
FIRST_WITH_SOFTCAP = "cpp" if extension.available() else "torch"


@pytest.fixture(autouse=True)
def nothing_tested_yet() -> Iterator[None]:
    """Every test begins as a process does, and leaves no false verdict behind."""
    for function in (choose, failure):
        function.cache_clear()
    yield
    for function in (choose, failure):
        function.cache_clear()


def case(setting: str = "plain", dtype: torch.dtype = torch.float32, heads: int = 6, key_heads: int = 2) -> Case:
    return Case(CPU, dtype, heads, key_heads, 16, "window" in setting, "softcap" in setting)


def copy_of_the_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("broken_reference", attention_reference.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mask = attention_reference.causal_mask


def top_left(module: Any) -> None:
    """As torch's own is_causal, and cuDNN's mask before pytorch #193630."""
    module.causal_mask = lambda nq, nk, window, like: mask(nk, nk, window, like)[:nq]


def ignores_the_window(module: Any) -> None:
    module.causal_mask = lambda nq, nk, window, like: mask(nq, nk, None, like)


def sees_one_key_more_than_the_window(module: Any) -> None:
    module.causal_mask = lambda nq, nk, window, like: mask(nq, nk, window + 1, like)


def is_not_causal(module: Any) -> None:
    module.causal_mask = lambda nq, nk, window, like: 0 * mask(nq, nk, None, like).nan_to_num(neginf=0.0)


def pairs_heads_wrongly(module: Any) -> None:
    """Query head h with key head h mod Hk, as Tensor.repeat or expand before the wrong axis would."""

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        repeats = q.shape[1] // k.shape[1]
        keys, values = (t.float().repeat(1, repeats, 1).transpose(0, 1) for t in (k, v))
        return q.float().transpose(0, 1), keys, values

    module._high_heads_first = tiled


def drops_the_softcap(module: Any) -> None:
    module._capped = lambda q, k, scores: q @ k.transpose(1, 2) * scores.scale


def drops_the_softcap_in_backward(module: Any) -> None:
    right = module.branch_backward
    module.branch_backward = lambda *tensors: right(*tensors[:-1], tensors[-1]._replace(softcap=1e6))


def drops_the_scale(module: Any) -> None:
    right = module._capped
    module._capped = lambda q, k, scores: right(q, k, scores._replace(scale=k.shape[-1] ** -0.5))


def loses_the_gradients_of_shared_rows(module: Any) -> None:
    def last_writes(grads: tuple[Tensor, ...], index: Tensor, rows: int, dtype: torch.dtype) -> list[Tensor]:
        return [g.new_zeros(rows, *g.shape[1:]).index_copy_(0, index, g) for g in grads]

    module.gather_backward = last_writes


def swaps_dk_and_dv(module: Any) -> None:
    right = module.branch_backward
    module.branch_backward = lambda *tensors: tuple(right(*tensors)[n] for n in (0, 2, 1))


def gives_the_logsumexp_to_base_2(module: Any) -> None:
    right = module.branch_forward
    module.branch_forward = lambda *tensors: (lambda out, lse: (out, lse * 1.4427))(*right(*tensors))


def gives_nan(module: Any) -> None:
    right = module.branch_backward
    module.branch_backward = lambda *tensors: tuple(t * torch.nan for t in right(*tensors))


def gives_heads_first(module: Any) -> None:
    right = module.forward
    module.forward = lambda *a: (lambda out, lse: (out.transpose(0, 1).contiguous().transpose(0, 1), lse))(*right(*a))


def raises(module: Any) -> None:
    def forward(*_: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    module.forward = forward


BREAKS = [
    (top_left, "plain"),
    (top_left, "window"),
    (is_not_causal, "plain"),
    (ignores_the_window, "window"),
    (sees_one_key_more_than_the_window, "window"),
    (pairs_heads_wrongly, "plain"),
    (drops_the_softcap, "softcap"),
    (drops_the_softcap_in_backward, "softcap"),
    (drops_the_scale, "plain"),
    (loses_the_gradients_of_shared_rows, "plain"),
    (swaps_dk_and_dv, "plain"),
    (gives_the_logsumexp_to_base_2, "plain"),
    (gives_nan, "plain"),
    (gives_heads_first, "plain"),
    (raises, "plain"),
]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Put a back end called "new" before all others."""

    def put(backend: Any) -> Any:
        monkeypatch.setattr(attention_choice, "BACKENDS", {"new": backend, **BACKENDS})
        return backend

    return put


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("damage", "setting"), BREAKS)
def test_a_back_end_that_errs_is_refused_and_the_next_one_serves(
    damage: Callable[[Any], None], setting: str, dtype: torch.dtype, install: Callable[[Any], Any]
) -> None:
    module = copy_of_the_reference()
    damage(module)
    install(module)
    with pytest.warns(RuntimeWarning, match="'new' fails its self-test and is not used: "):
        assert choose("auto", case(setting, dtype)) == (FIRST_WITH_SOFTCAP if "softcap" in setting else FIRST)
    with pytest.raises(RuntimeError, match="'new' fails its self-test on this machine: "):
        choose("new", case(setting, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setting", ["plain", "window", "softcap", "window and softcap"])
def test_a_back_end_that_is_right_serves(setting: str, dtype: torch.dtype, install: Callable[[Any], Any]) -> None:
    install(copy_of_the_reference())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", case(setting, dtype)) == choose("new", case(setting, dtype)) == "new"


def test_the_warning_names_the_back_end_and_its_error(install: Callable[[Any], Any]) -> None:
    raises(install(copy_of_the_reference()))
    with pytest.warns(RuntimeWarning, match=r"'new' .*: RuntimeError: no kernel image is available$"):
        choose("auto", case())


def test_running_out_of_memory_is_no_verdict(install: Callable[[Any], Any]) -> None:
    module = install(copy_of_the_reference())
    right = module.forward

    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        choose("auto", case())
    module.forward = right
    assert choose("auto", case()) == "new"


def test_the_call_itself_is_served_by_the_next_one(install: Callable[[Any], Any]) -> None:
    module = install(copy_of_the_reference())
    top_left(module)
    rows = LAYOUTS["many"]
    tensors = inputs(rows, "gqa")
    with pytest.warns(RuntimeWarning, match="'new'"):
        got = run(ours(rows), tensors)
    for value, expected in zip(got, run(ours(rows, FIRST), tensors), strict=True):
        assert torch.equal(value, expected)


def test_each_kind_of_call_is_tested_once(install: Callable[[Any], Any]) -> None:
    module = install(copy_of_the_reference())
    calls = []
    right = module.forward
    module.forward = lambda *a: calls.append(a[0].shape[0]) or right(*a)
    rows = LAYOUTS["many"]
    for _ in range(2):
        for heads in ("gqa", "mha"):
            for setting in ("plain", "window", "window of one"):
                ours(rows)(*inputs(rows, heads)[:3], **SETTINGS[setting])
    tests = [rows_of_call for rows_of_call in calls if rows_of_call != rows.num_rows]
    assert (len(tests), len(calls) - len(tests)) == (4, 12)


def test_the_self_test_leaves_the_random_numbers_as_they_are() -> None:
    before = torch.get_rng_state()
    choose("flash_cpu", case())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("device", "dtype", "softcap", "served"),
    [
        ("cpu", torch.float32, None, FIRST),
        ("cpu", torch.bfloat16, None, FIRST),
        ("cpu", torch.float16, None, FIRST),
        ("cpu", torch.float32, 30.0, FIRST_WITH_SOFTCAP),
        ("cpu", torch.float64, None, "torch"),
        ("cpu", None, None, FIRST),
    ],
)
def test_what_serves_a_cpu(device: str, dtype: torch.dtype | None, softcap: float | None, served: str) -> None:
    assert attention_backend(device, dtype, heads=4, key_heads=2, head_size=16, softcap=softcap) == served


@pytest.mark.parametrize(("setting", "served"), [("plain", "flash_cpu"), ("window", "flash_cpu"), ("softcap", "torch")])
def test_what_serves_a_cpu_without_the_extension(monkeypatch: pytest.MonkeyPatch, setting: str, served: str) -> None:
    monkeypatch.setattr(extension, "available", lambda: False)
    assert choose("auto", case(setting)) == served
    with pytest.raises(ValueError, match="'cpp' needs the extension of csrc/: "):
        choose("cpp", case(setting))


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: tuple[str, ...]) -> None:
    """A GPU that is not there, as far as the choice asks for it, whose kernels are right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(attention_flash, "_is_installed", lambda module: module in installed)
    monkeypatch.setattr(attention_choice, "failure", lambda name, case: None)


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_size", "softcap", "served"),
    [
        ((9, 0), (), None, 128, None, "varlen"),
        ((8, 0), (), torch.float16, 256, None, "varlen"),
        ((10, 0), ("flash_attn_2_cuda",), None, 128, None, "varlen"),
        ((9, 0), (), None, 128, 50.0, "torch"),
        ((9, 0), ("flash_attn_2_cuda",), None, 128, 50.0, "flash_attn"),
        ((9, 0), ("flash_attn_2_cuda", "flash_attn_interface"), None, 128, 50.0, "flash_attn_3"),
        ((8, 0), ("flash_attn_2_cuda", "flash_attn_interface"), None, 128, 50.0, "flash_attn"),
        ((9, 0), ("flash_attn_2_cuda",), None, 264, None, "torch"),
        ((9, 0), ("flash_attn_2_cuda",), None, 20, None, "torch"),
        ((9, 0), ("flash_attn_2_cuda",), torch.float32, 128, None, "torch"),
        ((7, 5), ("flash_attn_2_cuda",), torch.float16, 128, None, "torch"),
    ],
)
def test_what_serves_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    dtype: torch.dtype | None,
    head_size: int,
    softcap: float | None,
    served: str,
) -> None:
    pretend(monkeypatch, capability, installed)
    assert attention_backend("cuda", dtype, head_size=head_size, softcap=softcap) == served


def test_a_gpu_that_is_not_there_is_served_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention_backend("cuda") == "torch"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("varlen", {}, "'varlen' needs an NVIDIA GPU; the tensors are on cpu"),
        ("flash_attn", {}, "'flash_attn' needs"),
        ("flash_attn_3", {}, "'flash_attn_3' needs"),
        ("flash_cpu", {"softcap": 1.5}, "'flash_cpu' has no softcap"),
        ("triton", {}, "backend must be one of 'auto', 'varlen'"),
    ],
)
def test_a_back_end_asked_for_that_cannot_serve_says_why(name: str, settings: dict[str, Any], message: str) -> None:
    rows = LAYOUTS["a group of three"]
    with pytest.raises(ValueError, match=message):
        ours(rows, name)(*inputs(rows, "gqa")[:3], **settings)
