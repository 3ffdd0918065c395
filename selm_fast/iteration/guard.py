"""Runs a command as the leader of a process group and ends the whole group once standard input ends.

A server that holds a GPU must not outlive the run that started it, however that ends: its end closes the pipe. Of our
own code this imports nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Final

GRACE_S: Final = 20.0  # that a group may take to end by itself
GONE_S: Final = 10.0  # and, once killed, to give back the memory of a GPU
_PR_SET_CHILD_SUBREAPER: Final = 36
_POLL_S: Final = 0.05
_KILLED: Final = 128


def main(command: list[str]) -> int:
    """-> the command's exit code, as a shell tells it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whose parent has ended is waited for here
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the parent decides
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    asked = threading.Event()
    threading.Thread(target=_watch, args=(asked,), daemon=True).start()
    # Until the leader is reaped, no other group gets its number.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if asked.wait(_POLL_S):
            _end(process.pid)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    _wait_for_all()
    return code if code >= 0 else _KILLED - code


def own_code(code: int) -> int:
    """The exit code that subprocess gives for what a guard has told."""
    return code if code <= _KILLED else _KILLED - code


def _watch(asked: threading.Event) -> None:
    while os.read(0, 1):
        pass
    asked.set()


def _end(leader: int) -> None:
    """Ask the group to end, and wait for its leader."""
    os.killpg(leader, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while os.waitid(os.P_PID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _wait_for_all() -> None:
    """Wait until whatever the command has started is gone, and what it held with it."""
    deadline = time.monotonic() + GONE_S
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
