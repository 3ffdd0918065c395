"""What a run begins with: rows and a model, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from selm_fast.config import PAIRRM, RunConfig
from selm_fast.data.sources import read_rows
from selm_fast.errors import Refused
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.vllm_servers import check_vllm

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model")


def identities(paths: Paths, known: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Identity of the model, rows, held-out rows, tokenizer and ranker's checkpoint of a run, and of their files.

    known: the files of an earlier call: what has the same size and time since is not read again.
    """
    found: dict[str, str] = {}
    files: dict[str, Any] = {}
    sources = {"ranker": paths.config.pairrm.path if paths.config.ranker == PAIRRM else None}
    if paths.config.prepare is None:
        sources |= {"model": paths.start, "data": paths.train_rows, "eval": paths.eval_rows}
        sources["tokenizer"] = paths.config.model.tokenizer  # unless it is the model's own
    for name, source in sources.items():
        if source is None:
            continue
        root = _local(source)
        stamps = _stamps(root, _MODEL_FILES if name in ("model", "tokenizer", "ranker") else None) if root else []
        before = known.get(name)
        if before is not None and stamps and before["stamps"] == stamps:  # the name of a hub has no stamps
            files[name] = before
        else:
            files[name] = {"stamps": stamps, "identity": _identity(source, root, stamps)}
        found[name] = files[name]["identity"]
    return found, files


def check_run(config: RunConfig, *, ranks: bool = True, vllm_python: str | None = None) -> None:
    """Refuse settings that no iteration could run with, before any work.

    ranks: whether anything will be generated and ranked now.  vllm_python: the interpreter that should have vLLM.
    """
    if config.output_dir is None:
        raise Refused("output_dir is not set: give the folder of this run, --output_dir runs/first")
    if config.prepare is None:
        if config.model.path is None:
            raise Refused("model.path is not set: give the model to begin with, --model.path FOLDER")
        if config.data.train is None:
            raise Refused("data.train is not set: give the prompts, --data.train prompts.jsonl")
        for source in filter(None, (config.data.train, config.data.eval)):
            next(read_rows(source), None)  # refused where it is not there
    ranked = [number for number in range(1, config.iterations + 1) if config.at(number).generates]
    if ranks and ranked and config.ranker is None:
        raise Refused(
            f"ranker is not set, and iteration {ranked[0]} ranks responses: give --ranker pairrm, or a function that "
            "scores them, --ranker python:MODULE:FUNCTION"
        )
    iterations = [config.at(number) for number in range(1, config.iterations + 1)]
    if ranks and any(at.rollout.engine == "vllm" for at in (config, *iterations)):
        check_vllm(vllm_python)
    if vllm_python is not None and all(at.rollout.engine != "vllm" for at in (config, *iterations)):
        raise Refused(f"--vllm-python is given and rollout.engine is {config.rollout.engine}: set it to vllm")


def _local(source: str) -> Path | None:
    """The file or folder that a source is, or that FOLDER:SPLIT names; None for what is on a hub."""
    for name in (source, source.rpartition(":")[0]):
        path = Path(name).expanduser()
        if name and path.exists():
            return path
    return None


def _stamps(root: Path, suffixes: tuple[str, ...] | None) -> list[list[Any]]:
    """Name, size and time of every file that a source consists of, or of those with one of these suffixes."""
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return [
        [str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for path in paths
        if suffixes is None or path.suffix in suffixes
    ]


def _identity(source: str, root: Path | None, stamps: list[list[Any]]) -> str:
    """sha256 of the content of every file, by its name; a hub name stands for itself, and so does a split."""
    if root is None or not stamps:
        return source
    digest = hashlib.sha256()
    if Path(source).expanduser() != root:
        digest.update(source.rpartition(":")[2].encode())
    for name, _, _ in stamps:
        with open(name, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        relative = Path(name).relative_to(root) if root.is_dir() else Path(name).name
        digest.update(json.dumps([str(relative), content]).encode())
    return digest.hexdigest()
