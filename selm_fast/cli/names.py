"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

# Below this likeness a suggestion misleads more often than it helps (the default of difflib.get_close_matches).
CLOSE_ENOUGH = 0.6


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` abbreviates or most resembles, if any; dotted names also match by their last part."""
    names = list(candidates)
    for begins in (lambda c: c.startswith(name), lambda c: c.rpartition(".")[2].startswith(name)):
        if name and (begun := list(filter(begins, names))):
            return min(begun, key=len)

    def likeness(candidate: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, name, candidate).ratio()
        # The section counts only where it may have been written otherwise (model_path): a right name in the wrong
        # section is worth suggesting, a wrong name in the right one is not.
        last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return last if "." in name else max(whole, last), whole

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= CLOSE_ENOUGH else None
