"""`train`: from settings and rows to a trained model, in one process or in all that a launcher started."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from selm_fast.config import Config
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.training import export, reference_cache, room
from selm_fast.training.advice import explaining
from selm_fast.training.cache_identity import cache_identity, versions
from selm_fast.training.cache_parts import drop_parts, join_parts, only_part, part_folder, part_of
from selm_fast.training.final import load_masters
from selm_fast.training.host_memory import reused_memory
from selm_fast.training.inputs import Inputs, Plans, read_inputs
from selm_fast.training.loop import Trainer
from selm_fast.training.machine import check_room, choose_device, matmul_flops, memory_bytes
from selm_fast.training.metrics import peak_memory_gib, summary_writer
from selm_fast.training.optimizer import AdamW
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache, ReferenceLogps
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.signals import StopFlag
from selm_fast.training.utilisation import Utilisation
from selm_fast.training.weights import Loaded, load
from selm_fast.training.world import World, is_first, join

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    output_dir: the run's folder.  model_dir: the trained model, a Hugging Face folder.
    steps: optimiser steps.  evaluations: metrics on the held-out rows, by step, `eval_<name>`.
    """

    output_dir: Path
    model_dir: Path
    steps: int
    evaluations: dict[int, dict[str, float]]


def train(
    config: Config,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train one iteration on ranked rows; the same settings and rows again go on where an earlier call was stopped.

    rows: preference rows in any format that `data.train` may have, instead of it.
    on_log: called with the metrics of each step and evaluation, by name, and its `step`.
    Raises Refused before any work for bad settings, data or machine; RunFailed when it cannot go on; Stopped after
    SIGTERM or Ctrl-C, with everything saved.
    """
    with StopFlag() as stop:
        return Run(config, Display(quiet=not is_first()), stop, on_log or (lambda _: None)).train(rows)


@dataclass(slots=True)
class Run:
    """One training run under way, for callers that have a display and a stop flag; `train` is for all others."""

    config: Config
    display: Display
    stop: StopFlag
    on_log: Callable[[dict[str, Any]], None] = lambda _: None
    reference_seconds: float = 0.0  # of the pass over the training rows

    def fill_cache(self, index: int = 0, count: int = 1, ranks: int = 1) -> None:
        """Compute the reference log-probs that `train` will need, or one process's part of them, and nothing else.

        index, count: which of how many parts; `join_cache` puts them together.
        ranks: processes that will train; their packs are not those of one.
        Raises Refused and Stopped as `train` does.
        """
        config = self.config
        device, dtype = choose_device(config)
        with reused_memory(device), join(device, config.timeout_s) as world:
            inputs = read_inputs(config)
            loaded = load(config, config.model.reference or config.model.path, world, dtype)
            cache = self._cache(loaded, inputs)
            part = cache
            if count > 1:
                part = ReferenceCache(part_folder(config.cache.dir, index), cache.identity)
                only_part(part)
            for plan in inputs.plans(config, ranks).of_reference():
                if cache.find(plan) is not None:
                    continue
                mine = part_of(plan, index, count)
                num_groups = sum(mine.num_groups(step) for step in range(len(mine.steps)))
                with self.display.phase("reference pass", num_groups, "groups") as phase:
                    part.fill(mine, loaded.policy, world=world, stop=self.stop, on_batch=phase.advance)

    def join_cache(self, count: int, ranks: int = 1) -> None:
        """Put the parts of `fill_cache` together."""
        if count == 1:
            drop_parts(self.config.cache.dir)
        else:
            join_parts(self.config.cache.dir, read_inputs(self.config).plans(self.config, ranks).of_reference(), count)

    def train(self, rows: Iterable[Mapping[str, Any]] | None = None) -> TrainResult:
        """As the function `train`."""
        config = self.config
        if config.output_dir is None:
            raise Refused("output_dir is not set: give the folder of this run, --output_dir runs/first")
        if config.data.train is None and rows is None:
            raise Refused("data.train is not set: give the rows to train on, --data.train rows.jsonl")
        if config.model.path is None and config.model.init is None:
            raise Refused(
                "model.path is not set: give the model to train, or model.init, a config.json to make one from"
            )
        folder = RunFolder(config.output_dir.expanduser())
        record = folder.check(config)
        device, dtype = choose_device(config)
        with reused_memory(device), join(device, config.timeout_s) as world:
            world.meet("start")  # nobody writes before all have looked at the folder
            return self._train(rows, folder, record, world, dtype)

    def _train(
        self,
        rows: Iterable[Mapping[str, Any]] | None,
        folder: RunFolder,
        record: dict[str, Any] | None,
        world: World,
        dtype: torch.dtype,
    ) -> TrainResult:
        config = self.config
        if config.log.tensorboard:
            summary_writer()
        inputs = read_inputs(config, rows)
        inputs.tell(self.display)
        plans, sizes = inputs.plans(config, world.size), inputs.sizes
        facts = inputs.facts()
        if record is not None:
            _check_facts(record, facts, folder.path)
            if record["done"]:
                self.display.say(f"{folder.path} holds this run, finished; nothing to do")
                return _result(folder)
            if record["versions"] != (now := versions()):
                log.warning("this run began with %s; with %s it may not go on to the bit", record["versions"], now)
        memory = memory_plan(config, inputs, world)
        check_room(folder.path, sizes.weights, world.device, dtype, memory if world.mesh is not None else None)
        world.meet("rows")

        references = None
        if config.model.reference is not None:
            # One model at a time: the reference is gone before the policy is loaded.
            loaded = self._load(config.model.reference, world, dtype, memory)
            facts["reference"] = loaded.digest
            references = self._references(loaded, inputs, world, plans, memory)
            del loaded
            gc.collect()  # FSDP's hooks and their modules hold each other
        loaded = self._load(config.model.path, world, dtype, memory)
        facts["weights"] = loaded.digest
        if record is not None:
            _check_facts(record, facts, folder.path)
        references = references or self._references(loaded, inputs, world, plans, memory)
        loaded.masters.publish()
        if record is None:  # written once nothing can be refused any more: a refusal leaves the folder free
            record = {
                "config": config.to_json(),
                **facts,
                "dtype": str(dtype).removeprefix("torch."),
                "exploration_weight": config.exploration_weight,
                "num_groups": len(inputs.data.groups),
                "versions": versions(),
                "done": False,
            }
            if world.first:
                folder.begin(record)
        if world.first:
            export.save_assets(folder.assets, loaded.policy.model, inputs.tokenizer.hf)
        with _explained("optimiser", memory, world):
            optimizer = AdamW(loaded.masters.masters, config)
        trainer = Trainer(
            config, world, folder, loaded.policy, loaded.masters, optimizer, plans.epochs,
            references[0], plans.held_out, references[1] if plans.held_out is not None else None,
            Utilisation(sizes.shape, world.size, matmul_flops(world.device, dtype)),
            self.display, self.stop, self.on_log,
        )  # fmt: skip
        trainer.resume()
        first_step = trainer.position.step
        with _explained("step", memory, world):
            trainer.run()
        if world.first:
            # From the disk: where the weights are sharded, no process holds them all.
            weights, step = load_masters(folder, export.DTYPES[record["dtype"]])
            if step != trainer.total_steps:
                raise RunFailed(
                    f"the last checkpoint of {folder.path} was damaged: run again, to repeat its last steps"
                )
            shutil.rmtree(folder.model, ignore_errors=True)
            export.write_model(folder.model, folder.assets, weights, record["dtype"], record | {"step": step})
            folder.begin(record | {"done": True})
        world.meet("export")
        first = plans.epochs[0]
        groups = sum(first.num_groups(step % len(first.steps)) for step in range(first_step, trainer.total_steps))
        seconds = trainer.training_seconds
        self.display.say(
            f"trained on {groups} groups in {seconds:.1f} s: {groups / max(seconds, 1e-9):.2f} groups/s, "
            f"{groups / max(seconds + self.reference_seconds, 1e-9):.2f} with the reference pass counted in; "
            f"peak memory {peak_memory_gib(world.device):.2f} GiB; the model is in {folder.model}"
        )
        return _result(folder)

    def _load(self, path: str | None, world: World, dtype: torch.dtype, memory: room.Plan | None) -> Loaded:
        with _explained("model", memory, world), world.watched("model"):
            return load(self.config, path, world, dtype)

    def _cache(self, loaded: Loaded, inputs: Inputs) -> ReferenceCache:
        identity = cache_identity(self.config, loaded.policy, loaded.digest, inputs.tokenizer, loaded.masters.compute)
        return ReferenceCache(self.config.cache.dir, identity)

    def _references(
        self, loaded: Loaded, inputs: Inputs, world: World, plans: Plans, memory: room.Plan | None
    ) -> list[ReferenceLogps]:
        cache = self._cache(loaded, inputs)
        if self.config.cache.require:
            reference_cache.require(cache, plans.of_reference())
        found = []
        for plan in plans.of_reference():
            values = cache.find(plan)
            if not world.any(values is None, "reference pass"):
                assert values is not None
                self.display.say(f"reference log-probs of {len(plan.groups)} groups: from the cache, no forward pass")
            else:
                began = time.perf_counter()
                with (
                    self.display.phase("reference pass", len(plan.groups), "groups") as phase,
                    _explained("reference pass", memory, world),
                ):
                    values = cache.fill(plan, loaded.policy, world=world, stop=self.stop, on_batch=phase.advance)
                seconds = time.perf_counter() - began
                self.reference_seconds += seconds if plan is plans.epochs[0] else 0.0
                self.display.say(f"reference log-probs of {len(plan.groups)} groups: computed in {seconds:.1f} s")
            found.append(values)
            if world.any(self.stop.requested, "reference pass"):
                raise Stopped("stopped after the reference pass, which is saved; run the same command to go on")
        return found


def memory_plan(config: Config, inputs: Inputs, world: World) -> room.Plan | None:
    """The run as the memory model sees it; None for a model whose sizes its configuration does not tell."""
    if inputs.sizes.shape is None:
        return None
    ranks = world.size if world.mesh is not None else None
    device: Literal["cuda", "cpu"] = "cuda" if world.device.type == "cuda" else "cpu"
    return room.Plan(config, inputs.sizes.shape, room.mean_group(inputs.data.groups), ranks, device)


def _explained(phase: str, memory: room.Plan | None, world: World) -> AbstractContextManager[None]:
    """What runs out of memory, or loses another process, while the block runs says which setting to change."""
    if memory is None:
        return nullcontext()
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 1
    return explaining(phase, memory, memory=memory_bytes(world.device), gpus=gpus)


def _check_facts(record: dict[str, Any], facts: dict[str, Any], path: Path) -> None:
    names = {
        "data": "training rows",
        "eval_data": "held-out rows",
        "tokenizer": "tokenizer",
        "weights": "initial weights",
        "reference": "weights of the reference model",
    }
    changed = [names[key] for key, value in facts.items() if record.get(key) != value]
    if changed:
        raise Refused(
            f"output_dir {path} holds a run of the same settings on other {' and '.join(changed)}: "
            "put them back to go on, or choose another output_dir"
        )


def _result(folder: RunFolder) -> TrainResult:
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_bytes().splitlines()]
    evaluations = {line["step"]: line for line in lines if "eval_loss" in line}
    steps = max((line["step"] for line in lines), default=0)
    return TrainResult(folder.path, folder.model, steps, evaluations)
