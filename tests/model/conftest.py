"""One thread for every test here: tiny models, and results that repeat to the bit; nothing from the network."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Every test asks for `one_thread`."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no progress bars."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
