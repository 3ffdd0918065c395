"""A contestant that leaves the exploration term out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.train import ladder
from benchmarks.train.contestant import Gate, Job


def run(job: Job, gate: Gate, *, rungs: Sequence[str]) -> None:
    """As `ladder.run`, but for alpha."""
    workload = replace(job.workload, settings=replace(job.workload.settings, alpha=0.0))
    ladder.run(replace(job, workload=workload), gate, rungs=())
