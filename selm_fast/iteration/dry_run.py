"""`--dry-run`: the plan of a run, printed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from selm_fast.config import PAIRRM
from selm_fast.iteration.estimate import (
    BANDWIDTH_SHARE,
    UTILISATION,
    Estimate,
    describe,
    estimate,
    show_duration,
    show_size,
)
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import PARALLEL, num_portions
from selm_fast.iteration.status import Status
from selm_fast.training.progress import Display


def describe_plan(paths: Paths, statuses: Sequence[Status], display: Display) -> None:
    """Print every stage with its state, counts, disk and hours, and the sums. Raises Refused as `estimate` does."""
    config = paths.config
    if config.ranker is None:
        display.say("ranker is not set; a run needs one: --ranker pairrm, or --ranker python:MODULE:FUNCTION")
    found = estimate(paths)
    gpus = _num_gpus(config.device)
    processes = config.processes or gpus
    # Training shares out the weights, which takes a GPU for each process.
    devices = dict.fromkeys(PARALLEL, processes) | {"train": min(processes, gpus)}
    if found.num_prompts:
        display.say(
            f"{found.num_prompts:,} prompts in {num_portions(config)} portions, {found.num_held_out:,} held out; "
            f"mean tokens: prompt {found.lengths.prompt:.0f}, offline response {found.lengths.response:.0f}"
        )
    table = Table(box=SIMPLE)
    for name in ("stage", "state", "what", "disk", "time"):
        table.add_column(name, justify="right" if name in ("disk", "time") else "left")
    for row in describe(found, [(status.stage, status.state) for status in statuses], devices):
        table.add_row(*row)
    display.console.print(table)
    for status in statuses:
        for change in status.changes:
            display.say(f"{status.stage.title} was made with other settings: {change}")
    if found.num_prompts:
        _sums(found, statuses, paths, devices, display)


def _sums(
    found: Estimate, statuses: Sequence[Status], paths: Paths, devices: Mapping[str, int], display: Display
) -> None:
    left, peak, seconds = 0.0, 0.0, 0.0
    for status in statuses:
        cost = found.of(status.stage)
        peak = max(peak, left + (cost.peak or 0.0))
        left += cost.left or 0.0
        if status.state != "done":
            seconds += (cost.seconds or 0.0) / devices.get(status.stage.name, 1)
    if found.model is None:
        display.say(
            f"disk without models: {show_size(left)}. The size of the model is not known before it is there, and so "
            "neither are the disk of its checkpoints nor the hours"
        )
        return
    folder = paths.root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(Path(folder)).free
    display.say(
        f"disk: at most {show_size(peak)} at once, {show_size(left)} when all is done (the final model is a link); "
        f"{show_size(free)} are free{'' if free > peak else ': TOO LITTLE'}"
    )
    assert found.speed is not None
    unknown = {"ranker": found.config.ranker != PAIRRM, "servers": found.config.rollout.engine == "server"}
    left_out = "".join(f", {name} not counted" for name, is_unknown in unknown.items() if is_unknown)
    display.say(
        f"time: {show_duration(seconds)} to go on {max(devices.values())} x {found.speed.name}{left_out}: "
        f"{found.model.weights / 1e9:.3g}B weights at {UTILISATION:.0%} of the {found.speed.flops / 1e12:.3g} "
        f"TFLOP/s and {BANDWIDTH_SHARE:.0%} of the {found.speed.bandwidth / 1e9:.3g} GB/s measured just now"
    )


def _num_gpus(device: str) -> int:
    import torch

    return max(1, torch.cuda.device_count()) if device != "cpu" else 1
