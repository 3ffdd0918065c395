"""Reference log-probs, computed once: by the very packs that training will use, so that step 0 is exact.

`<dir>/<digest>/manifest.json` lists passes, each over one plan; a pass is a row of `shard-*.safetensors`. The digest
names everything that could change a value (weights, tokenizer, truncation, dtype, back ends, versions); the plan is
not in
it: log-probs made under another plan differ by rounding alone, and serve with a warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selm_fast.batch import PackedBatch
from selm_fast.data.packing import Plan
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.training import storage
from selm_fast.training.cache_shards import Pack, bad_value, read_shard, shard_name, write_shard
from selm_fast.training.signals import StopFlag
from selm_fast.training.storage import Damaged
from selm_fast.training.world import World

log = logging.getLogger(__name__)

SHARD_SEQUENCES = 4096  # a stopped pass loses at most this much work
# Largest difference (nats, of a sequence) between two plans, as a share of its log-prob: other neighbours in a GEMM.
OTHER_PLAN_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Summed reference log-probs (nats) of every sequence of a plan.

    packs: by micro-batch of the plan, (S,) fp64; None where the values come from another plan.
    by_key: by sequence key, for batches packed in another way.
    """

    by_key: dict[bytes, float]
    packs: list[Tensor] | None

    def of(self, batch: PackedBatch, index: int | None = None) -> Tensor:
        """(S,) fp64 for a batch. index: its place in the plan the values were made for, where it stands in it.

        The same sequence may occur in two packs of a plan (duplicate rows) with a different last bit: hence the index.
        """
        if batch.num_groups == 0:  # nobody asks for the values of its sequences
            values = torch.zeros(batch.cu_responses.shape[0] - 1, dtype=torch.float64)
        elif index is not None and self.packs is not None:
            values = self.packs[index]
            assert values.shape[0] == len(batch.sequence_keys)
        else:
            values = torch.tensor([self.by_key[key] for key in batch.sequence_keys], dtype=torch.float64)
        return values.to(batch.tokens.device)


@dataclass(slots=True)
class ReferenceCache:
    """The reference log-probs of one model under one set of settings.

    folder: parent of all caches.  identity: everything that could change a value, by name; JSON values.
    """

    folder: Path
    identity: dict[str, Any]
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder.expanduser() / hashlib.sha256(storage.to_json(self.identity)).hexdigest()[:32]

    def find(self, plan: Plan) -> ReferenceLogps | None:
        """The values for a plan if every one is there and sound, else None. Damage is warned of, and never used."""
        manifest = self._manifest()
        same = manifest["passes"].get(plan.digest())
        if same is not None:
            if not same["complete"]:  # a pass that was stopped is gone on with, whatever other plans could give
                return None
            try:
                packs = list(self._read_packs(same))
                keys, values = (
                    [key for ks, _ in packs for key in ks],
                    [value for _, vs in packs for value in vs.tolist()],
                )
                if [tuple(ks) for ks, _ in packs] == plan.pack_keys():
                    return ReferenceLogps(dict(zip(keys, values, strict=True)), [vs for _, vs in packs])
                log.warning(
                    "reference cache %s: keys are not those of the plan it is filed under; rebuilding", self.path
                )
            except Damaged as damage:
                log.warning("reference cache: %s; rebuilding", damage)
            return None
        return self._from_other_plans(manifest, plan)

    def _from_other_plans(self, manifest: dict[str, Any], plan: Plan) -> ReferenceLogps | None:
        by_key: dict[bytes, float] = {}
        for entry in manifest["passes"].values():
            try:
                for keys, values in self._read_packs(entry):
                    by_key |= dict(zip(keys, values.tolist(), strict=True))
            except Damaged as damage:
                log.warning("reference cache: %s; not used", damage)
        if not by_key or any(key not in by_key for keys in plan.pack_keys() for key in keys):
            return None
        log.warning(
            "reference cache %s was made under another plan (order, groups a step or max_tokens): log-probs may "
            "differ by %g of "
            "their value, and the loss of step 0 is not ln 2 to the bit",
            self.path,
            OTHER_PLAN_TOLERANCE[self.identity["dtype"]],
        )
        return ReferenceLogps(by_key, None)

    def shards(self, plan: Plan) -> list[dict[str, str]]:
        """Name and sha256 of the files of a complete pass over a plan, in order. Raises Damaged where it is none."""
        entry = self._manifest()["passes"].get(plan.digest())
        if entry is None or not entry["complete"]:
            raise Damaged(f"{self.path}: holds no complete pass over these packs")
        return list(entry["shards"])

    def add(self, plan: Plan, shards: list[dict[str, str]]) -> None:
        """Enter files that lie in `path` as the complete pass over a plan; they are checked when they are read."""
        manifest = self._manifest()
        manifest["passes"][plan.digest()] = {"complete": True, "ranks": 1, "shards": shards}
        self._write_manifest(manifest)

    def fill(
        self,
        plan: Plan,
        policy: Policy,
        *,
        world: World,
        stop: StopFlag,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> ReferenceLogps:
        """Run the reference over a plan, going on where an earlier pass ended; every shard is durable once written.

        Each process runs its rank's packs and writes them into shards of its own.
        on_batch: called with the number of groups of each round of packs done.
        Raises Stopped after a signal, with what was computed saved.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked() if world.first else nullcontext(), world.watched("reference pass"):
            world.meet("reference pass")  # what another run has filled in the meantime is seen by all
            return self._fill(plan, policy, world, stop, on_batch)

    def _fill(
        self, plan: Plan, policy: Policy, world: World, stop: StopFlag, on_batch: Callable[[int], None]
    ) -> ReferenceLogps:
        manifest, digest = self._manifest(), plan.digest()
        entry = manifest["passes"].setdefault(digest, {"shards": [], "ranks": plan.ranks})
        if entry["ranks"] != plan.ranks:  # the same packs, shared out to more processes or fewer
            entry.update(shards=[], ranks=plan.ranks)
        entry["complete"] = False
        keys = plan.pack_keys()
        done, entry["shards"] = self._sound_prefix(entry["shards"], keys, plan.ranks)
        mine: list[Pack] = []
        written: list[Pack] = []
        saved, index = len(done), 0
        for batch, num_groups in _batches(plan, world.rank):
            index += plan.ranks
            if index <= len(done):
                on_batch(num_groups)
                continue
            with torch.no_grad():
                values = policy.sequence_logps(batch.to(world.device)).cpu()[: len(batch.sequence_keys)]
            if bad := bad_value(values):
                raise RunFailed(
                    f"the reference model gives rows {list(batch.row_ids)} {bad}; check its weights and dtype"
                )
            mine.append((list(batch.sequence_keys), values))
            on_batch(num_groups)
            stopped = world.any(stop.requested, "reference pass")
            if stopped or sum(map(len, keys[saved:index])) >= SHARD_SEQUENCES:
                self._write_shards(manifest, digest, mine, world)
                saved, written, mine = index, written + mine, []
            if stopped:
                raise Stopped(
                    f"stopped in the reference pass; {saved} of {sum(map(len, plan.steps))} packs are saved in "
                    f"{self.path}"
                )
        if mine:
            self._write_shards(manifest, digest, mine, world)
        entry["complete"] = True
        if world.first:
            self._write_manifest(manifest)
        world.meet("reference pass")
        everything = list(self._read_packs(entry)) if world.size > 1 else done + written + mine
        by_key = {key: value for keys, values in everything for key, value in zip(keys, values.tolist(), strict=True)}
        return ReferenceLogps(by_key, [values for _, values in everything])

    def _write_shards(self, manifest: dict[str, Any], digest: str, packs: list[Pack], world: World) -> None:
        """A shard of each process, whose names and hashes all of them then know."""
        shards = manifest["passes"][digest]["shards"]
        first = len(shards)
        sha256 = write_shard(self.path, shard_name(digest, first + world.rank), packs)
        hashes = world.gather(torch.frombuffer(bytearray.fromhex(sha256), dtype=torch.uint8), "reference pass")
        for rank, found in enumerate(hashes):
            shards.append({"file": shard_name(digest, first + rank), "sha256": bytes(found.tolist()).hex()})
        if world.first:
            self._write_manifest(manifest)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        storage.write_atomic(self.path / storage.MANIFEST, storage.to_json(manifest | {"sha256": _sha256(manifest)}))

    def _manifest(self) -> dict[str, Any]:
        path = self.path / storage.MANIFEST
        if not path.exists():
            return {"identity": self.identity, "passes": {}}
        try:
            manifest = storage.read_json(path)
            if manifest.pop("sha256") != _sha256(manifest):
                raise Damaged(f"{path}: changed since it was written")
            if manifest["identity"] != self.identity:
                raise Damaged(f"{path}: made under other settings than its name says")
            return manifest  # type: ignore[no-any-return]
        except Damaged as damage:
            log.warning("reference cache: %s; rebuilding", damage)
        except (KeyError, TypeError, AttributeError):
            log.warning("reference cache: %s is not the manifest of one; rebuilding", path)
        return {"identity": self.identity, "passes": {}}

    def _read_packs(self, entry: dict[str, Any]) -> Iterator[Pack]:
        """The packs of a pass, in the order of its plan: its ranks took turns, and wrote a shard each at a time."""
        shards, ranks = entry["shards"], entry.get("ranks", 1)
        for first in range(0, len(shards), ranks):
            by_rank = [list(read_shard(self.path, shard)) for shard in shards[first : first + ranks]]
            if len(by_rank) != ranks or len({len(packs) for packs in by_rank}) != 1:
                raise Damaged(f"{self.path / storage.MANIFEST}: the shards of its ranks do not go together")
            for packs in zip(*by_rank, strict=True):
                yield from packs

    def _sound_prefix(
        self, shards: list[dict[str, str]], keys: list[tuple[bytes, ...]], ranks: int
    ) -> tuple[list[Pack], list[dict[str, str]]]:
        """The packs of a pass up to its first damaged shard, and those shards. keys: of the plan's packs, in order."""
        packs: list[Pack] = []
        for first in range(0, len(shards), ranks):
            together = shards[first : first + ranks]
            try:
                found = list(self._read_packs({"shards": together, "ranks": ranks}))
                if [tuple(ks) for ks, _ in found] != keys[len(packs) : len(packs) + len(found)]:
                    raise Damaged(f"{self.path / Path(together[0]['file']).name}: its keys are not those of the plan")
                packs += found
            except Damaged as damage:
                log.warning("reference cache: %s; going on from there", damage)
                return packs, shards[:first]
        return packs, list(shards)

    def differences(self) -> list[str]:
        """How the caches beside this one were made differently: a line each, for the message of a required cache."""
        lines = []
        for path in sorted(self.path.parent.glob(f"*/{storage.MANIFEST}")):
            try:
                other = storage.read_json(path)["identity"]
            except (Damaged, KeyError, TypeError):
                continue
            names = sorted(
                name for name in self.identity.keys() | other.keys() if self.identity.get(name) != other.get(name)
            )
            if names:
                lines.append(
                    f"{path.parent.name}: "
                    + "; ".join(f"{n}: {other.get(n)} there, {self.identity.get(n)} here" for n in names)
                )
        return lines

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time fills a cache; a second one waits, and then finds it full."""
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(storage.to_json(manifest)).hexdigest()


def _batches(plan: Plan, rank: int) -> Iterator[tuple[PackedBatch, int]]:
    """The packs of a rank, and how many groups all ranks have in their packs of the same round."""
    for step in range(len(plan.steps)):
        for nth, batch in enumerate(plan.batches(step, rank)):
            yield batch, plan.round_groups(step, nth)


def require(cache: ReferenceCache, plans: list[Plan]) -> None:
    """Refuse to go on unless every plan's values are in the cache (`--cache.require true`). Raises Refused with the
    difference."""
    for plan in plans:
        if cache.find(plan) is None:
            beside = cache.differences()
            raise Refused(
                f"cache.require is set and {cache.path} does not hold every reference log-prob of these rows"
                + (
                    "; caches beside it were made with\n  " + "\n  ".join(beside)
                    if beside
                    else "; there is no other cache beside it"
                )
            )
