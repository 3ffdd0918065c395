"""Tables of the page, whose every cell is computed from the results file: methods against DPO."""

from __future__ import annotations

from benchmarks.exploration.analysis import Kind, Results, Table, average, cell, plain, shown
from benchmarks.exploration.claims import all_claims
from benchmarks.exploration.matched import at_equal_kl, at_equal_queries, dpo_at_every_rate, least
from benchmarks.exploration.statistics import NOT_SHOWN, interval
from benchmarks.exploration.tables_about import control, implicit, setup, tuning, worlds
from selm_fast.report.numbers import ABSENT, number


def tables(results: Results) -> list[Table]:
    """Every table, in the order of the page."""
    every = (claims, ablation, terms, best, equal_queries, rates, equal_kl, worlds, control, implicit, setup, tuning)
    return [table(results) for table in every]


def claims(results: Results) -> Table:
    """The claims and what became of them."""
    rows = [
        [claim.text, claim.measure, cell(claim.found) if claim.found else ABSENT, claim.verdict]
        for claim in all_claims(results)
    ]
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
        rows.append([kind.label, average(results, kind), *against, *figures, *of_prompts])
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
            rows.append([kind.label, average(results, kind), cell(to_dpo), shown(to_dpo), *own])
    return Table(
        "terms",
        "Which response is pushed down",
        "All ask by the same rule and differ in the term alone.",
        ["method", "true reward", "to DPO", "", "to SELM with greedy y", ""],
        rows,
    )


def best(results: Results) -> Table:
    """Methods at their best settings."""
    xpo = results.tuned("xpo")
    kinds = [*(results.tuned(method) for method in results.found["tuned"]), Kind("xpo", 0.0, xpo.lr)]
    others = dpo_at_every_rate(results)
    rows = []
    for kind in kinds:
        against = [ABSENT] * 4
        if kind != results.dpo:
            found = results.difference(kind, results.dpo)
            lowest = least(results.difference(kind, other) for other in others)
            against = [cell(found), shown(found), cell(lowest), shown(lowest)]
        name = kind.label if kind.alpha or kind == results.dpo else "XPO without its term"
        queries = number(interval(results.of(kind, "queries")).mean)
        rows.append([name, plain(kind.lr), average(results, kind), *against, queries])
    return Table(
        "best",
        "Each method at its best settings",
        "Alpha and learning rate are those with the highest reward on the tuning seeds; XPO without its term has XPO's "
        "rate. DPO at any rate: the least of the differences to it at each of its learning rates.",
        [
            "method",
            "learning rate",
            "true reward",
            "to DPO at its best",
            "",
            "to DPO at any rate",
            "",
            "queries a prompt",
        ],
        rows,
    )


def rates(results: Results) -> Table:
    """SELM against DPO at DPO's best learning rate and beside it."""
    rows = []
    for lr in results.grid["lrs"]:
        dpo = Kind("dpo", 0.0, lr)
        row = [
            plain(lr),
            average(results, dpo),
            average(results, dpo, "held_out/kl"),
            average(results, dpo, "held_out/entropy"),
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


def equal_queries(results: Results) -> Table:
    """Every method against DPO after as many queries."""
    xpo = results.tuned("xpo")
    kinds = [results.at_dpos("selm", alpha) for alpha in results.few]
    kinds += [results.tuned(method) for method in results.found["tuned"] if method != "dpo"]
    rows = []
    for kind in dict.fromkeys([*kinds, Kind("xpo", 0.0, xpo.lr)]):
        queries, found = at_equal_queries(results, kind, results.dpo)
        lowest = least(at_equal_queries(results, kind, other)[1] for other in dpo_at_every_rate(results))
        name = kind.label if kind.alpha else "XPO without its term"
        compared = [cell(found), shown(found), cell(lowest), shown(lowest)]
        rows.append([name, plain(kind.lr), number(queries), *compared])
    return Table(
        "queries",
        "After as many queries",
        "A query is a pair that the annotator compared. Rewards are read off the lines through the iterations, seed by "
        "seed, at the queries that both methods have asked; where one asks less in an iteration, it has then trained "
        "for more steps.",
        ["method", "learning rate", "queries a prompt", "to DPO at its best", "", "to DPO at any rate", ""],
        rows,
    )


def equal_kl(results: Results) -> Table:
    """SELM against DPO at equal distance from the base model."""
    kinds = [results.dpo, *(results.at_dpos("selm", alpha) for alpha in results.grid["ablation"])]
    kinds += [results.at_dpos(method, alpha) for method in ("selm wrong sign", "selm sampled") for alpha in results.few]
    rows = []
    for kind in [*kinds, results.tuned("xpo")]:
        found, count = at_equal_kl(results, kind)
        compared = [cell(found), shown(found)] if found is not None else [ABSENT, NOT_SHOWN]
        rows.append([kind.label, average(results, kind, "held_out/kl"), *compared, str(count)])
    return Table(
        "equal-kl",
        "At equal KL to the base model",
        "DPO's reward at the same KL is read off the line through the base model and DPO's runs at all learning rates, "
        "seed by seed, over the root of the KL. Seeds that are beyond that line are left out. The first row is the "
        "method's own error: DPO against the line through its other runs, where nothing should be shown.",
        ["method", "KL to base", "to DPO at that KL", "", "seeds"],
        rows,
    )
