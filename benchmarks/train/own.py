"""selm_fast as its users run it: `train`, with its files, metrics and model folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.train.contestant import Gate, Job
from benchmarks.train.workload import Row
from selm_fast.config import Config
from selm_fast.training.progress import Display, Phase
from selm_fast.training.run_train import Run
from selm_fast.training.signals import StopFlag


def run(job: Job, gate: Gate, *, method: str, compiled: bool = False) -> None:
    """Train with this package's defaults. compiled: `model.compile`."""
    rows = [as_row(row, method) for row in job.rows]
    with StopFlag() as stop:
        Run(settings_of(job, method, compiled), Watching(gate), stop, lambda line: report(gate, line)).train(rows)


def settings_of(job: Job, method: str, compiled: bool) -> Config:
    """The settings that all contestants share, as this package names them."""
    workload, settings = job.workload, job.workload.settings
    return Config.model_validate(
        {
            "method": method,
            "beta": settings.beta,
            "seed": settings.seed,
            "output_dir": job.scratch / "run",
            "device": workload.device,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[workload.dtype],
            "model": {
                "path": str(workload.model),
                "tokenizer": str(workload.tokenizer),
                "reference": None if job.reference is None else str(job.reference),
                "compile": compiled,
            },
            "data": {"max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length},
            "batch": {"groups": settings.groups, "max_tokens": settings.max_tokens, "shuffle": False},
            "optim": {
                "lr": settings.lr,
                "schedule": "constant",
                "warmup": 0.0,
                "max_grad_norm": settings.max_grad_norm,
            },
            "cache": {"dir": job.scratch / "cache"},
            "checkpoint": {"every": 10**9},
        }
        | ({"alpha": settings.alpha} if method == "selm" else {})
    )


def as_row(row: Row, method: str) -> dict[str, list[int]]:
    """A row of token ids as `train` takes it."""
    found = {"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
    return found | {"reference_response_ids": row.explored} if method == "selm" else found


def report(gate: Gate, line: dict[str, Any]) -> None:
    """Tell the gate of a step."""
    gate.step(line["loss"], line["grad_norm"])


class Watching(Display):
    """A silent display that sees the phases begin."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(quiet=True)
        self.gate = gate

    @contextmanager
    def phase(self, name: str, total: int, unit: str, *, done: int = 0, lines: bool = True) -> Iterator[Phase]:
        """Times the reference pass, and tells the gate of the first step."""
        if name == "training":
            self.gate.ready()
        with (
            self.gate.reference_pass() if name == "reference pass" else nullcontext(),
            super().phase(name, total, unit, done=done, lines=lines) as phase,
        ):
            yield phase
