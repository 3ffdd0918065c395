"""What `selm-fast doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; a problem means that this machine cannot train."""

    topic: str
    name: str
    found: str
    state: State = "ok"
    remark: str = ""


def one_line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
