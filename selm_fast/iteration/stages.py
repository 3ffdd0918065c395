"""What each stage does, in whichever process: its part, and what is left once every part is done."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from importlib import import_module
from typing import Any

from selm_fast.config import parse_function
from selm_fast.errors import RunFailed
from selm_fast.iteration.evaluate import evaluate, finish_evaluate
from selm_fast.iteration.job import Job, check_files, write_manifest
from selm_fast.iteration.rank import finish_rank, rank
from selm_fast.iteration.rollout import finish_rollout, rollout
from selm_fast.training.final import keep_masters
from selm_fast.training.progress import Display
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.run_train import Run
from selm_fast.training.world import is_first


def do_part(job: Job) -> None:
    """Do this process's part of a stage, from where an earlier attempt was left."""
    if job.config.prepare is not None and job.stage.name != "prepare":
        check_files(job.paths.stage(0, "prepare"))
    _STAGES[job.stage.name][0](job)


def finish(job: Job, seconds: float) -> None:
    """Close a stage whose parts are all done: check, count, write its manifest.

    seconds: what the parts took, together with those of earlier attempts.
    """
    counts = _STAGES[job.stage.name][1](job)
    write_manifest(job, counts, seconds)
    shutil.rmtree(job.scratch, ignore_errors=True)


def _prepare(job: Job) -> None:
    assert job.config.prepare is not None
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    module, function = parse_function("prepare", job.config.prepare)
    try:
        prepare = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RunFailed(f"{job.config.prepare} cannot be loaded: {error}") from error
    prepare(job.folder, job.config.seed)


def _finish_prepare(job: Job) -> dict[str, Any]:
    missing = [name for name in ("model", "train.jsonl", "eval.jsonl") if not (job.folder / name).exists()]
    if missing:
        raise RunFailed(f"{job.config.prepare} did not write {' and '.join(missing)} into {job.folder}")
    return {}


def _cache(job: Job) -> None:
    _run(job).fill_cache(job.index, job.count, job.ranks)


def _finish_cache(job: Job) -> dict[str, Any]:
    _run(job).join_cache(job.count, job.ranks)
    shutil.rmtree(job.folder / "parts", ignore_errors=True)  # of an attempt by more processes
    shards = list(job.folder.rglob("shard-*.safetensors"))
    return {"shards": len(shards), "bytes": sum(path.stat().st_size for path in shards)}


def _train(job: Job) -> None:
    _run(job).train()


def _finish_train(job: Job) -> dict[str, Any]:
    folder = RunFolder(job.folder)
    keep_masters(folder)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_bytes().splitlines()]
    steps = [line for line in lines if "loss" in line]
    record = folder.record()
    assert record is not None
    return {
        "steps": len(steps),
        "groups": record["num_groups"],
        "bad_steps": steps[-1]["bad_steps"],
        "groups_per_second": statistics.harmonic_mean([line["groups_per_second"] for line in steps]),
        "memory_gib": max(line["memory_gib"] for line in steps),
    }


def _run(job: Job) -> Run:
    check_files(job.paths.stage(job.stage.iteration, "rank"))
    # Of processes that train together one speaks for all.
    display = job.display if is_first() else Display(quiet=True)
    return Run(job.paths.train_config(job.stage.iteration), display, job.stop)


_Part = Callable[[Job], None]
_Finish = Callable[[Job], dict[str, Any]]
_STAGES: dict[str, tuple[_Part, _Finish]] = {
    "prepare": (_prepare, _finish_prepare),
    "rollout": (rollout, finish_rollout),
    "rank": (rank, finish_rank),
    "cache": (_cache, _finish_cache),
    "train": (_train, _finish_train),
    "evaluate": (evaluate, finish_evaluate),
}
