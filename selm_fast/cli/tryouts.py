"""What `selm-fast doctor` tries out: collectives, each in a process of its own, and attention's back ends.

A collective that a machine cannot do hangs or ends its process more often than it raises: both are findings here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from selm_fast.cli.finding import Finding, State, one_line

if TYPE_CHECKING:
    from selm_fast.ops.attention_layout import Case

TIMEOUT_S = 90.0  # of one try; torch and a driver that sleeps take up to half a minute to begin
# A world of one needs no network, and goes through the library, the driver and a kernel all the same.
LOOP_BACK = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
backend, name = sys.argv[1:]
device = torch.device(name)
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
ones = torch.ones(1024, device=device)
dist.all_reduce(ones)
print("sum", int(ones.sum()), flush=True)
dist.destroy_process_group()
"""


def collectives(num_gpus: int) -> Iterator[Finding]:
    """NCCL's version, and a sum by gloo on the CPU and by NCCL on every GPU."""
    import torch

    if num_gpus:
        try:
            yield Finding("collectives", "nccl", ".".join(map(str, torch.cuda.nccl.version())))
        except Exception as error:  # a build without it says so in several ways
            remark = f"{one_line(error)}; a GPU trains with FSDP, which needs it"
            yield Finding("collectives", "nccl", "not in this torch", "problem", remark)
            return
    tries = [("gloo", "cpu"), *(("nccl", f"cuda:{index}") for index in range(num_gpus))]
    with ThreadPoolExecutor(len(tries)) as pool:
        failures = list(pool.map(lambda one: loop_back(*one), tries))
    for (backend, device), failure in zip(tries, failures, strict=True):
        name = f"{backend} {device}"
        if failure is None:
            yield Finding("collectives", name, "works")
        elif num_gpus:
            yield Finding("collectives", name, "fails", "problem", failure)
        else:
            yield Finding("collectives", name, "fails", "note", f"{failure}; one process trains without it")


def loop_back(backend: str, device: str) -> str | None:
    """Why a process cannot add up a tensor with itself alone, or None."""
    command = [sys.executable, "-c", LOOP_BACK, backend, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"hung for {TIMEOUT_S:.0f} s; NCCL_DEBUG=INFO in the environment shows where"
    except OSError as error:
        return one_line(error)
    if done.returncode == 0 and "sum 1024" in done.stdout.splitlines():
        return None
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return next((line for line in reversed(said) if "Error" in line), said[-1])


def attention(device: str) -> Iterator[Finding]:
    """Each back end of attention at the heads of an 8B model: whether it passes its self-test, or why it cannot."""
    import torch

    from selm_fast.ops.attention_choice import BACKENDS
    from selm_fast.ops.attention_layout import Case

    place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    dtypes = {"bf16": torch.bfloat16} if device == "cuda" else {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name in BACKENDS:
        outcomes = {
            label: _self_test(
                name, Case(place, dtype, heads=32, key_heads=8, head_size=128, window=False, softcap=False)
            )
            for label, dtype in dtypes.items()
        }
        if len(set(outcomes.values())) == 1:
            outcomes = {", ".join(outcomes): next(iter(outcomes.values()))}
        for label, (found, state, remark) in outcomes.items():
            yield Finding("attention", f"{name}, {label}", found, state, remark)


def _self_test(name: str, case: Case) -> tuple[str, State, str]:
    """What was found of a back end, the state that it is in, and why."""
    from selm_fast.ops.attention_choice import BACKENDS, failure

    if name == "torch":
        return "serves", "ok", "the others are compared with it"
    try:
        reason = BACKENDS[name].refusal(case)
        error = failure(name, case) if reason is None else None
    except Exception as raised:
        return "fails its self-test", "note", f"{one_line(raised)}; it is not used"
    if reason is not None:
        return "cannot serve", "ok", reason
    if error is not None:
        return "fails its self-test", "note", f"{error}; it is not used"
    return "passes its self-test", "ok", ""
