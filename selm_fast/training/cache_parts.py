"""A reference pass cut into parts, one for each of several processes, and the parts put together again.

Each part is a run of the plan's packs, in order, in a cache of its own (`parts/<i>/`): no two processes write one file.
Joined, their shards are the very shards of one pass over the whole plan.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from selm_fast.data.packing import Plan
from selm_fast.training import storage
from selm_fast.training.reference_cache import ReferenceCache


def part_of(plan: Plan, index: int, count: int) -> Plan:
    """Part `index` of `count` of a plan: its packs in order, as one step."""
    packs = [members for step in plan.steps for members in step]
    first, last = (len(packs) * i // count for i in (index, index + 1))
    return Plan(plan.groups, (tuple(packs[first:last]),))


def part_folder(folder: Path, index: int) -> Path:
    """Where part `index` keeps its cache, inside the folder of the whole one."""
    return folder.expanduser() / "parts" / str(index)


def only_part(cache: ReferenceCache) -> None:
    """Remove what an earlier attempt with another model, machine or settings left beside this part of a cache."""
    if cache.folder.exists():
        for path in cache.folder.iterdir():
            if path != cache.path:
                shutil.rmtree(path)


def drop_parts(folder: Path) -> None:
    """Remove the parts of an attempt with several processes, where one process has done it all."""
    shutil.rmtree(part_folder(folder, 0).parent, ignore_errors=True)


def join_parts(folder: Path, plans: list[Plan], count: int) -> None:
    """Put the parts of `count` processes together as the passes of the cache in `folder`, and drop them.

    Raises Damaged where a part is missing or not complete.
    """
    parts = part_folder(folder, 0).parent
    joined = storage.temporary_of(parts)
    shutil.rmtree(joined, ignore_errors=True)
    if not parts.exists():  # joined already
        return
    caches = []
    for index in range(count):
        for path in part_folder(folder, index).glob(f"*/{storage.MANIFEST}"):
            caches.append(ReferenceCache(part_folder(folder, index), storage.read_json(path)["identity"]))
    if len(caches) != count or any(cache.identity != caches[0].identity for cache in caches):
        raise storage.Damaged(f"{folder}: not every part was made, or not with the same model and settings")
    whole = ReferenceCache(folder, caches[0].identity)
    whole.path.mkdir(parents=True, exist_ok=True)
    # One that is there already, by an attempt with one process, is in no part.
    for plan in [plan for plan in plans if whole.find(plan) is None]:
        shards = []
        for index, cache in enumerate(caches):
            for shard in cache.shards(part_of(plan, index, count)):
                target = whole.path / shard["file"]
                target.unlink(missing_ok=True)
                storage.link(cache.path / shard["file"], target)
                shards.append(shard)
        whole.add(plan, shards)
    parts.rename(joined)  # all of them at once: a kill while they are removed must not leave some to be joined again
    shutil.rmtree(joined)
