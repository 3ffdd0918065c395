"""SIGTERM and Ctrl-C: finish the micro-step, save, leave with exit code 75."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Set by the first SIGTERM or SIGINT while in use; a second one acts as it always did.

    Outside the main thread, where no handler can be installed, it is only ever set by `request`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def request(self) -> None:
        """Ask for a stop."""
        self.requested = True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.request()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
