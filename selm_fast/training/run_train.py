"""`train`: from settings and rows to a trained model, in one process."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from selm_fast.config import Config
from selm_fast.data.dataset import Dataset, load_groups
from selm_fast.data.packing import Plan, plan_epoch
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import Refused, Stopped
from selm_fast.model import Policy, support
from selm_fast.training import export, reference_cache
from selm_fast.training.cache_identity import cache_identity, versions
from selm_fast.training.cache_parts import drop_parts, join_parts, only_part, part_folder, part_of
from selm_fast.training.final import is_run, load_masters
from selm_fast.training.host_memory import reused_memory
from selm_fast.training.loop import Trainer
from selm_fast.training.machine import check_room, choose_device
from selm_fast.training.masters import Masters, weights_digest
from selm_fast.training.metrics import peak_memory_gib, summary_writer
from selm_fast.training.optimizer import make_optimizer
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache, ReferenceLogps
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.signals import StopFlag

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
        return Run(config, Display(), stop, on_log or (lambda _: None)).train(rows)


@dataclass(slots=True)
class Run:
    """One training run under way, for callers that have a display and a stop flag; `train` is for all others."""

    config: Config
    display: Display
    stop: StopFlag
    on_log: Callable[[dict[str, Any]], None] = lambda _: None
    reference_seconds: float = 0.0  # of the pass over the training rows

    def fill_cache(self, index: int = 0, count: int = 1) -> None:
        """Compute the reference log-probs that `train` will need, or one process's part of them, and nothing else.

        index, count: which of how many parts; `join_cache` puts them together.
        Raises Refused and Stopped as `train` does.
        """
        device, dtype = choose_device(self.config)
        with reused_memory(device):
            self._fill_cache(device, dtype, index, count)

    def _fill_cache(self, device: torch.device, dtype: torch.dtype, index: int, count: int) -> None:
        tokenizer, data, held_out = self._inputs(_measure(self.config)[0], None)
        policy = self._load(self.config.model.reference or self.config.model.path, device)
        self._prepare(policy, dtype)
        cache = self._cache(policy, tokenizer, dtype)
        part = cache
        if count > 1:
            part = ReferenceCache(part_folder(self.config.cache.dir, index), cache.identity)
            only_part(part)
        for plan in self._reference_plans(data, held_out):
            if cache.find(plan) is not None:
                continue
            mine = part_of(plan, index, count) if count > 1 else plan
            num_groups = sum(mine.num_groups(step) for step in range(len(mine.steps)))
            with self.display.phase("reference pass", num_groups, "groups") as phase:
                part.fill(mine, policy, stop=self.stop, on_batch=phase.advance)

    def join_cache(self, count: int) -> None:
        """Put the parts of `fill_cache` together."""
        if count == 1:
            drop_parts(self.config.cache.dir)
        else:
            _, data, held_out = self._inputs(_measure(self.config)[0], None)
            join_parts(self.config.cache.dir, self._reference_plans(data, held_out), count)

    def _reference_plans(self, data: Dataset, held_out: Dataset | None) -> list[Plan]:
        plans, eval_plan = self._plans(data, held_out)
        return [plans[0], *([eval_plan] if eval_plan else [])]

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
        with reused_memory(device):
            return self._train(rows, folder, record, device, dtype)

    def _train(
        self,
        rows: Iterable[Mapping[str, Any]] | None,
        folder: RunFolder,
        record: dict[str, Any] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> TrainResult:
        config = self.config
        if config.log.tensorboard:
            summary_writer()
        vocab_size, num_weights = _measure(config)  # a missing model is told of before its tokenizer
        tokenizer, data, held_out = self._inputs(vocab_size, rows)
        self._tell(data, held_out)
        plans, eval_plan = self._plans(data, held_out)
        facts = {"data": data.digest, "eval_data": held_out and held_out.digest, "tokenizer": tokenizer.digest()}
        if record is not None:
            _check_facts(record, facts, folder.path)
            if record["done"]:
                self.display.say(f"{folder.path} holds this run, finished; nothing to do")
                return _result(folder)
            if record["versions"] != (now := versions()):
                log.warning("this run began with %s; with %s it may not go on to the bit", record["versions"], now)
        check_room(folder.path, num_weights, device, dtype)

        references = None
        if config.model.reference is not None:
            # One model at a time: the reference is gone before the policy is loaded.
            reference_policy = self._load(config.model.reference, device)
            self._prepare(reference_policy, dtype)
            facts["reference"] = weights_digest(reference_policy.model)
            references = self._references(reference_policy, tokenizer, dtype, plans[0], eval_plan)
            del reference_policy
        policy = self._load(config.model.path, device)
        masters = self._prepare(policy, dtype)
        facts["weights"] = weights_digest(policy.model)
        if record is not None:
            _check_facts(record, facts, folder.path)
        references = references or self._references(policy, tokenizer, dtype, plans[0], eval_plan)
        if record is None:  # written once nothing can be refused any more: a refusal leaves the folder free
            record = {
                "config": config.to_json(),
                **facts,
                "dtype": str(dtype).removeprefix("torch."),
                "exploration_weight": config.exploration_weight,
                "num_groups": len(data.groups),
                "versions": versions(),
                "done": False,
            }
            folder.begin(record)
        export.save_assets(folder.assets, policy.model, tokenizer.hf)
        trainer = Trainer(
            config, folder, policy, masters, make_optimizer(masters, config), plans, references[0],
            eval_plan, references[1] if eval_plan else None, self.display, self.stop, self.on_log,
        )  # fmt: skip
        trainer.resume()
        first_step = trainer.position.step
        trainer.run()
        weights = {name: master.detach() for name, master in masters.masters.items()}
        shutil.rmtree(folder.model, ignore_errors=True)
        export.write_model(
            folder.model, folder.assets, weights, record["dtype"], record | {"step": trainer.total_steps}
        )
        folder.begin(record | {"done": True})
        groups = sum(plans[0].num_groups(step % len(plans[0].steps)) for step in range(first_step, trainer.total_steps))
        seconds = trainer.training_seconds
        self.display.say(
            f"trained on {groups} groups in {seconds:.1f} s: {groups / max(seconds, 1e-9):.2f} groups/s, "
            f"{groups / max(seconds + self.reference_seconds, 1e-9):.2f} with the reference pass counted in; "
            f"peak memory {peak_memory_gib(device):.2f} GiB; the model is in {folder.model}"
        )
        return _result(folder)

    def _load(self, path: str | None, device: torch.device) -> Policy:
        """The model at `path`, or the random one of model.init; weights in fp32."""
        config = self.config
        if path is None:
            assert config.model.init is not None
            return Policy.from_config(config.model.init, seed=config.seed, device=device, head_mode=config.head_mode)
        if is_run(path):
            folder = RunFolder(Path(path).expanduser())
            masters, _ = load_masters(folder)
            return Policy.from_tensors(
                folder.assets, masters, device=device, head_mode=config.head_mode,
                trust_remote_code=config.model.trust_remote_code,
            )  # fmt: skip
        return Policy.from_pretrained(
            path, device=device, head_mode=config.head_mode, trust_remote_code=config.model.trust_remote_code
        )

    def _prepare(self, policy: Policy, dtype: torch.dtype) -> Masters:
        """Cast to the compute dtype, spread the masters, and set checkpointing and compilation."""
        # The masters of a run are spread already; the few that came to lie on the grid since then stay where they are.
        dither = self.config.grid_dither if self.config.grid_dither is not None else dtype == torch.bfloat16
        dither = dither and not (self.config.model.path is not None and is_run(self.config.model.path))
        masters = Masters(policy.model, dtype, dither_seed=self.config.seed if dither else None)
        if self.config.model.activation_checkpointing == "full":
            policy.checkpoint_activations()
        if self.config.model.compile:
            policy.compile_layers()
        return masters

    def _inputs(
        self, vocab_size: int, rows: Iterable[Mapping[str, Any]] | None
    ) -> tuple[Tokenizer, Dataset, Dataset | None]:
        """Tokenizer, training rows and held-out rows."""
        config = self.config
        tokenizer = load_tokenizer(str(config.tokenizer_source))
        wants_explored = config.exploration_weight != 0
        data = load_groups(
            None if rows is not None else config.data.train, config.data, tokenizer, rows=rows, vocab_size=vocab_size,
            wants_explored=wants_explored,
        )  # fmt: skip
        held_out = None
        if config.data.eval is not None:
            held_out = load_groups(
                config.data.eval, config.data, tokenizer, vocab_size=vocab_size, wants_explored=wants_explored
            )
        return tokenizer, data, held_out

    def _tell(self, data: Dataset, held_out: Dataset | None) -> None:
        """Say what the rows are and what was left out of them."""
        for dataset in filter(None, (data, held_out)):
            report = dataset.report
            used = f"{report.rows_used} of {report.rows_read} rows used"
            self.display.say(f"{report.source}: {used}, {report.packed_tokens} packed tokens")
            for reason, count in report.skipped.items():
                self.display.say(f"  skipped: {count} {reason}")
            for note, count in report.notes.items():
                if count:
                    self.display.say(f"  note: {count} {note}")
            for warning in report.warnings:
                self.display.say(f"  warning: {warning}")

    def _plans(self, data: Dataset, held_out: Dataset | None) -> tuple[list[Plan], Plan | None]:
        batch = self.config.batch
        try:
            plans = [
                plan_epoch(
                    data.groups,
                    groups_per_step=batch.groups,
                    max_tokens=batch.max_tokens,
                    seed=self.config.seed,
                    epoch=epoch,
                    shuffle=batch.shuffle,
                )
                for epoch in range(self.config.epochs)
            ]
            eval_plan = (
                None
                if held_out is None
                else plan_epoch(
                    held_out.groups,
                    groups_per_step=batch.groups,
                    max_tokens=batch.max_tokens,
                    seed=self.config.seed,
                    shuffle=False,
                )
            )
        except ValueError as error:
            raise Refused(f"batch.max_tokens is too small: {error}") from error
        return plans, eval_plan

    def _cache(self, policy: Policy, tokenizer: Tokenizer, dtype: torch.dtype) -> ReferenceCache:
        return ReferenceCache(self.config.cache.dir, cache_identity(self.config, policy, tokenizer, dtype))

    def _references(
        self, policy: Policy, tokenizer: Tokenizer, dtype: torch.dtype, plan: Plan, eval_plan: Plan | None
    ) -> list[ReferenceLogps]:
        cache = self._cache(policy, tokenizer, dtype)
        plans = [plan, *([eval_plan] if eval_plan else [])]
        if self.config.cache.require:
            reference_cache.require(cache, plans)
        found = []
        for one in plans:
            values = cache.find(one)
            if values is not None:
                self.display.say(f"reference log-probs of {len(one.groups)} groups: from the cache, no forward pass")
            else:
                began = time.perf_counter()
                with self.display.phase("reference pass", len(one.groups), "groups") as phase:
                    values = cache.fill(one, policy, stop=self.stop, on_batch=phase.advance)
                seconds = time.perf_counter() - began
                self.reference_seconds += seconds if one is plan else 0.0
                self.display.say(f"reference log-probs of {len(one.groups)} groups: computed in {seconds:.1f} s")
            found.append(values)
            if self.stop.requested:
                raise Stopped("stopped after the reference pass, which is saved; run the same command to go on")
        return found


def _measure(config: Config) -> tuple[int, int]:
    """Rows of the model's embedding and number of its weights, without loading them. Raises Refused."""
    source = str(config.model.assets or config.model.init)
    trust = config.model.trust_remote_code
    if config.model.path is not None and not is_run(config.model.path):
        support.check_source(source, trust_remote_code=trust)
    try:
        found = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
        support.check_config(found.to_dict(), trust_remote_code=trust, source=source)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(found, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{source} has no configuration of a causal language model of transformers: {error}") from error
    return model.get_input_embeddings().weight.shape[0], sum(weight.numel() for weight in model.parameters())


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
