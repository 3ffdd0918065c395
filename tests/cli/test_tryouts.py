"""Collectives in processes of their own: what works, what fails, what dies, and what hangs."""

from __future__ import annotations

import os
import signal

import pytest

from selm_fast.cli import tryouts


def test_gloo_works_on_this_machine() -> None:
    assert tryouts.loop_back("gloo", "cpu") is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("print('sum 1024')", None),
        ("print('sum 7')", "sum 7"),
        (
            "raise RuntimeError('NCCL error: unhandled system error')",
            "RuntimeError: NCCL error: unhandled system error",
        ),
        ("raise SystemExit(3)", "exit code 3"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGABRT)})", "its process was ended by signal 6"),
        (
            "import time; time.sleep(60)",
            "hung for 1 s; NCCL_DEBUG=INFO in the environment shows where",
        ),
    ],
)
def test_every_end_is_told(monkeypatch: pytest.MonkeyPatch, script: str, reason: str | None) -> None:
    monkeypatch.setattr(tryouts, "LOOP_BACK", script)
    if "sleep" in script:
        monkeypatch.setattr(tryouts, "TIMEOUT_S", 1.0)
    assert tryouts.loop_back("nccl", "cuda:0") == reason


def test_an_interpreter_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tryouts.sys, "executable", os.devnull)
    found = tryouts.loop_back("gloo", "cpu")
    assert found is not None and found.startswith("PermissionError")


@pytest.mark.gpu
def test_nccl_works_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert tryouts.loop_back("nccl", "cuda:0") is None
