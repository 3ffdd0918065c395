"""The optional C++ extension of csrc/: found, checked and loaded once. Its absence costs nothing but speed."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = PACKAGE.parent / "csrc"  # in a checkout; an installed package has none
BUILD = "build it with `pip install --no-build-isolation -e .`, torch and a C++ compiler being there"


def file_name(torch_version: str) -> str:
    """Name of the library in the package's folder, for torch's version.

    C++ extensions fit the torch that they were compiled with and no other, and a checkout may serve several
    environments.
    """
    return f"_C-torch{torch_version}.so"


def build_id(torch_version: str, sources: Path) -> str:
    """What a library says of itself: the torch that it was compiled with and a digest of its sources."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{torch_version}/{digest.hexdigest()[:16]}"


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
    return f"{file_name(torch.__version__)} is loaded; the processor runs {variants}, and {bf16} bf16 matmuls in fp32"


@cache
def _problem() -> str | None:
    """Load the extension -> None, or why that cannot be."""
    return load(PACKAGE / file_name(torch.__version__), SOURCES)


def load(library: Path, sources: Path) -> str | None:
    """Load a library whose sources, where they are at hand, are these -> None, or why that cannot be."""
    if not library.exists():
        others = sorted(path.name for path in library.parent.glob(file_name("*")))
        if others:
            return f"there is {', '.join(others)}, but this is torch {torch.__version__}; {BUILD}"
        return f"it is not built; {BUILD}"
    try:
        torch.ops.load_library(library)
        built = torch.ops.selm_fast_cpp.build()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{library.name} cannot be loaded: {error}"
    built_for = built.partition("/")[0]
    if built_for != torch.__version__:
        return f"{library.name} was compiled with torch {built_for}, but this is torch {torch.__version__}; {BUILD}"
    if sources.is_dir() and built != build_id(torch.__version__, sources):
        return f"{library.name} was built from other sources than those in {sources}; {BUILD}"
    return None
