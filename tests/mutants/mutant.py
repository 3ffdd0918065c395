"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass

OPS = "selm_fast/ops/"


@dataclass(frozen=True)
class Mutant:
    """A change of a file: `old`, which occurs once, becomes `new`, and one of `tests` (arguments of pytest) fails."""

    file: str
    why: str
    old: str
    new: str
    tests: str


def mutants_of(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Several of one file: why, old, new."""
    return [Mutant(file, why, old, new, tests) for why, old, new in changes]
