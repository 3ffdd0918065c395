"""What an interpreter lacks, from a folder of wheels: unpacked while a benchmark runs, installed nowhere."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoWheels(Exception):
    """A folder that holds none."""


@contextmanager
def unpacked(folder: Path | None) -> Iterator[str | None]:
    """Put the wheels of a folder on the path of this process, after what is installed; -> where they are.

    Raises NoWheels for a folder without any.
    """
    if folder is None:
        yield None
        return
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise NoWheels(f"--wheels is {folder}; expected a folder of .whl files")
    with tempfile.TemporaryDirectory(prefix="wheels-") as scratch:
        place = str(Path(scratch) / "site-packages")  # by this name dill knows that its modules are no user's own
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
        sys.path.append(place)  # the last place: what is installed comes first
        yield place
