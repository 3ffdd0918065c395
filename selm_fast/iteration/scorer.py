"""Scores of candidates: the interface of a ranker, and the ranker that is a Python function in a process of its own.

The function may print, crash, hang or load what it likes: it has a process (`scorer_worker`), a time limit, and a
socket that only its process and ours know of, over which JSON travels.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from selm_fast.config import parse_function
from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration.exit_codes import ending
from selm_fast.iteration.scorer_worker import GRACE_S, Json, send

START_LIMIT_S: Final = 600.0  # of importing the function's module, at least: it may load a model
DUMP_S: Final = 1.0  # waited past a call's limit, at which the worker writes where it hangs and ends itself
POLL_S: Final = 3600.0  # poll(2) counts milliseconds in 31 bits
SHOWN_PROMPTS: Final = 3
WORKER: Final = Path(__file__).with_name("scorer_worker.py")

Scores = npt.NDArray[np.float64]


class Scorer(Protocol):
    """Anything that says how good candidate responses are."""

    def score(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """(n_prompts, n_candidates) float64, higher is better; NaN where there is no score."""
        ...


def score_distinct(
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    score_batch: Callable[[list[int], list[list[str]]], Scores],
) -> Scores:
    """Score every distinct text of a prompt once; equal candidates share the score: (n_prompts, n_candidates).

    score_batch: called with prompts that have equally many distinct candidates, by index, and those candidates in the
        order in which they first occur -> (n, n_distinct); a prompt's candidates are always scored in one call.
    Raises ValueError where prompts and candidates do not form a rectangle.
    """
    width = len(candidates[0]) if candidates else 0
    if len(candidates) != len(prompts) or any(len(group) != width for group in candidates) or (prompts and not width):
        raise ValueError(
            f"{len(prompts)} prompts and candidates {[len(group) for group in candidates]}; expected one list for each "
            "prompt, all of one length, 1 or more"
        )
    scores = np.full((len(prompts), width), np.nan)
    distinct = [list(dict.fromkeys(group)) for group in candidates]
    by_count: dict[int, list[int]] = defaultdict(list)
    for index, texts in enumerate(distinct):
        by_count[len(texts)].append(index)
    for indices in by_count.values():
        batch = score_batch(indices, [distinct[index] for index in indices])
        for index, row in zip(indices, batch, strict=True):
            scores[index] = [row[distinct[index].index(text)] for text in candidates[index]]
    return scores


class PythonScorer:
    """A function of the user's own, `python:MODULE:FUNCTION`, in one process for as long as the `with` block lasts.

    The function gets (prompts: list[str], candidates: list[list[str]]), as many candidates for each prompt, at least
    one and no two equal, and returns (n_prompts, n_candidates) numbers: nested lists, an array or a tensor. What it
    prints goes to standard error.
    """

    def __init__(self, spec: str, *, timeout_s: float) -> None:
        """timeout_s: seconds that one call of the function may take. Raises Refused where `spec` is malformed."""
        self._spec = spec
        self._timeout_s = timeout_s
        self._target = _parse(spec)
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        """Start the process and import the function. Raises Refused where there is no such function."""
        self._worker = _start(self._spec, *self._target, max(START_LIMIT_S, self._timeout_s))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def score(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """(n_prompts, n_candidates) float64, higher is better; NaN where the function gave NaN.

        Raises RunFailed where the function raises, hangs, ends its process or returns anything but scores.
        """

        def score_batch(indices: list[int], texts: list[list[str]]) -> Scores:
            return self._call(prompts, indices, texts)

        return score_distinct(prompts, candidates, score_batch)

    def _call(self, prompts: Sequence[str], indices: list[int], texts: list[list[str]]) -> Scores:
        assert self._worker is not None, "score is called inside `with`, and not again after its process has ended"
        which = _name_prompts(prompts, indices)
        try:
            message = {"prompts": [prompts[index] for index in indices], "candidates": texts}
            reply = self._worker.ask(message, self._timeout_s)
        except TimeoutError as error:
            self._worker = None
            raise RunFailed(
                f"ranker {self._spec}: no answer within {self._timeout_s:g} s on {which}; its process was killed. "
                "Its stack is in the log above. Make it faster, give it fewer prompts at once (rank.batch_prompts), or "
                "raise rank.timeout_s"
            ) from error
        except _Ended as error:
            self._worker = None
            raise RunFailed(f"ranker {self._spec}: its process {error} on {which}; see the log above") from error
        if "raised" in reply:
            raise RunFailed(f"ranker {self._spec} raised an error on {which}:\n{reply['raised']}")
        if "wrong" in reply:
            if reply["row"] is not None:
                which = _name_prompts(prompts, [indices[reply["row"]]])
            raise RunFailed(
                f"ranker {self._spec} returned a wrong result on {which}: {reply['wrong']}. It has to return "
                "(n_prompts, n_candidates) numbers, higher is better"
            )
        return np.array(reply["scores"], dtype=np.float64).reshape(len(indices), len(texts[0]))


def check_function(spec: str, *, timeout_s: float = START_LIMIT_S) -> None:
    """Import a ranker's function in a process of its own and look at it, without calling it.

    Raises Refused where module or function are missing, it is no function of (prompts, candidates), or importing it
    fails or takes longer than timeout_s.
    """
    _start(spec, *_parse(spec), timeout_s).close()


def _parse(spec: str) -> tuple[str, str]:
    try:
        return parse_function("ranker", spec)
    except ValueError as error:
        raise Refused(str(error)) from error


def _start(spec: str, module: str, function: str, limit_s: float) -> _Worker:
    """A process that has imported the function. Raises Refused."""
    path = [os.getcwd(), *(entry for entry in sys.path if isinstance(entry, str) and entry)]
    worker = _Worker()
    try:
        reply = worker.ask({"path": path, "module": module, "function": function}, limit_s)
    except TimeoutError as error:
        raise Refused(
            f"ranker {spec}: importing {module} took longer than {limit_s:g} s; load models in the function, when it "
            "is first called, or raise rank.timeout_s"
        ) from error
    except _Ended as error:
        raise Refused(f"ranker {spec}: its process {error} while it imported {module}; see the log above") from error
    except BaseException:
        worker.close()
        raise
    if "refused" in reply:
        worker.close()
        raise Refused(
            f"ranker {spec}: {reply['refused']}\nexpected a function (prompts, candidates) in a module that can be "
            f"imported from {path[0]} or an installed one"
        )
    return worker


def _name_prompts(prompts: Sequence[str], indices: Sequence[int]) -> str:
    """Prompts by their index in this call of `score` and their first 80 characters, the first few of them."""
    shown = ", ".join(f"{index} {prompts[index][:80]!r}" for index in indices[:SHOWN_PROMPTS])
    if len(indices) == 1:
        return f"prompt {shown}"
    more = "" if len(indices) <= SHOWN_PROMPTS else f", ... {indices[-1]} {prompts[indices[-1]][:80]!r}"
    return f"{len(indices)} prompts ({shown}{more})"


class _Ended(Exception):
    """The worker process is gone; the message says how, as the end of a sentence."""


class _Worker:
    """The process of `scorer_worker` and our end of its socket."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # A group of its own, so that it is killed with everything that it started; out of the way of Ctrl-C.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-X", "faulthandler", str(WORKER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),), process_group=0,
            )  # fmt: skip

    def ask(self, message: Json, limit_s: float) -> Json:
        """Send a message and wait for its reply. Raises TimeoutError or _Ended, both with the process gone."""
        start = time.monotonic()
        try:
            self._socket.settimeout(min(limit_s + DUMP_S, POLL_S))
            send(self._socket, {**message, "limit_s": limit_s})
            size = int.from_bytes(self._receive(8, start + limit_s + DUMP_S), "big")
            reply: Json = json.loads(self._receive(size, start + limit_s + DUMP_S))
        except TimeoutError:
            self._end(grace_s=0)
            raise
        except (ConnectionError, EOFError) as error:
            late = time.monotonic() - start > limit_s
            code = self._end(grace_s=GRACE_S)
            if late:  # it has ended itself, by the same limit
                raise TimeoutError from error
            raise _Ended(ending(code)) from error
        return reply

    def close(self) -> None:
        """Let the process end in order, which it does when its socket closes; kill what is left of its group."""
        self._socket.close()
        self._end(grace_s=2 * GRACE_S)

    def _receive(self, count: int, deadline: float) -> bytes:
        """Read so many bytes; those that are there are read after the deadline too."""
        data = bytearray()
        while len(data) < count:
            left = deadline - time.monotonic()
            self._socket.settimeout(min(max(left, 1e-3), POLL_S))
            try:
                part = self._socket.recv(count - len(data))
            except TimeoutError:
                if left <= 1e-3:
                    raise
                continue
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _end(self, *, grace_s: float) -> int:
        """Wait for the process, then kill what is left of its group; -> its exit code."""
        self._socket.close()
        pid, deadline = self._process.pid, time.monotonic() + grace_s
        not_reaped = os.WEXITED | os.WNOHANG | os.WNOWAIT  # until it is reaped, no other group gets its number
        while os.waitid(os.P_PID, pid, not_reaped) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(pid, signal.SIGKILL)
        return self._process.wait()
