"""How a process ended, in words."""

from __future__ import annotations

import signal


def ending(code: int) -> str:
    """What became of a process, by its exit code, which is negative where a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
    hint = " (the kernel does that where memory runs out)" if code == -signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
