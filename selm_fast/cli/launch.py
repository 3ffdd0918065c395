"""`--nproc`: the same command in several processes of this machine, under torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from selm_fast.config import Config
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration.exit_codes import ending

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(config: Config, nproc: int, arguments: Sequence[str]) -> int:
    """Run `selm-fast train` with these arguments in `nproc` processes; -> exit code of all, when the last has ended.

    config: what the arguments come to.
    Raises Refused for more processes than GPUs; RunFailed where a process failed.
    """
    if "RANK" in os.environ:
        raise Refused("--nproc is given and this is one of a launcher's processes already: drop one of the two")
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cuda" and gpus == 0:
        raise Refused("device is cuda and this machine has no usable NVIDIA GPU: set device to cpu")
    if 0 < gpus < nproc:
        raise Refused(f"--nproc is {nproc} and this machine has {gpus} GPUs: give at most {gpus}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Its own: what SIGTERM means here is not what it means to the launcher, which kills after 30 s.
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", signals_to_handle="SIGHUP",
    )  # fmt: skip
    if gpus == 0:  # the launcher's own choice is one thread each
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    previous = {number: signal.signal(number, _pass_on) for number in _SIGNALS}
    try:
        elastic_launch(settings, sys.executable)("-m", "selm_fast", "train", *arguments)
        return 0
    except ChildFailedError as error:
        return _meaning(error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(_number: int, _frame: FrameType | None) -> None:
    """Tell every process to save and stop; each is a session of its own, which Ctrl-C does not reach."""
    for pid in _children():
        with suppress(ProcessLookupError):  # ended in the meantime
            os.kill(pid, signal.SIGTERM)


def _children() -> list[int]:
    """Processes that this one started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in brackets, may hold anything; the parent is the second field after it.
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def _meaning(error: ChildFailedError) -> int:
    """The exit code of the first process that failed: 2 and 75, whose reason it told, are those of all.

    Raises RunFailed for any other.
    """
    # Once one has ended, the launcher ends the others with SIGTERM.
    by_time = sorted(error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
    rank, failure = by_time[0]
    code = failure.exitcode
    if code in (Refused.exit_code, Stopped.exit_code):
        return code
    raise RunFailed(
        f"rank {rank} {ending(code)}; the others were ended. Run the same command to go on from the last checkpoint"
    ) from error
