"""What the results say: tables whose every cell is computed from the results file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.exploration.grid import DEFAULT_WORLD, ZERO_REWARD
from benchmarks.exploration.statistics import NOT_SHOWN, Interval, at, interval, paired
from selm_fast.report.numbers import ABSENT, MINUS, alike, number

LABELS = {
    "dpo": "DPO",
    "selm": "SELM",
    "selm sampled": "SELM, sampled y",
    "selm exact": "SELM, exact expectation",
    "selm wrong sign": "SELM, wrong sign",
    "xpo": "XPO",
}


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """Runs that differ in their seeds alone."""

    method: str
    alpha: float
    lr: float
    world: str = DEFAULT_WORLD

    @property
    def label(self) -> str:
        """As tables and charts name it, but for the learning rate."""
        return LABELS[self.method] if self.method == "dpo" else f"{LABELS[self.method]}, alpha {plain(self.alpha)}"


@dataclass(frozen=True, slots=True)
class Table:
    """Of texts. name: of its place in the document."""

    name: str
    title: str
    about: str
    head: list[str]
    rows: list[list[str]]


class Results:
    """The `exploration` part of a results file."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.grid = found["grid"]
        self.seeds: list[int] = list(self.grid["seeds"])
        self.few: list[float] = list(self.grid["few"])
        self.dpo = self.tuned("dpo")
        self._runs: dict[tuple[Kind, int], Mapping[str, Any]] = {
            (Kind(run["method"], run["alpha"], run["lr"], run["world"]), run["seed"]): run for run in found["runs"]
        }

    def tuned(self, method: str) -> Kind:
        """A method at the alpha and learning rate that were best on the tuning seeds."""
        return Kind(method, **self.found["tuned"][method])

    def at_dpos(self, method: str, alpha: float, world: str = DEFAULT_WORLD) -> Kind:
        """A method at the learning rate that was best for DPO."""
        return Kind(method, alpha, self.dpo.lr, world)

    def of(self, kind: Kind, name: str, iteration: int = -1) -> list[float]:
        """A figure after an iteration, by seed. name: "train/reward", "queries", ..."""
        values = []
        for seed in self.seeds:
            value: Any = self._runs[kind, seed]
            for part in name.split("/"):
                value = value[part]
            values.append(value[iteration])
        return values

    def difference(self, kind: Kind, other: Kind, name: str = "held_out/reward", iteration: int = -1) -> Interval:
        """Paired, over the seeds."""
        return paired(self.of(kind, name, iteration), self.of(other, name, iteration))

    @property
    def iterations(self) -> int:
        """Of each run of the default world."""
        return self.grid["worlds"][DEFAULT_WORLD]["training"]["iterations"]  # type: ignore[no-any-return]

    @property
    def world_names(self) -> list[str]:
        """All but that of the zero-reward control."""
        return [name for name in self.grid["worlds"] if name != ZERO_REWARD]


def plain(setting: float) -> str:
    """A setting as one writes it: 0.004, 0.1, 1."""
    return f"{setting:g}"


def cell(found: Interval, *, signed: bool = True) -> str:
    """A mean and its interval: +0.031 (0.012 to 0.050)."""
    mean, low, high = alike(found.mean, found.low, found.high)
    plus = "+" if signed and not mean.startswith(MINUS) else ""
    return f"{plus}{mean} ({low} to {high})"


def shown(found: Interval) -> str:
    """The verdict in words."""
    return found.verdict if found.verdict == NOT_SHOWN else f"shown: {found.verdict}"


def tables(results: Results) -> list[Table]:
    """Every table, in the order of the page."""
    return [
        claims(results), ablation(results), terms(results), best(results), rates(results), equal_kl(results),
        worlds(results), control(results), implicit(results), setup(results), tuning(results),
    ]  # fmt: skip


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
    for alpha in results.few:
        kind, named = results.at_dpos("selm", alpha), f"SELM (alpha {plain(alpha)})"
        found = results.difference(kind, dpo, "best_seen")
        yield Claim(f"{named} finds more of the best responses", "share of prompts, difference", found)
        found = results.difference(kind, dpo, "rollouts")
        yield Claim(f"{named} tries more different responses", "responses a prompt, difference", found)
        found = results.difference(kind, dpo, "train/entropy")
        yield Claim(f"{named} keeps more entropy", "nats, difference", found)


def claims(results: Results) -> Table:
    """The claims and what became of them."""
    rows = [[claim.text, claim.measure, cell(claim.found), claim.verdict] for claim in all_claims(results)]
    return Table(
        "claims",
        "What holds, and what does not",
        f"Each difference is paired over {len(results.seeds)} seeds that nothing was tuned on. Shown is what lies on "
        "the claimed side of 0 with its whole 95% interval; one interval in 20 excludes 0 by chance.",
        ["claim", "measure", "mean (95% interval)", "verdict"],
        rows,
    )


def ablation(results: Results) -> Table:
    """By alpha, as in Fig. 3 (left) of the paper; negative: the wrong sign."""
    kinds = [results.dpo, *(results.at_dpos("selm", alpha) for alpha in results.grid["ablation"])]
    kinds = [*(results.at_dpos("selm wrong sign", alpha) for alpha in reversed(results.few)), *kinds]
    rows = []
    for kind in kinds:
        figures = [number(interval(results.of(kind, name)).mean) for name in ("held_out/kl", "held_out/entropy")]
        of_prompts = [number(interval(results.of(kind, name)).mean) for name in ("rollouts", "best_seen")]
        found = results.difference(kind, results.dpo)
        against = [ABSENT, ABSENT, ABSENT]
        if kind != results.dpo:
            on_training = cell(results.difference(kind, results.dpo, "train/reward"))
            against = [cell(found), shown(found), on_training]
        rows.append([kind.label, _mean(results, kind), *against, *figures, *of_prompts])
    return Table(
        "alpha",
        "By alpha",
        f"After the last iteration, at learning rate {plain(results.dpo.lr)}, DPO's best. The true reward is a share "
        "of the highest there is.",
        [
            "method", "true reward", "to DPO", "", "to DPO, on training prompts", "KL to base", "entropy",
            "different rollouts", "best response seen",
        ],
        rows,
    )  # fmt: skip


def terms(results: Results) -> Table:
    """The four terms at equal alphas."""
    rows = []
    for alpha in results.few:
        greedy = results.at_dpos("selm", alpha)
        for method in ("selm", "selm sampled", "selm exact", "selm wrong sign"):
            kind = results.at_dpos(method, alpha)
            to_dpo = results.difference(kind, results.dpo)
            to_greedy = results.difference(kind, greedy)
            own = [cell(to_greedy), shown(to_greedy)] if kind != greedy else [ABSENT, ABSENT]
            rows.append([kind.label, _mean(results, kind), cell(to_dpo), shown(to_dpo), *own])
    return Table(
        "terms",
        "Which response is pushed down",
        "All ask about the same candidates and differ in the term alone.",
        ["method", "true reward", "to DPO", "", "to SELM with greedy y", ""],
        rows,
    )


def best(results: Results) -> Table:
    """Methods at their best settings."""
    xpo = results.tuned("xpo")
    kinds = [*(results.tuned(method) for method in results.found["tuned"]), Kind("xpo", 0.0, xpo.lr)]
    rows = []
    for kind in kinds:
        found = results.difference(kind, results.dpo)
        against = [cell(found), shown(found)] if kind != results.dpo else [ABSENT, ABSENT]
        queries = number(interval(results.of(kind, "queries")).mean)
        rows.append([kind.label, plain(kind.lr), _mean(results, kind), *against, queries])
    return Table(
        "best",
        "Each method at its best settings",
        "Alpha and learning rate are those with the highest reward on the tuning seeds. A query is a pair that the "
        "annotator compared.",
        ["method", "learning rate", "true reward", "to DPO", "", "queries a prompt"],
        rows,
    )


def rates(results: Results) -> Table:
    """SELM against DPO at DPO's best learning rate and beside it."""
    rows = []
    for lr in results.grid["lrs"]:
        dpo = Kind("dpo", 0.0, lr)
        row = [
            plain(lr),
            _mean(results, dpo),
            _mean(results, dpo, "held_out/kl"),
            _mean(results, dpo, "held_out/entropy"),
        ]
        for alpha in results.few:
            kind = Kind("selm", alpha, lr)
            there = (kind, results.seeds[0]) in results._runs
            found = results.difference(kind, dpo) if there else None
            row += [cell(found), shown(found)] if found else [ABSENT, ABSENT]
        rows.append(row)
    head = ["learning rate", "DPO: true reward", "KL to base", "entropy"]
    for alpha in results.few:
        head += [f"SELM, alpha {plain(alpha)}, to DPO", ""]
    return Table("rates", "By learning rate", "", head, rows)


def at_equal_kl(results: Results, kind: Kind) -> tuple[Interval | None, int]:
    """Reward minus that of DPO at the same KL to the base model, seed by seed, and how many seeds have one.

    DPO's is read off the line through its runs of that seed at all learning rates, after as many iterations and
    queries; a seed where SELM is outside of that line is left out.
    """
    lines = [Kind("dpo", 0.0, lr) for lr in results.grid["lrs"]]
    kls, rewards = ([results.of(line, f"held_out/{name}") for line in lines] for name in ("kl", "reward"))
    # Before any training KL and difference are nothing: the line begins at the base model.
    start = results.of(results.dpo, "held_out/reward", 0)
    differences = []
    own = zip(results.of(kind, "held_out/kl"), results.of(kind, "held_out/reward"), strict=True)
    for nth, (kl, reward) in enumerate(own):
        beside = at(kl, [0.0, *(each[nth] for each in kls)], [start[nth], *(each[nth] for each in rewards)])
        if beside is not None:
            differences.append(reward - beside)
    return (interval(differences) if len(differences) > 1 else None), len(differences)


def equal_kl(results: Results) -> Table:
    """SELM against DPO at equal distance from the base model."""
    kinds = [results.at_dpos("selm", alpha) for alpha in results.grid["ablation"]]
    kinds += [results.at_dpos(method, alpha) for method in ("selm wrong sign", "selm sampled") for alpha in results.few]
    rows = []
    for kind in [*kinds, results.tuned("xpo")]:
        found, count = at_equal_kl(results, kind)
        shares = [cell(found), shown(found)] if found is not None else [ABSENT, ABSENT]
        rows.append([kind.label, _mean(results, kind, "held_out/kl"), *shares, str(count)])
    return Table(
        "equal-kl",
        "At equal KL to the base model",
        "DPO's reward at the same KL is read off the line through its runs at all learning rates, seed by seed. Seeds "
        "where that line does not reach are left out.",
        ["method", "KL to base", "to DPO at that KL", "", "seeds"],
        rows,
    )


def worlds(results: Results) -> Table:
    """Does it depend on the world? At DPO's best learning rate of the default one."""
    rows = []
    for name in results.world_names:
        dpo = results.at_dpos("dpo", 0.0, name)
        row = [name, results.grid["worlds"][name]["about"], _mean(results, dpo)]
        for alpha in results.few:
            found = results.difference(results.at_dpos("selm", alpha, name), dpo)
            row += [cell(found), shown(found)]
        rows.append(row)
    head = ["world", "what is different", "DPO: true reward"]
    for alpha in results.few:
        head += [f"SELM, alpha {plain(alpha)}, to DPO", ""]
    return Table(
        "worlds", "In other worlds", "At the learning rate that is DPO's best in the default world.", head, rows
    )


def control(results: Results) -> Table:
    """The zero-reward control: what a trainer makes of labels that say nothing."""
    rows = []
    for kind in (Kind("dpo", 0.0, results.dpo.lr), *(results.at_dpos("selm", alpha) for alpha in results.few)):
        there = Kind(kind.method, kind.alpha, kind.lr, ZERO_REWARD)
        row = [kind.label]
        for part in ("train", "held_out"):
            found = paired(results.of(there, f"{part}/reward"), results.of(there, f"{part}/reward", 0))
            row += [cell(found), {"higher": "drifts up", "lower": "drifts down"}.get(found.verdict, "no drift shown")]
        rows.append([*row, _mean(results, there, "held_out/kl")])
    return Table(
        "control",
        "Where the annotator tosses coins",
        "The true reward after the last iteration, less that of the base model: labels without meaning should not "
        "change it.",
        ["method", "training prompts", "", "held-out prompts", "", "KL to base"],
        rows,
    )


def implicit(results: Results) -> Table:
    """r_SELM - r_DPO on held-out chosen and rejected responses: the paper's Fig. 4 in numbers."""
    rows = []
    for line in results.found["implicit"]:
        row = [f"SELM, alpha {plain(line['alpha'])}"]
        for role in ("chosen", "rejected"):
            found = interval(line[role]["means"])
            row += [cell(found), shown(found)]
        margin = paired(line["chosen"]["means"], line["rejected"]["means"])
        rows.append([*row, cell(margin), shown(margin)])
    return Table(
        "implicit",
        "Implicit rewards, SELM less DPO",
        "beta times log-prob over the base model's, of held-out prompts' offline responses as the annotator orders "
        "them; means by seed. A rising margin would say that SELM tells chosen from rejected better.",
        ["method", "on chosen", "", "on rejected", "", "margin", ""],
        rows,
    )


def setup(results: Results) -> Table:
    """Every setting of the default world and of the grid."""
    world = results.grid["worlds"][DEFAULT_WORLD]
    settings = world["settings"] | world["training"]
    rows = [[name.replace("_", " "), _setting(value)] for name, value in settings.items()]
    grid = ("tuning_seeds", "seeds", "lrs", "ablation", "few", "base_steps")
    rows += [[name.replace("_", " "), _setting(results.grid[name])] for name in grid]
    rows += [[f"tuning alphas, {method}", _setting(alphas)] for method, alphas in results.grid["tuning_alphas"].items()]
    return Table("setup", "Settings", "", ["setting", "value"], rows)


def tuning(results: Results) -> Table:
    """What was tried on the tuning seeds."""
    by_kind: dict[tuple[str, float], dict[float, list[float]]] = {}
    for run in results.found["tuning"]:
        by_kind.setdefault((run["method"], run["alpha"]), {}).setdefault(run["lr"], []).append(run["reward"])
    rows = []
    for (method, alpha), by_lr in by_kind.items():
        chosen = results.tuned(method)
        cells = []
        for lr, rewards in by_lr.items():
            text = number(interval(rewards).mean)
            cells.append(f"**{text}**" if (alpha, lr) == (chosen.alpha, chosen.lr) else text)
        rows.append([Kind(method, alpha, 0.0).label, *cells])
    return Table(
        "tuning",
        "Tuning",
        f"Mean true reward over {len(results.grid['tuning_seeds'])} seeds that are not reported, by learning rate; the "
        "best of a method is bold.",
        ["method", *(plain(lr) for lr in results.grid["lrs"])],
        rows,
    )


def _mean(results: Results, kind: Kind, name: str = "held_out/reward") -> str:
    return number(interval(results.of(kind, name)).mean)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > 3 and list(value) == list(range(value[0], value[-1] + 1)):
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(_setting, value))
    return plain(value) if isinstance(value, float) else str(value)
