"""What a call allocates on the CPU, at every level below it: the allocator's own account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocated:
    """Sizes of all allocations and the most that was held at a time, both in bytes."""

    sizes: list[int]
    peak: int


def allocated(function: Callable[[], Any]) -> Allocated:
    """Call `function` and say what it allocated; what it returns is held to the end.

    It is called once before: what is made once (the scratch room of a library's matmul) is not its own.
    """
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = function()
    del result
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return Allocated([change for change in changes if change > 0], peak)
