"""What the paper says or suggests, as sentences that the results show or do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.exploration.analysis import Kind, Results, plain
from benchmarks.exploration.matched import at_equal_kl, at_equal_queries, dpo_at_every_rate, least
from benchmarks.exploration.statistics import NOT_SHOWN, Interval

PAPERS_ALPHA = 1e-3  # of its Zephyr and Phi-3; its Llama-3 has 1e-4
REWARD = "true reward, difference"


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that might be true, the figure that would show it, and on which side of 0 it would then lie.

    found: None where there are too few seeds that it can be computed of.
    """

    text: str
    measure: str
    found: Interval | None
    expected: str = "higher"

    @property
    def verdict(self) -> str:
        """Shown, the opposite shown, or not shown."""
        if self.found is None or self.found.verdict == NOT_SHOWN:
            return NOT_SHOWN
        return "shown" if self.found.verdict == self.expected else "the opposite is shown"


def all_claims(results: Results) -> list[Claim]:
    """What the paper says or suggests, and what might be said for or against it; each comparison once."""
    return [*_of_selm(results), *_of_terms(results), *_of_xpo(results), *_of_exploration(results)]


def _of_selm(results: Results) -> Iterator[Claim]:
    dpo, selm = results.dpo, results.tuned("selm")
    for alpha in results.few:
        text = f"At the learning rate that is best for DPO, SELM (alpha {plain(alpha)}) beats it"
        yield Claim(text, REWARD, results.difference(results.at_dpos("selm", alpha), dpo))
    if selm != results.at_dpos("selm", selm.alpha) or selm.alpha not in results.few:
        yield Claim("SELM beats DPO, each at its best settings", REWARD, results.difference(selm, dpo))
    others = [results.difference(selm, other) for other in dpo_at_every_rate(results)]
    text = "At its best settings, SELM beats DPO at each of its learning rates"
    yield Claim(text, f"{REWARD}, the least", least(others))
    for alpha in results.few:
        found, count = at_equal_kl(results, results.at_dpos("selm", alpha))
        measure = REWARD if count == len(results.seeds) else f"{REWARD}, {count} seeds"
        yield Claim(f"At equal KL to the base model, SELM (alpha {plain(alpha)}) beats DPO", measure, found)
    if PAPERS_ALPHA in results.grid["ablation"]:
        text = f"With the alpha of the paper's Zephyr and Phi-3, {plain(PAPERS_ALPHA)}, SELM beats DPO"
        yield Claim(text, REWARD, results.difference(results.at_dpos("selm", PAPERS_ALPHA), dpo))


def _of_terms(results: Results) -> Iterator[Claim]:
    for alpha in results.few:
        wrong = results.at_dpos("selm wrong sign", alpha)
        text = f"With the wrong sign (alpha {plain(alpha)}), the term does harm: it loses to DPO"
        yield Claim(text, REWARD, results.difference(wrong, results.dpo), "lower")
    for alpha in results.few:
        greedy = results.at_dpos("selm", alpha)
        for other, name in (("selm sampled", "a sample"), ("selm exact", "the exact expectation")):
            text = f"Pushing the greedy response down gives a higher reward than {name} (alpha {plain(alpha)})"
            yield Claim(text, REWARD, results.difference(greedy, results.at_dpos(other, alpha)))


def _of_xpo(results: Results) -> Iterator[Claim]:
    xpo = results.tuned("xpo")
    text = "XPO beats XPO without its term, at the same learning rate"
    yield Claim(text, REWARD, results.difference(xpo, Kind("xpo", 0.0, xpo.lr)))
    text = "After as many iterations, and fewer queries, XPO beats DPO, each at its best settings"
    yield Claim(text, REWARD, results.difference(xpo, results.dpo))
    others = [at_equal_queries(results, xpo, other)[1] for other in dpo_at_every_rate(results)]
    text = "After as many queries, and more steps, XPO beats DPO at each of its learning rates"
    yield Claim(text, f"{REWARD}, the least", least(others))


def _of_exploration(results: Results) -> Iterator[Claim]:
    for alpha in results.few:
        kind, named = results.at_dpos("selm", alpha), f"SELM (alpha {plain(alpha)})"
        found = results.difference(kind, results.dpo, "rollouts")
        yield Claim(f"{named} tries more different responses", "responses a prompt, difference", found)
        found = results.difference(kind, results.dpo, "best_seen")
        yield Claim(f"{named} comes upon more of the best responses", "share of prompts, difference", found)
        found = results.difference(kind, results.dpo, "train/entropy")
        yield Claim(f"{named} keeps more entropy", "nats, difference", found)
