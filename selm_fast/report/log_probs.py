"""Log-probs of held-out rows under the policies and the bases of runs, computed once: by packs, into the cache."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from selm_fast.config import Config
from selm_fast.data.dataset import Dataset, load_groups
from selm_fast.data.packing import Plan, plan_epoch, sequence_key
from selm_fast.data.tokenizer import Tokenizer, load_tokenizer
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.report.implicit import Floats, ImplicitRewards, rewards
from selm_fast.report.runs import Run
from selm_fast.report.trained import Trained, check_models, last_trained
from selm_fast.training.cache_identity import cache_identity
from selm_fast.training.digest import weights_digest
from selm_fast.training.export import DTYPES
from selm_fast.training.host_memory import reused_memory
from selm_fast.training.inputs import Sizes
from selm_fast.training.machine import choose_device, memory_bytes
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache, ReferenceLogps
from selm_fast.training.signals import StopFlag
from selm_fast.training.storage import Damaged
from selm_fast.training.weights import Loaded, load
from selm_fast.training.world import World, join, launched


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A run's models with the held-out rows as it reads them."""

    trained: Trained
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    data: Dataset
    plan: Plan


def implicit_rewards(runs: Sequence[Run], data: str) -> list[ImplicitRewards]:
    """Implicit rewards of the last policy of each run on the rows of `data`, in any format of `data.train`.

    One model is in memory at a time, in this process alone. Log-probs are kept in the caches that the runs' settings
    name, so that the same rows and models are passed over once.
    Raises Refused before any pass over the rows; RunFailed; Stopped after a signal, with what was computed saved.
    """
    if launched():
        raise Refused("report --data works in one process: start it without a launcher")
    trained = [last_trained(run) for run in runs]
    asked = [_ask(one, data) for one in trained]
    with StopFlag() as stop, ExitStack() as stack:
        models = _Models(stack, stop, Display(), list(dict.fromkeys(one.cache for one in trained)))
        dtypes = {one.dtype for one in asked}
        compared = dtypes.pop() if len(dtypes) == 1 else torch.float32
        digests = [_check_base(models, one, compared) for one in asked]
        try:
            # The base that was loaded last is still there.
            bases = [models.log_probs(one, one.trained.base, "base model") for one in reversed(asked)][::-1]
            policies = [models.log_probs(one, one.trained.policy, "policy") for one in asked]
        except Refused as error:  # of a policy, once other models were passed over
            raise RunFailed(f"{error}. What was computed is kept") from error
    return [
        _rewards(one, policy, base, digest)
        for one, policy, base, digest in zip(asked, policies, bases, digests, strict=True)
    ]


def _ask(trained: Trained, data: str) -> Asked:
    """The rows as a run reads them. Raises Refused for what is missing, or does not fit."""
    config = trained.policy
    device, dtype = choose_device(config)
    sizes = check_models(trained)
    _check_memory(trained, sizes, device, dtype)
    tokenizer = load_tokenizer(str(config.tokenizer_source))
    dataset = load_groups(data, config.data, tokenizer, vocab_size=sizes.vocab, wants_explored=False)
    batch = config.batch
    try:
        plan = plan_epoch(
            dataset.groups, groups_per_step=batch.groups, max_tokens=batch.max_tokens, seed=config.seed, shuffle=False
        )
    except ValueError as error:
        raise Refused(f"{data} does not fit the batches of {trained.run}: {error}") from error
    return Asked(trained=trained, device=device, dtype=dtype, tokenizer=tokenizer, data=dataset, plan=plan)


def _check_memory(trained: Trained, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    # On a GPU fp32 shards are gathered a layer at a time; elsewhere the copies that compute lie beside the masters.
    each = 4 if device.type == "cuda" or dtype == torch.float32 else 4 + dtype.itemsize
    needed, there = sizes.weights * each, memory_bytes(device)
    if needed > there:
        raise Refused(
            f"the model of {trained.run} takes {needed / 2**30:.1f} GiB and this machine's {device.type} has "
            f"{there / 2**30:.1f} GiB: report --data works on one device alone"
        )


def _check_base(models: _Models, asked: Asked, compared: torch.dtype) -> str:
    """The digest of a run's base in the dtype in which bases are compared. Raises Refused where its weights changed."""
    loaded, world = models.load(asked.trained.base, asked.device, asked.dtype)
    if asked.trained.recorded is not None:
        digest, dtype = asked.trained.recorded
        if weights_digest(loaded.masters.masters, DTYPES[dtype], world) != digest:
            raise Refused(
                f"the weights of {asked.trained.base_name} have changed since {asked.trained.run} began: "
                "put them back, or leave the run out"
            )
    return weights_digest(loaded.masters.masters, compared, world)


@dataclass(slots=True)
class _Models:
    """One model in memory at a time, and the log-probs that were asked of each.

    folders: of caches; what one of them holds is not computed again for another.
    """

    stack: ExitStack
    stop: StopFlag
    display: Display
    folders: list[Path]
    _worlds: dict[str, World] = field(default_factory=dict)
    _now: tuple[str, Loaded] | None = None
    _known: dict[tuple[str, str], ReferenceLogps] = field(default_factory=dict)

    def load(self, config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Loaded, World]:
        """The model that settings name, in the place of the one that was there."""
        if device.type not in self._worlds:
            self.stack.enter_context(reused_memory(device))
            self._worlds[device.type] = self.stack.enter_context(join(device, config.timeout_s))
        world, key = self._worlds[device.type], _key(config, device, dtype)
        if self._now is None or self._now[0] != key:
            if self.stop.requested:
                raise Stopped("stopped between two models; what was computed is saved: the same command goes on")
            if self._now is not None:
                self._now = None
                gc.collect()  # FSDP's hooks and their modules hold each other
            try:
                self._now = key, load(config, config.model.path, world, dtype)
            except torch.OutOfMemoryError as error:
                raise RunFailed(_too_small(config, error)) from error
        return self._now[1], world

    def log_probs(self, asked: Asked, config: Config, which: str) -> ReferenceLogps:
        """Log-probs of the rows under a model of the run: from a cache, or computed into the run's own."""
        key = _key(config, asked.device, asked.dtype), asked.plan.digest()
        if key not in self._known:
            loaded, world = self.load(config, asked.device, asked.dtype)
            identity = cache_identity(config, loaded.policy, loaded.digest, asked.tokenizer, loaded.masters.compute)
            own = ReferenceCache(asked.trained.cache, identity)
            others = (ReferenceCache(folder, identity) for folder in self.folders)
            found = next((values for cache in (own, *others) if (values := _whole(cache, asked.plan))), None)
            if found:
                self.display.say(f"log-probs, {which} of {asked.trained.run}: from the cache, no forward pass")
            self._known[key] = found or self._fill(own, asked, loaded, world, which)
        return self._known[key]

    def _fill(self, cache: ReferenceCache, asked: Asked, loaded: Loaded, world: World, which: str) -> ReferenceLogps:
        name, plan = f"log-probs, {which} of {asked.trained.run}", asked.plan
        with self.display.phase(name, len(plan.groups), "groups") as phase:
            try:
                return cache.fill(plan, loaded.policy, world=world, stop=self.stop, on_batch=phase.advance)
            except torch.OutOfMemoryError as error:
                raise RunFailed(_too_small(asked.trained.policy, error)) from error


def _whole(cache: ReferenceCache, plan: Plan) -> ReferenceLogps | None:
    """The values of a pass over these very packs.

    Those of another plan differ by rounding, which a small difference between two policies could be made of.
    """
    try:
        cache.shards(plan)
    except Damaged:
        return None
    return cache.find(plan)


def _key(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """What tells loaded models from each other: where they are from, and what they compute in and how."""
    model = config.model.model_dump(mode="json", exclude={"tokenizer"})
    drawn = config.seed if config.model.path is None or config.grid_dither else None
    return json.dumps([model, drawn, config.grid_dither, config.head_mode, str(device), str(dtype)])


def _too_small(config: Config, error: Exception) -> str:
    return (
        f"the device has too little memory for {config.model.path or config.model.init} and packs of "
        f"{config.batch.max_tokens} tokens, and report --data works on one device alone: {error}"
    )


def _rewards(asked: Asked, policy: ReferenceLogps, base: ReferenceLogps, base_digest: str) -> ImplicitRewards:
    trained, groups, report = asked.trained, asked.plan.groups, asked.data.report

    def of(response: str) -> Floats:
        keys = [sequence_key(group.prompt, getattr(group, response)) for group in groups]
        here, there = (np.array([values.by_key[key] for key in keys]) for values in (policy, base))
        return rewards(here, there, trained.policy.beta)

    return ImplicitRewards(
        model=trained.model,
        base=f"{trained.base_name}, {trained.base_role}",
        base_digest=base_digest,
        beta=trained.policy.beta,
        rows=np.array([index if group.row_id is None else group.row_id for index, group in enumerate(groups)]),
        chosen=of("chosen"),
        rejected=of("rejected"),
        rows_read=report.rows_read,
        skipped=dict(report.skipped),
    )
