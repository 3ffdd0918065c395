"""Several processes that train together, forked from the test's own, over gloo on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from selm_fast.config import Config
from selm_fast.model import Policy

from .harness import Rows, run, start_child, wait_for


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """Processes under way, by rank."""

    pids: Sequence[int]
    answers: Sequence[Path]

    def wait(self) -> list[int]:
        """Their exit codes."""
        return [wait_for(pid) for pid in self.pids]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send one of them a signal."""
        os.kill(self.pids[rank], number)

    def texts(self) -> list[str]:
        """What each said: its answer as JSON, or its error as `Type: message`."""
        return [path.read_text() if path.exists() else "" for path in self.answers]


def start_ranks(count: int, action: Callable[[int], Any], folder: Path) -> Ranks:
    """Start `action(rank)` in forked processes with the environment that torch's launcher gives.

    A process that raises one of this package's errors exits with its exit code, as the command does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = [folder / f"rank-{rank}" for rank in range(count)]
    port = free_port()

    def child(rank: int) -> int:
        own = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in own.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        try:
            answers[rank].write_text(json.dumps(action(rank)))
        except Exception as error:
            answers[rank].write_text(f"{type(error).__name__}: {error}")
            return int(getattr(error, "exit_code", 1))
        return 0

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        for path in answers:
            path.unlink(missing_ok=True)
        return Ranks([start_child(lambda rank=rank: child(rank)) for rank in range(count)], answers)  # type: ignore[misc]


def in_ranks(count: int, action: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run `action(rank)` in `count` processes to the end; -> their answers, by rank. Fails where one does."""
    ranks = start_ranks(count, action, folder)
    codes, texts = ranks.wait(), ranks.texts()
    if any(codes):
        raise AssertionError(f"exit codes {codes}: {texts}")
    return [json.loads(text) for text in texts]


def train_in(size: int, config: Config, rows: Rows, folder: Path) -> list[list[dict[str, Any]]]:
    """Train in `size` processes to the end; of size 0: in this one, without FSDP; -> what each one's `on_log` saw."""
    return [run(config, rows).lines] if size == 0 else in_ranks(size, lambda _: run(config, rows).lines, folder)


def start_training(
    size: int, config: Config, rows: Rows, folder: Path, disturb: Callable[[int], Any] = lambda _: None
) -> Ranks:
    """As `train_in`, under way. disturb: called with the rank in each process before, to break something there."""

    def work(rank: int) -> Any:
        disturb(rank)
        return run(config, rows).lines

    return start_ranks(size, work, folder)


def at_forward(nth: int, action: Callable[[], Any]) -> None:
    """From now on, in this process: `action` is called in the n-th packed forward, the model's self-check included."""
    count = 0
    hidden_states = Policy.hidden_states

    def counted(self: Policy, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == nth:
            action()
        return hidden_states(self, batch)

    Policy.hidden_states = counted  # type: ignore[method-assign]


def signal_oneself(number: signal.Signals) -> None:
    """What somebody else's `kill` would do, at a place of one's own choice."""
    os.kill(os.getpid(), number)
