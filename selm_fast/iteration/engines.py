"""Which engine answers: the one place that knows them by name."""

from __future__ import annotations

from selm_fast.data.tokenizer import Tokenizer
from selm_fast.iteration.generate import LocalEngine
from selm_fast.iteration.job import Job
from selm_fast.iteration.server_engine import ServerEngine
from selm_fast.iteration.shards import Engine


def open_engine(job: Job, tokenizer: Tokenizer, model: str) -> Engine:
    """The engine of `rollout.engine` for one model, a folder or hub name, to be used in a `with` block."""
    return (LocalEngine if job.config.rollout.engine == "transformers" else ServerEngine)(job, tokenizer, model)
