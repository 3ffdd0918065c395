"""Reading a run's files: what is missing or damaged is refused with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from selm_fast.errors import Refused
from selm_fast.report.contents import Manifest, finite
from selm_fast.training import storage
from selm_fast.training.storage import Damaged

Model = TypeVar("Model", bound=BaseModel)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises Refused."""
    try:
        return mapping(path.read_bytes(), path)
    except OSError as error:
        raise refusal(path, error) from error


def mapping(raw: bytes, path: Path) -> dict[str, Any]:
    """The mapping that a JSON file's bytes hold. Raises Refused."""
    try:
        value = parse(raw)
    except ValueError as error:
        raise Refused(f"{path}: not JSON ({error}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path}: a JSON mapping is expected, and this is {type(value).__name__}; {_REMEDY}")
    return value


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage; None where the stage is not done. Raises Refused."""
    path = folder / storage.MANIFEST
    return checked(Manifest, read_mapping(path), path) if path.exists() else None


def read_stage_file(folder: Path, name: str, manifest: Manifest) -> bytes:
    """A file of a finished stage, checked against the hash in its manifest. Raises Refused."""
    try:
        if name in manifest.files:
            return storage.read_checked(folder / name, manifest.files[name].sha256)
        return (folder / name).read_bytes()
    except (OSError, Damaged) as error:
        raise refusal(folder / name, error) from error


def read_lines(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; numbers that are not finite are None, and a last line cut by a stop is left out.

    Raises Refused.
    """
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise refusal(path, error) from error
    *whole, torn = raw.split(b"\n")
    lines = []
    for number, line in enumerate([*whole, torn], 1):
        try:
            values = parse(line) if line else None
        except ValueError as error:
            if number == len(whole) + 1:
                break  # being written, or cut by a kill: the run goes on from before it
            raise Refused(f"{path}, line {number}: not JSON ({error}); {_REMEDY}") from error
        if values is None:
            continue
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise Refused(f"{path}, line {number}: a mapping of metrics with its step is expected; {_REMEDY}")
        lines.append({str(name): metric(value) for name, value in values.items()})
    return lines


def parse_rows(model: type[Model], raw: bytes, path: Path) -> list[Model]:
    """The lines of a JSONL file as `model`. Raises Refused."""
    rows = []
    for number, line in enumerate(raw.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            value = parse(line)
        except ValueError as error:
            raise Refused(f"{where}: not JSON ({error}); {_REMEDY}") from error
        rows.append(checked(model, value, where))
    return rows


def checked(model: type[Model], value: Any, where: str | Path) -> Model:
    """The value as `model`. Raises Refused, with where it is from, the field, and what is wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its whole"
        raise Refused(f"{where}: {field}: {first['msg']}; {_REMEDY}") from error


def parse(raw: bytes) -> Any:
    """The value that JSON stands for. Raises ValueError."""
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def metric(value: Any) -> float | None:
    """A number, or None for whatever is none."""
    try:
        return finite(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


_REMEDY = "the file is damaged or of another program: leave this run out, or run it again"


def refusal(path: Path, error: Exception) -> Refused:
    """What a file that cannot be read is refused with."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Refused(f"{path}: {str(reason).removeprefix(f'{path}: ')}; {_REMEDY}")
