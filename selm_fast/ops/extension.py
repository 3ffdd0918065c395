"""The optional C++ extension of csrc/: found, checked and loaded once.

Its absence costs speed on a CPU, and exactness in 16 bits, where logits are then rounded.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = PACKAGE.parent / "csrc"  # in a checkout; an installed package has none
BUILD = "build it with `pip install --no-build-isolation -e .`, torch and a C++ compiler being there"


def file_name(torch_version: str, digest: str) -> str:
    """Name of a library in the package's folder: which torch it was compiled with, and from which sources.

    It fits that torch and no other, and a checkout may serve several environments; the wrong library is then known
    before any of it runs.
    """
    return f"_C-torch{torch_version}-{digest}.so"


def digest_of(sources: Path) -> str:
    """Of the names and contents of the C++ files in a folder."""
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def available() -> bool:
    """Is the extension built for this torch, and loaded?"""
    return _problem() is None


def mm_serves(dtype: torch.dtype) -> bool:
    """Can the extension multiply matrices of a 16-bit dtype with fp32 results, on this processor?"""
    return available() and bool(torch.ops.selm_fast_cpp.mm_serves(dtype))


def status() -> str:
    """In a sentence: which extension is loaded, or why none is."""
    problem = _problem()
    if problem is not None:
        return problem
    variants = ", ".join(torch.ops.selm_fast_cpp.variants())
    bf16 = "has" if mm_serves(torch.bfloat16) else "lacks"
    return f"it is loaded for torch {torch.__version__}; the processor runs {variants}, and {bf16} bf16 matmuls in fp32"


def library() -> str | None:
    """Name of the loaded library, which tells of its torch and its sources; None where none is loaded."""
    found = _loaded()
    return found.name if isinstance(found, Path) else None


def _problem() -> str | None:
    found = _loaded()
    return found if isinstance(found, str) else None


@cache
def _loaded() -> Path | str:
    """Load the extension -> the library, or why there is none."""
    return load(PACKAGE, SOURCES)


def load(folder: Path, sources: Path) -> Path | str:
    """Load the library of a folder that was built from these sources, where there are any -> it, or why not."""
    version = torch.__version__
    # Beside a setup.py the sources are this package's; site-packages may have a csrc of anybody's.
    in_checkout = (sources.parent / "setup.py").is_file() and sources.is_dir()
    found = sorted(folder.glob(file_name(version, digest_of(sources) if in_checkout else "*")))
    if not found and any(folder.glob(file_name(version, "*"))):
        return f"it was built from other sources than those in {sources}; {BUILD}"
    if not found:
        others = ", ".join(sorted(path.name for path in folder.glob(file_name("*", "*"))))
        return f"there is {others}, but this is torch {version}; {BUILD}" if others else f"it is not built; {BUILD}"
    try:
        torch.ops.load_library(found[0])
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} cannot be loaded: {error}"
    return found[0]
