"""The driver's side of `worker`: start a stage in processes of its own, show what they say, pass signals on."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from selm_fast.config import RunConfig
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration.exit_codes import ending
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import PARALLEL, Stage
from selm_fast.training.progress import Display, Phase
from selm_fast.training.signals import StopFlag

_WORKER = (sys.executable, "-m", "selm_fast.iteration.worker")
_POLL_S = 0.2
_TAIL_LINES = 15


class Launcher(Protocol):
    """Runs stages, wherever."""

    def parts(self, stage: Stage) -> int:
        """In how many processes a stage runs."""
        ...

    def run(self, stage: Stage, *, seconds: float | None) -> None:
        """Do every part of a stage or, given the seconds that these took, finish it.

        Raises Refused, RunFailed or Stopped as the stage does.
        """
        ...


class Processes:
    """Stages as processes, forked from one that has imported what they need."""

    def __init__(
        self, paths: Paths, display: Display, stop: StopFlag, *, lock: int, vllm_python: str | None = None
    ) -> None:
        """lock: descriptor of the run's lock; the processes hold it too, so that none of them outlives it.

        vllm_python: as in `Job`.
        """
        self._paths, self._display, self._stop, self._lock = paths, display, stop, lock
        self._vllm_python = vllm_python
        self._worker: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._gpus: int | None = None  # until the worker says

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches the driver alone, which passes it on once.
        self._worker = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._lock,),
            start_new_session=True,
            env=_environment(),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._worker is not None and self._worker.stdin is not None and self._worker.stdout is not None
        with suppress(BrokenPipeError):  # it is gone, and a request with it
            self._worker.stdin.close()
        self._worker.wait()
        self._worker.stdout.close()

    def parts(self, stage: Stage) -> int:
        """One process for each GPU or as `processes` says, for stages whose work can be shared.

        Training shares out the weights and not the work alone, which on a CPU does not pay: there it is one.
        """
        if stage.name == "train":
            return self._ranks()
        if stage.name not in PARALLEL:
            return 1
        if stage.name == "rollout" and stage.settings_of(self._paths.config).rollout.engine != "transformers":
            return 1  # the servers share the work
        return self._paths.config.processes or max(1, self._usable_gpus())

    def _ranks(self) -> int:
        """Processes that train together."""
        gpus = self._usable_gpus()
        return max(1, min(gpus, self._paths.config.processes or gpus))

    def _usable_gpus(self) -> int:
        """GPUs that the settings let a run use."""
        if self._paths.config.device == "cpu":
            return 0
        events = self._events()
        while self._gpus is None:
            next(events)
        return self._gpus

    def run(self, stage: Stage, *, seconds: float | None) -> None:
        """As `Launcher.run`; each process that fails tells its reason, and the log what came before it."""
        of = self.parts(stage)
        log = self._paths.log(stage.iteration, stage.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "config": _plain(self._paths.config),
            "stage": stage.as_json(),
            "log": str(log),
            "count": of if seconds is None else 1,
            "of": of,
            "ranks": self._ranks(),
            "vllm_python": self._vllm_python,
            "seconds": seconds,
        }
        assert self._worker is not None and self._worker.stdin is not None
        try:
            self._worker.stdin.write(json.dumps(request).encode() + b"\n")
            self._worker.stdin.flush()
        except BrokenPipeError as error:
            raise RunFailed(f"the process that starts the stages is gone (exit code {self._worker.wait()})") from error
        codes, reasons = self._follow(stage)
        _raise(stage, codes, reasons, log)

    def _follow(self, stage: Stage) -> tuple[list[int], dict[int, str]]:
        """Show what the processes of a stage say until all have ended: their exit codes and reasons."""
        pids: list[int] = []
        reasons: dict[int, str] = {}
        phases: dict[str, Phase] = {}
        open_in: dict[str, set[int]] = {}
        told = False
        with ExitStack() as stack:
            for event in self._events():
                match event.get("event"):
                    case "started":
                        pids = event["pids"]
                    case "say":
                        self._display.say(f"  {event['text']}")
                    case "phase":
                        # Every process has its share of one phase; one bar shows them together.
                        name = event["name"]
                        if name not in phases:
                            title = f"{stage.title}: {name}"
                            phases[name] = stack.enter_context(
                                self._display.phase(title, event["total"], event["unit"], done=event["done"])
                            )
                            open_in[name] = set()
                        else:
                            phases[name].extend(event["total"], event["done"])
                        open_in[name].add(event["index"])
                    case "advance":
                        phases[event["name"]].advance(event["count"])
                    case "end":
                        open_in[event["name"]].discard(event["index"])
                        if not open_in[event["name"]]:
                            phases.pop(event["name"]).close()
                    case "reason":
                        reasons[event["index"]] = event["text"]
                    case "done":
                        return event["codes"], reasons
                if self._stop.requested and pids and not told:
                    told = True
                    for pid in pids:
                        _signal(pid)
        raise AssertionError("the events of a stage end with its exit codes")

    def _events(self) -> Iterator[dict[str, Any]]:
        """Events as they come, and an empty one now and then, so that a signal is noticed."""
        assert self._worker is not None and self._worker.stdout is not None
        fd = self._worker.stdout.fileno()
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                event = json.loads(line)
                if event["event"] == "ready":
                    self._gpus = event["gpus"]
                yield event
                continue
            if not select.select([fd], [], [], _POLL_S)[0]:
                yield {}
                continue
            data = os.read(fd, 65536)
            if not data:
                code = self._worker.wait()
                raise RunFailed(
                    f"the process that starts the stages {ending(code)}; see above for its last words, and run the "
                    "same command to go on"
                )
            self._buffer += data


def _plain(config: RunConfig) -> dict[str, Any]:
    """Settings as they were given: unset ones follow from others, and are not to become set on the way."""
    return config.model_dump(mode="json", exclude_unset=True)


def _environment() -> dict[str, str]:
    return os.environ | {
        # NVML answers whether there is a GPU without making one unusable for forks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # What the driver can import, rankers beside its script included.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def _signal(pid: int) -> None:
    with suppress(ProcessLookupError):  # ended in the meantime
        os.kill(pid, signal.SIGTERM)


def _raise(stage: Stage, codes: list[int], reasons: dict[int, str], log: Path) -> None:
    """Raise what the exit codes of a stage's processes mean, the first that failed before one that was stopped."""
    failed = [index for index, code in enumerate(codes) if code not in (0, Stopped.exit_code)]
    if failed:
        index = failed[0]
        reason = reasons.get(index) or f"its process {ending(codes[index])}"
        if codes[index] == Refused.exit_code:
            raise Refused(f"{stage.title}: {reason} (log: {log})")
        tail = "" if index in reasons else "\n" + _tail(log)
        raise RunFailed(f"{stage.title} failed: {reason} (log: {log}); run the same command to go on{tail}")
    stopped = [index for index, code in enumerate(codes) if code == Stopped.exit_code]
    if stopped:
        raise Stopped(reasons.get(stopped[0], f"stopped in {stage.title}"))


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_TAIL_LINES:])
