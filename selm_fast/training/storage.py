"""The one place that writes files others rely on: temporary, fsync, rename; hashed; never half there.

Every byte goes through `_write`, `_fsync` and `_rename`, so that a test can end the process at each of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from selm_fast.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
CHUNK = 16 * 2**20
MAX_SHARD = 2**30  # bytes of one tensor file


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
def new_folder(final: Path, *, manifest: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well; else it is removed.

    manifest: add a manifest.json with every file's size and sha256.

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
            paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            for path in paths:
                with path.open("rb") as file:
                    _fsync(file.fileno())
            if manifest:
                files = {str(path.relative_to(temporary)): entry(path) for path in paths}
                write_new(temporary / MANIFEST, to_json({"files": files}))
            for folder in sorted({path.parent for path in temporary.rglob("*")}):
                fsync_folder(folder)
            _rename(temporary, final)
            fsync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_checked_json(folder: Path, name: str) -> Any:
    """A JSON file of a folder made by `new_folder`, checked against its manifest. Raises Damaged."""
    hashes = _hashes(folder)
    if name not in hashes:
        raise Damaged(f"{folder / MANIFEST}: does not name {name}")
    return json.loads(read_checked(folder / name, hashes[name]))


def check_names(folder: Path, *stems: str) -> None:
    """Check that a folder's manifest names only files that begin in one of these ways. Raises Damaged."""
    for name in _hashes(folder):
        if not name.startswith(stems):
            raise Damaged(f"{folder / MANIFEST}: names {name}, which does not belong there")


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of a folder made by `new_folder`, by its manifest. Raises Damaged."""
    manifest = read_json(folder / MANIFEST)
    try:
        return {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder / MANIFEST}: not a list of files and their hashes") from error


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
    """JSON with sorted keys; refuses NaN, which JSON does not have."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """A JSON file. Raises Damaged where it is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {error}") from error


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as `stem-00001.safetensors`, ... of at most 1 GiB each (or one tensor)."""
    from safetensors.torch import save  # here, for a report writes files too, and torch takes seconds to import

    shard: dict[str, Tensor] = {}
    size, number = 0, 1
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > MAX_SHARD:
            write_new(folder / f"{stem}-{number:05d}.safetensors", save(shard))
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    write_new(folder / f"{stem}-{number:05d}.safetensors", save(shard))


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `write_tensors`, each file checked against the folder's manifest. Raises Damaged."""
    from safetensors.torch import load

    tensors: dict[str, Tensor] = {}
    for name, sha256 in sorted(_hashes(folder).items()):
        if name.startswith(f"{stem}-"):
            tensors |= load(read_checked(folder / name, sha256))
    return tensors
