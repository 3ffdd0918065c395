"""The one place that writes files others rely on: temporary, fsync, rename; hashed; never half there.

Every byte goes through `_write`, `_fsync` and `_rename`, so that a test can end the process at each of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from selm_fast.errors import RunFailed

MANIFEST = "manifest.json"
CHUNK = 16 * 2**20
MAX_SHARD = 2**29  # bytes of one tensor file; what is made of it in memory, a copy among it, stays within 1 GiB


class Damaged(Exception):
    """A file is missing, short, changed, or was written by something else; the message says which and how."""


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk while writing `path` into RunFailed, the library's own way of saying so included."""
    full = (errno.ENOSPC, errno.EDQUOT)
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full):
            raise RunFailed(
                f"the disk is full: {path} was not written; what was saved before is intact. Free space and run again"
            ) from error
        raise


def write_new(path: Path, data: bytes) -> str:
    """Write and fsync a new file; -> its sha256. Raises RunFailed on a full disk."""
    view = memoryview(data)
    with disk_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            while view:
                view = view[_write(fd, view[:CHUNK]) :]
            _fsync(fd)
        finally:
            os.close(fd)
    return hashlib.sha256(data).hexdigest()


def write_listed(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file; -> what a manifest says of it. Raises RunFailed on a full disk."""
    return {"bytes": len(data), "sha256": write_new(path, data)}


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links. Raises RunFailed on a full disk."""
    try:
        os.link(source, target)
    except OSError:
        with disk_errors(target):
            shutil.copyfile(source, target)


def write_atomic(path: Path, data: bytes) -> str:
    """Replace a file, or leave it as it was; -> its sha256. Raises RunFailed on a full disk."""
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    try:
        with disk_errors(path):
            digest = write_new(temporary, data)
            _rename(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def temporary_of(path: Path) -> Path:
    """Where a file or folder is written before it gets its name: one place, so that what a kill left is found again."""
    return path.with_name(f".tmp-{path.name}")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well; else it is removed.

    Raises RunFailed on a full disk; FileExistsError where `final` is there already.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists and is never overwritten")
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(final):
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    with path.open("rb") as file:
                        _fsync(file.fileno())
            give_name(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def give_name(temporary: Path, final: Path) -> None:
    """Make a finished folder, whose files are durable, known under its name."""
    for folder in sorted({path.parent for path in temporary.rglob("*")}):
        fsync_folder(folder)
    _rename(temporary, final)
    fsync_folder(final.parent)


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a folder, with the size and the sha256 that each had when it was written."""

    folder: Path
    files: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """What a folder's manifest.json says. Raises Damaged where it is not, to the byte, as it was written."""
        path = folder / MANIFEST
        found = read_json(path)
        if not isinstance(found, dict) or to_json(found) != path.read_bytes():
            raise Damaged(f"{path}: not as it was written")
        files = found.get("files")
        if not isinstance(files, dict) or any(set(entry) != {"bytes", "sha256"} for entry in files.values()):
            raise Damaged(f"{path}: not a list of files and their hashes")
        return cls(folder, files)

    def read(self, name: str) -> bytes:
        """The bytes of one of the files, checked. Raises Damaged."""
        if name not in self.files:
            raise Damaged(f"{self.folder / MANIFEST}: does not name {name}")
        data = read_checked(self.folder / name, self.files[name]["sha256"])
        if len(data) != self.files[name]["bytes"]:
            raise Damaged(f"{self.folder / MANIFEST}: the size of {name} is not {len(data)} bytes in it")
        return data


def read_checked(path: Path, sha256: str) -> bytes:
    """The bytes of a file whose hash is known. Raises Damaged; links are not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{path}: {len(data)} bytes whose sha256 is not the one in its manifest: truncated or changed")
    return data


def to_json(value: Any) -> bytes:
    """JSON with sorted keys, one way to write a value; refuses NaN, which JSON does not have."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """A JSON file. Raises Damaged where it is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {error}") from error
