"""What a stage's process is given, and the manifest that says that a stage is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_fast.config import RunConfig
from selm_fast.errors import RunFailed
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import Stage
from selm_fast.training import storage
from selm_fast.training.cache_identity import versions
from selm_fast.training.progress import Display
from selm_fast.training.signals import StopFlag
from selm_fast.training.storage import Damaged


@dataclass(frozen=True)
class Job:
    """A stage, or one process's part of it.

    config: the settings of this iteration.  index, count: which of how many processes this is.
    ranks: processes that train together, which the packs of the cache stage depend on.
    vllm_python: the interpreter that has vLLM, None for this one.
    """

    paths: Paths
    stage: Stage
    config: RunConfig
    display: Display
    stop: StopFlag
    index: int = 0
    count: int = 1
    ranks: int = 1
    vllm_python: str | None = None

    @property
    def folder(self) -> Path:
        return self.paths.stage(self.stage.iteration, self.stage.name)

    @property
    def scratch(self) -> Path:
        """For files that are of no use once the stage is done."""
        return self.folder / "scratch"

    def mine(self, names: Iterable[str]) -> list[str]:
        """Every `count`-th of some shards, beginning with the `index`-th: disjoint between processes."""
        return list(names)[self.index :: self.count]


def write_manifest(job: Job, counts: dict[str, Any], seconds: float) -> None:
    """Write the manifest that makes a stage done: what it was made from, its files with their hashes, its counts."""
    files = {}
    for path in sorted(job.folder.iterdir()):
        # A process that was killed may have left a temporary file, which the next one to write it takes away.
        if path.is_file() and path.name != storage.MANIFEST and not path.name.startswith(".tmp-"):
            files[path.name] = storage.entry(path)
    content = job.stage.as_json() | {
        "counts": counts,
        "files": files,
        "seconds": seconds,
        "processes": job.count,
        "versions": versions(),
    }
    storage.write_atomic(job.folder / storage.MANIFEST, storage.to_json(content))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stage's manifest, None where there is none or one of its files is missing or has another size."""
    try:
        manifest: dict[str, Any] = storage.read_json(folder / storage.MANIFEST)
        for name, entry in manifest["files"].items():
            if (folder / name).stat().st_size != entry["bytes"]:
                return None
        return manifest
    except (Damaged, OSError, KeyError, TypeError, AttributeError):
        return None


def check_files(folder: Path) -> None:
    """Check every file of a finished stage against its manifest. Raises RunFailed where one is not what was written."""
    for name in storage.read_json(folder / storage.MANIFEST)["files"]:
        _read(folder, name)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
    storage.write_atomic(path, text.encode())


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file of a finished stage, checked against its manifest.

    Raises RunFailed where the file is not what the stage wrote.
    """
    yield from map(json.loads, _read(folder, name).splitlines())


def _read(folder: Path, name: str) -> bytes:
    try:
        entry = storage.read_json(folder / storage.MANIFEST)["files"][name]
        return storage.read_checked(folder / name, entry["sha256"])
    except (Damaged, KeyError) as damage:
        raise RunFailed(
            f"{folder / name} was changed since its stage was done ({damage}); remove {folder} to have it made again"
        ) from damage
