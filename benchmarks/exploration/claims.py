"""What the paper says or suggests, as sentences that the results show or do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.exploration.analysis import Kind, Results, plain
from benchmarks.exploration.matched import at_equal_kl, at_equal_queries
from benchmarks.exploration.statistics import NOT_SHOWN, Interval


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that might be true, the figure that would show it, and on which side of 0 it would then lie."""

    text: str
    measure: str
    found: Interval
    expected: str = "higher"

    @property
    def verdict(self) -> str:
        """Shown, the opposite shown, or not shown."""
        if self.found.verdict == NOT_SHOWN:
            return NOT_SHOWN
        return "shown" if self.found.verdict == self.expected else "the opposite is shown"


def all_claims(results: Results) -> Iterator[Claim]:
    """What the paper says or suggests, and what was known of tabular policies."""
    dpo, xpo, selm = results.dpo, results.tuned("xpo"), results.tuned("selm")
    reward = "true reward, difference"
    for alpha in results.few:
        text = f"At DPO's best learning rate, SELM (alpha {plain(alpha)}) beats DPO"
        yield Claim(text, reward, results.difference(results.at_dpos("selm", alpha), dpo))
    yield Claim("SELM beats DPO, both at their best settings", reward, results.difference(selm, dpo))
    text = "At its best settings, SELM beats DPO at the same learning rate"
    yield Claim(text, reward, results.difference(selm, Kind("dpo", 0.0, selm.lr)))
    for alpha in results.few:
        found, _ = at_equal_kl(results, results.at_dpos("selm", alpha))
        if found is not None:
            yield Claim(f"At equal KL to the base model, SELM (alpha {plain(alpha)}) beats DPO", reward, found)
    least = min(results.grid["ablation"])
    if least < min(results.few):
        text = f"With the paper's alpha of {plain(least)}, SELM beats DPO"
        yield Claim(text, reward, results.difference(results.at_dpos("selm", least), dpo))
    alpha = results.few[0]
    greedy = results.at_dpos("selm", alpha)
    for alpha in results.few:
        wrong = results.at_dpos("selm wrong sign", alpha)
        text = f"With the wrong sign (alpha {plain(alpha)}), the term does harm: it loses to DPO"
        yield Claim(text, reward, results.difference(wrong, dpo), "lower")
    alpha = results.few[0]
    for other, name in (("selm sampled", "a sample"), ("selm exact", "the exact expectation")):
        text = f"The greedy response explores better than {name} (alpha {plain(alpha)})"
        yield Claim(text, reward, results.difference(greedy, results.at_dpos(other, alpha)))
    yield Claim("XPO beats XPO without its term", reward, results.difference(xpo, Kind("xpo", 0.0, xpo.lr)))
    yield Claim("XPO beats DPO, both at their best settings", reward, results.difference(xpo, dpo))
    _, found = at_equal_queries(results, xpo)
    yield Claim("After as many queries, XPO beats DPO", reward, found)
    for alpha in results.few:
        kind, named = results.at_dpos("selm", alpha), f"SELM (alpha {plain(alpha)})"
        found = results.difference(kind, dpo, "best_seen")
        yield Claim(f"{named} finds more of the best responses", "share of prompts, difference", found)
        found = results.difference(kind, dpo, "rollouts")
        yield Claim(f"{named} tries more different responses", "responses a prompt, difference", found)
        found = results.difference(kind, dpo, "train/entropy")
        yield Claim(f"{named} keeps more entropy", "nats, difference", found)
