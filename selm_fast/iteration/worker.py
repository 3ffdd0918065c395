"""The process behind `run`: it imports torch once and forks one process for each part of each stage.

A stage ends with its process, so GPU memory comes back and a crash takes nothing along; forking spares each the seconds
that importing torch and transformers takes. This process itself never touches a GPU, or its forks could not.

Requests come as JSON lines on standard input, events go as JSON lines to standard output, each shorter than a pipe's
atomic write. When the driver is gone, so are this process and its forks: no stage outlives its run.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGINT, signal.SIGTERM)
FAILED = 1


def main() -> None:
    """Serve requests until standard input ends."""
    events = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not get into the events
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The driver passes on what its stages should hear; one that comes before a stage listens waits until it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    import selm_fast.iteration.stages  # noqa: F401  what every stage imports

    gpus = _gpus()
    _emit(events, {"event": "ready", "gpus": gpus})
    while request := sys.stdin.readline():
        _serve(json.loads(request) | {"gpus": gpus}, events, woken)


def _serve(request: dict[str, Any], events: int, woken: int) -> None:
    """Fork every part of a stage and wait for them; where one fails, the others are asked to stop."""
    pids = {}
    worker = os.getpid()
    request["port"] = _free_port()
    for index in range(request["count"]):
        pid = os.fork()
        if pid == 0:
            _child(request, index, events, worker)
        pids[pid] = index
    _emit(events, {"event": "started", "pids": list(pids)})
    codes: dict[int, int] = {}
    while pids:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable and not os.read(0, 1):  # the driver sends nothing while a stage runs: this is its end
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            os._exit(FAILED)
        if woken in readable:
            os.read(woken, 4096)
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
                if any(codes.values()):
                    for other in pids:
                        os.kill(other, signal.SIGTERM)
    _emit(events, {"event": "done", "codes": [codes[index] for index in sorted(codes)]})


def _child(request: dict[str, Any], index: int, events: int, worker: int) -> NoReturn:
    """One part of a stage, in a process of its own."""
    code = FAILED
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _STOPS:  # the second one changes nothing: the driver may tell a stage to stop, and `_serve` too
            signal.signal(number, lambda *_: None)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:  # gone before it was asked for
            os._exit(FAILED)
        with open(request["log"], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if request["count"] > 1 and request["stage"]["stage"] == "train":
            _take_rank(index, request["count"], request["port"])
        elif request["count"] > 1:
            _take_gpu(index, request["gpus"])
        code = _work(request, index, events)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(request: dict[str, Any], index: int, events: int) -> int:
    from selm_fast.config import RunConfig
    from selm_fast.errors import Refused, RunFailed, Stopped
    from selm_fast.iteration.job import Job
    from selm_fast.iteration.paths import Paths
    from selm_fast.iteration.plan import Stage
    from selm_fast.iteration.stages import do_part, finish
    from selm_fast.training.signals import StopFlag

    _quiet_transformers()
    config = RunConfig.model_validate(request["config"])
    given = request["stage"]
    stage = Stage(given["stage"], given["iteration"], given["settings"], given["inputs"])
    try:
        with StopFlag() as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            display = relay(events, index)
            settings = stage.settings_of(config)
            shares = index, request["of"], request["ranks"]
            job = Job(Paths(config), stage, settings, display, stop, *shares, request["vllm_python"])
            if request["seconds"] is None:
                do_part(job)
            else:
                finish(job, request["seconds"])
    except (Refused, RunFailed, Stopped) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        _emit(events, {"event": "reason", "index": index, "text": str(error)})
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        _emit(events, {"event": "reason", "index": index, "text": f"{type(error).__name__}: {error}"})
        return FAILED
    return 0


def relay(events: int, index: int) -> Any:
    """A display whose lines and phases are events, and lines of the log."""
    from selm_fast.training.progress import Display, Phase

    class Relay(Display):
        def say(self, message: str) -> None:
            print(message, flush=True)
            _emit(events, {"event": "say", "index": index, "text": message})

        @contextmanager
        def phase(self, name: str, total: int, unit: str, *, done: int = 0, lines: bool = True) -> Iterator[Phase]:
            _emit(events, {"event": "phase", "index": index, "name": name, "total": total, "unit": unit, "done": done})
            yield _RelayPhase(Display(quiet=True), name, total, unit, done, None)
            _emit(events, {"event": "end", "index": index, "name": name})

    class _RelayPhase(Phase):
        def advance(self, count: int = 1) -> None:
            self._done += count
            _emit(events, {"event": "advance", "index": index, "name": self._name, "count": count})

    return Relay(quiet=True)


def _emit(events: int, event: dict[str, Any]) -> None:
    """Write one event, its text cut where it is too long to go through a pipe in one piece; the log has all of it."""
    while len(data := json.dumps(event).encode() + b"\n") > select.PIPE_BUF:
        event["text"] = event["text"][: len(event["text"]) * 3 // 4]
    os.write(events, data)


def _gpus() -> int:
    """How many GPUs there are; counted in a fork, for where NVML cannot tell, counting makes CUDA unusable in forks."""
    pid = os.fork()
    if pid == 0:
        count = 0
        try:
            import torch

            count = torch.cuda.device_count()
        finally:
            os._exit(count)
    return max(0, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _take_gpu(index: int, gpus: int) -> None:
    """Leave this process one of the GPUs, as CUDA numbers them here, before anything here has looked at them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = [str(number) for number in range(gpus)] if visible is None else visible.split(",")[:gpus]
    if there:
        os.environ["CUDA_VISIBLE_DEVICES"] = there[index % len(there)]


def _take_rank(index: int, count: int, port: int) -> None:
    """Make this process one of those that train together, as torch's launcher would."""
    own = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
