"""The processes that train together: who they are, and what they tell each other beside FSDP's own traffic.

What is small and on the host (stop flags, metrics, the word that a phase is done) goes over a gloo group of its own, so
that none of it waits for a device. A process that is alone on a CPU has no groups at all.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from selm_fast.errors import RunFailed

# How long the others may take to a meeting, in multiples of `timeout_s`, which is for a step: some phases are long, and
# not equally long on all.
PATIENCE = {"start": 1, "rows": 6, "model": 6, "reference pass": 1, "step": 1, "checkpoint": 3, "export": 6}
_LAST_WORDS_S = 3.0  # that those who are left wait for each other, to find out who is not
# Groups that lost a process. As long as the longest phase may take, their destructors would wait for what hangs; the
# process can end at once (with os._exit) where nobody calls them.
_GIVEN_UP: list[dist.ProcessGroup] = []


@dataclass(frozen=True, slots=True)
class World:
    """All processes of a run. rank: of `size`.  device: this one's.  mesh: over all of them; None: nothing is sharded.

    control: the gloo group of the host's own messages.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks, and writes what is written once."""
        return self.rank == 0

    def any(self, flag: bool, phase: str = "step") -> bool:
        """Whether it is true of any process. All must ask. Raises RunFailed as `meet` does."""
        told = torch.tensor(int(flag))
        if self.control is not None:
            self._finish(dist.all_reduce(told, dist.ReduceOp.MAX, self.control, async_op=True), phase)
        return bool(told)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, of a tensor on this process's device, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor, phase: str = "step") -> list[Tensor]:
        """The values of every process, by rank; they may differ in length. values: (n,) on the CPU.

        Raises RunFailed as `meet` does.
        """
        if self.control is None:
            return [values]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        own = torch.tensor([values.shape[0]])
        self._finish(dist.all_gather(lengths, own, self.control, async_op=True), phase)
        longest = max(int(length) for length in lengths)
        mine = values.new_zeros(longest)
        mine[: values.shape[0]] = values
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._finish(dist.all_gather(parts, mine, self.control, async_op=True), phase)
        return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    def meet(self, phase: str) -> None:
        """Wait until all have come to the end of a phase (one of `PATIENCE`). Raises RunFailed naming who has not."""
        if self.control is not None:
            self._finish(dist.barrier(self.control, async_op=True), phase)

    def _finish(self, work: dist.Work | None, phase: str) -> None:
        assert work is not None
        with self.watched(phase):
            work.wait(timedelta(seconds=PATIENCE[phase] * self.timeout_s))

    @contextmanager
    def watched(self, phase: str) -> Iterator[None]:
        """Turn what a collective raises when another process is gone or late into RunFailed that names it."""
        try:
            yield
        except RuntimeError as error:
            if self.control is None or isinstance(error, RunFailed) or not is_of_a_collective(error):
                raise
            gone = self._silent(phase)
            names = f"rank {gone[0]}" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))}"
            patience = f"{PATIENCE[phase] * self.timeout_s:g} s (timeout_s sets it)"
            who = f"{names} ended, or did not answer for {patience}," if gone else "a connection broke"
            raise RunFailed(
                f"{who} in phase {phase!r}. What was saved is intact: look at what came before this message, and run "
                f"the same command to go on ({_cause(error)})"
            ) from error

    def _silent(self, phase: str) -> list[int]:
        """Ranks that do not report, when those that noticed a failure call each other's names."""
        assert self.control is not None
        _GIVEN_UP.append(self.control)
        silent = [0]  # whose store it is, under most launchers, if it does not answer at all
        # In a thread: a store whose process hangs keeps whoever asks it waiting, with no time-out.
        asking = threading.Thread(target=self._ask, args=(phase, silent), daemon=True)
        asking.start()
        asking.join(_LAST_WORDS_S + 1.0)
        silent = list(silent)
        if self.first:
            time.sleep(1.0)  # the store may end with this process, and others are still asking
        return silent

    def _ask(self, phase: str, silent: list[int]) -> None:
        """Call out that a failure was noticed, and hear for a while who else calls; silent: who does not, in place."""
        assert self.store is not None
        with suppress(RuntimeError):
            self.store.set(f"noticed/{self.rank}", phase)
            dist.destroy_process_group(self.control)  # whoever waits for this process in turn notices now
            until = time.monotonic() + _LAST_WORDS_S
            while silent and time.monotonic() < until:
                silent[:] = [rank for rank in range(self.size) if not self.store.check([f"noticed/{rank}"])]
                time.sleep(0.1)


def _cause(error: RuntimeError) -> str:
    """The gist of what gloo or NCCL says: without the place in their sources, and without general advice."""
    return re.sub(r"^\[\S*/\S*\] ", "", str(error).partition("\n")[0]).partition(". This is ")[0]


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether an error comes from a collective: torch has a class of its own only for some."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Connection closed by peer", "NCCL", "Timed out", "timed out")
    )


def launched() -> bool:
    """Whether torch's launcher, or one like it, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the only one, or the one of several that speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: torch.device, timeout_s: float) -> Iterator[World]:
    """The world of this process while the block runs: what a launcher says, or this process alone.

    device: "cpu" or "cuda"; each process takes the GPU of its local rank.
    Alone on a CPU nothing is sharded; everywhere else FSDP holds the weights, over a mesh that may have one process.
    """
    if not launched() and device.type == "cpu":
        yield World(0, 1, device, timeout_s)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=timeout_s)
    if launched():
        # The device binds NCCL's communicator at once: a wrong one fails here and not in the first step.
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=patience, device_id=bound)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=patience)
    log, rank = logging.getLogger("selm_fast"), dist.get_rank()
    level = log.level
    if rank > 0:  # the first has the same to say
        log.setLevel(logging.ERROR)
    try:
        yield World(
            rank,
            dist.get_world_size(),
            device,
            timeout_s,
            init_device_mesh(device.type, (dist.get_world_size(),)),
            dist.new_group(backend="gloo", timeout=max(PATIENCE.values()) * patience),
            dist.distributed_c10d._get_default_store(),
        )
    finally:
        log.setLevel(level)
        dist.destroy_process_group()
