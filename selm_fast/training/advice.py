"""What to change when memory has run out or processes have lost each other, in the place of torch's own words.

The trainer wraps each phase of a run:

    with explaining("step", plan, memory=memory_bytes(device), gpus=torch.cuda.device_count()):
        ...

plan is the run's `selm_fast.training.room.Plan`, the one that `check_room` was given; phases are those of
`selm_fast.training.world.PATIENCE`, "evaluation" and "optimiser". What is not understood, and what says already what to
do (this package's own errors), passes through as it is. Where `World.watched` is around a collective too, it belongs
inside: it knows who is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from selm_fast.errors import RunFailed
from selm_fast.training.room import USABLE, Change, Plan, advise
from selm_fast.training.world import is_of_a_collective

# Which phase of selm_fast.memory a phase of a run is; where there is none, the peak counts.
MEMORY_PHASE: Final = {"model": "load", "reference pass": "reference pass", "evaluation": "reference pass"}
# By how much less than is estimated now a plan must take that has met its end once: the estimate was too low.
LESS: Final = 0.9
INTACT: Final = "What was saved is intact; run the same command to go on"
FRAGMENTS: Final = re.compile(r"([\d.]+) GiB is reserved by PyTorch but unallocated")
# What an error of NCCL or gloo says, and what to do about it.
REMEDIES: Final = (
    (
        r"shared memory|/dev/shm|No space left on device",
        "/dev/shm is too small for NCCL: give the container more, as docker's --shm-size 1g or --ipc host does",
    ),
    (r"Duplicate GPU", "two processes have the same GPU: start no more than there are, --nproc {gpus}"),
    (
        r"[Tt]imed? ?out|Watchdog",
        "another process was late, or gone: what it said last tells why; where steps do take so long, raise timeout_s",
    ),
    (
        r"[Cc]onnect|[Ss]ocket|remote process exited|Broken pipe",
        "another process is gone: what it said last, or the kernel's log, tells why",
    ),
)


@contextmanager
def explaining(phase: str, plan: Plan, *, memory: float, gpus: int = 1) -> Iterator[None]:
    """While the block runs, turn errors of memory and of collectives into RunFailed that says what to change.

    phase: what is being done.  memory: bytes of the device.  gpus: that this machine has.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failed = explained(error, phase, plan, memory=memory, gpus=gpus)
        if failed is None:
            raise
        raise failed from error


def explained(error: BaseException, phase: str, plan: Plan, *, memory: float, gpus: int = 1) -> RunFailed | None:
    """What an error comes to, in words; None where it is none of these. Arguments as those of `explaining`."""
    if isinstance(error, RunFailed):
        return None
    text = str(error)
    if _is_of_the_device(error, text):
        return RunFailed(_device_is_full(text, phase, plan, memory, gpus))
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return RunFailed(_host_is_full(text, phase, plan, memory))
    if isinstance(error, RuntimeError) and is_of_a_collective(error):
        return RunFailed(_collective_failed(text, phase, gpus))
    return None


def _is_of_the_device(error: BaseException, text: str) -> bool:
    """Whether the device's memory has run out: the libraries that torch calls have words of their own for it."""
    words = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "'out of memory'")
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words)


def _device_is_full(text: str, phase: str, plan: Plan, memory: float, gpus: int) -> str:
    fragments = FRAGMENTS.search(text)
    lost = ""
    if fragments and float(fragments[1]) >= 1:
        lost = (
            f"{fragments[1]} GiB of it are lost between tensors, which "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment may cure. "
        )
    return (
        f"the GPU's memory ({memory / 2**30:.1f} GiB) ran out in phase {phase!r}. {lost}"
        f"{_remedy(phase, plan, memory, gpus)}. {INTACT}\n({_first_line(text)})"
    )


def _host_is_full(text: str, phase: str, plan: Plan, memory: float) -> str:
    if plan.device == "cpu":
        remedy = _remedy(phase, plan, memory, 1)
    else:
        host = plan.model.host()
        needed = host["load" if phase == "model" else "checkpoint"] / 2**30
        remedy = (
            f"Beside Python, all processes together take about {needed:.1f} GiB of it in this phase: give the machine "
            "or container more memory, or end what else runs there"
        )
    return f"the host's memory ran out in phase {phase!r}. {remedy}. {INTACT}\n({_first_line(text) or 'MemoryError'})"


def _remedy(phase: str, plan: Plan, memory: float, gpus: int) -> str:
    """Settings to change, from what to what."""
    which = MEMORY_PHASE.get(phase)
    now = plan.total if which is None else plan.phases[which].total
    target = min(memory, LESS * now / USABLE)
    changes, fits = advise(plan, target, most_ranks=max(gpus, plan.ranks or 1), phase=which)
    if not changes:
        return "No setting makes it take less: train a smaller model, or on more or larger devices (--nproc)"
    words = "; ".join(_from_to(change, plan) for change in changes)
    enough = "" if fits else ", which may not be enough: a smaller model, or more or larger devices, will be"
    return f"Estimated were {now / 2**30:.1f} GiB. Change {words}{enough}"


def _from_to(change: Change, plan: Plan) -> str:
    section, _, leaf = change.name.rpartition(".")
    if change.name == "nproc":
        was: object = plan.ranks or 1
    else:
        was = getattr(getattr(plan.config, section) if section else plan.config, leaf)
    return f"--{change.name} from {was} to {change.value} ({change.total / 2**30:.1f} GiB)"


def _collective_failed(text: str, phase: str, gpus: int) -> str:
    remedy = next(
        (words.format(gpus=gpus) for pattern, words in REMEDIES if re.search(pattern, text)),
        "NCCL or the driver may not suit this machine",
    )
    return (
        f"the processes lost each other in phase {phase!r}: {remedy}. NCCL_DEBUG=INFO in the environment shows what "
        f"NCCL meets, and selm-fast doctor tries it on every GPU. {INTACT}\n({_first_line(text)})"
    )


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")
