"""Tables of other worlds and controls, and of how the results were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.exploration.analysis import LABELS, Kind, Results, Table, average, cell, plain, shown
from benchmarks.exploration.grid import DEFAULT_WORLD, ZERO_REWARD
from benchmarks.exploration.statistics import interval, paired
from selm_fast.report.numbers import number


def worlds(results: Results) -> Table:
    """Does it depend on the world? At DPO's best learning rate of the default one."""
    rows = []
    for name in results.world_names:
        dpo = results.at_dpos("dpo", 0.0, name)
        row = [name, results.grid["worlds"][name]["about"], average(results, dpo)]
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
        rows.append([*row, average(results, there, "held_out/kl")])
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
    base = results.found["base"]
    rows += [["entropy of the base model, nats", number(base["entropy"])]]
    rows += [["KL of the prior to the base model, nats", number(base["kl_of_prior"])]]
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
        f"best of a method is bold. {_edges(results)}".rstrip(),
        ["method", *(plain(lr) for lr in results.grid["lrs"])],
        rows,
    )


def _edges(results: Results) -> str:
    """Which of the chosen settings are the least or greatest that were tried: better ones may lie beyond."""
    found = []
    for method, alphas in results.grid["tuning_alphas"].items():
        at = results.tuned(method)
        for name, value, tried in (("alpha", at.alpha, alphas), ("learning rate", at.lr, results.grid["lrs"])):
            if len(tried) > 1 and value in (min(tried), max(tried)):
                which = "least" if value == min(tried) else "greatest"
                found.append(f"{LABELS[method]}'s {name} is the {which} that was tried")
    return f"{'; '.join(found)}." if found else ""


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > 3 and list(value) == [value[0] + place for place in range(len(value))]:
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(_setting, value))
    return plain(value) if isinstance(value, float) else str(value)
