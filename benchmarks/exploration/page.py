"""The page: one HTML file that needs nothing else, made from a results file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.exploration import tables
from benchmarks.exploration.analysis import Results
from benchmarks.exploration.claims import all_claims
from benchmarks.exploration.figures import CHARTS
from selm_fast.report.template import page

# What stands under which heading: sentence, charts, tables.
SECTIONS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Claims", "", (), ("claims",)),
    ("Reward", "What each method comes to.", ("iterations", "queries", "differences"), ("best", "queries", "terms")),
    ("Alpha", "How strong the term should be.", ("alpha",), ("alpha",)),
    ("Learning rate and KL", "Whether a better setting of DPO does the same.", ("kl",), ("rates", "equal-kl")),
    ("Exploration", "What the policy tries, and what it finds.", ("exploration",), ()),
    ("Greedy responses", "", ("histograms-alpha", "histograms-iteration"), ()),
    ("Implicit rewards", "", ("implicit",), ("implicit",)),
    ("Other worlds", "", ("worlds",), ("worlds", "control")),
    ("Method", "", (), ("setup", "tuning")),
)


def render(result: Mapping[str, Any]) -> str:
    """The page about a results file."""
    results = Results(result["exploration"])
    found = {table.name: table for table in tables.tables(results)}
    sections = [
        (title, about, [CHARTS[name](results) for name in charts], [found[name] for name in names])
        for title, about, charts, names in SECTIONS
    ]
    claims = list(all_claims(results))
    told = Counter(claim.verdict for claim in claims)
    return page(
        "exploration.html.j2",
        Path(__file__).parent,
        sections=sections,
        headline=f"Of {len(claims)} claims: " + ", ".join(f"{each} {told[each]}" for each in told) + ".",
        facts=provenance(result, results),
    )


def provenance(result: Mapping[str, Any], results: Results) -> dict[str, str]:
    """Where the figures come from."""
    machine, made, versions = result["machine"], result["commit"], result["versions"]
    names = ("selm_fast", "torch", "transformers", "python")
    return {
        "runs": f"{len(results.found['runs'])} reported, {len(results.found['tuning'])} for tuning",
        "seeds": f"{len(results.seeds)} reported, {len(results.grid['tuning_seeds'])} for tuning",
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "time": f"{result['seconds']} s, {result['workers']} processes" if result["seconds"] else "in several goes",
        "versions": ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name)),
        "made": f"{result['date']}, "
        + (f"commit {made['id'][:7]}" if made["id"] else f"sources {made['sources'][:7]}")
        + (" and changes" if made["dirty"] else ""),
    }
