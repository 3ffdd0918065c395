"""The charts of the page, drawn from the results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.exploration.analysis import Kind, Results, plain
from benchmarks.exploration.matched import at_equal_queries
from benchmarks.exploration.statistics import Interval, interval
from selm_fast.report.figures import Chart, XAxis, chart
from selm_fast.report.marks import Line, Mark, Panel, Points, Steps
from selm_fast.report.series import Series


def _main_kinds(results: Results) -> list[Kind]:
    return [results.dpo, *(results.at_dpos("selm", alpha) for alpha in results.few), results.tuned("xpo")]


def _over(results: Results, kind: Kind, name: str, xs: Sequence[float] | None = None) -> Series:
    """Means over the seeds by iteration, with intervals."""
    series = Series()
    for iteration in range(results.iterations + 1):
        _add(series, iteration if xs is None else xs[iteration], interval(results.of(kind, name, iteration)))
    return series


def _add(series: Series, x: float, found: Interval) -> None:
    series.add(x, found.mean, found.low, found.high)


def by_alpha(results: Results) -> Chart:
    """The paper's Fig. 3, left."""
    alphas = results.grid["ablation"]
    marks: list[Mark] = []
    names = {0.0: "DPO"} | {float(place): plain(alpha) for place, alpha in enumerate(alphas, 1)}
    for look, (part, name) in enumerate((("held_out", "held-out prompts"), ("train", "training prompts"))):
        series = Series()
        for place, kind in enumerate([results.dpo, *(results.at_dpos("selm", alpha) for alpha in alphas)]):
            _add(series, place, interval(results.of(kind, f"{part}/reward")))
        marks.append(Points(look, name, series, shift=0.12 * look - 0.06, joined=True))
    differences: list[Mark] = []
    for look, part in enumerate(("held_out", "train")):
        series = Series()
        for place, alpha in enumerate(alphas, 1):
            _add(series, place, results.difference(results.at_dpos("selm", alpha), results.dpo, f"{part}/reward"))
        differences.append(Points(look, "", series, shift=0.12 * look - 0.06, joined=True))
    return chart(
        "True reward by alpha",
        f"After the last iteration, learning rate {plain(results.dpo.lr)} (the paper's Fig. 3, left). Bars are 95% "
        "intervals; those of the differences are paired.",
        [Panel("true reward, share of the highest", marks), Panel("less DPO's", differences, level=0)],
        XAxis(label="alpha", names=names),
    )


def by_iteration(results: Results) -> Chart:
    """Means by iteration."""
    panels = []
    for part, name in (("held_out", "held-out prompts"), ("train", "training prompts")):
        marks: list[Mark] = [
            Line(look, kind.label, _over(results, kind, f"{part}/reward"))
            for look, kind in enumerate(_main_kinds(results))
        ]
        panels.append(Panel(name, marks))
    return chart(
        "True reward by iteration",
        f"Share of the highest; DPO and SELM at learning rate {plain(results.dpo.lr)}, XPO at its own. Bands are 95% "
        "intervals over worlds, not of differences.",
        panels,
        XAxis(label="iteration", whole=True),
    )


def differences(results: Results) -> Chart:
    """What each term adds, paired."""
    panels = []
    for method, title in (
        ("selm", "greedy y"), ("selm sampled", "sampled y"), ("selm exact", "exact expectation"),
        ("selm wrong sign", "greedy y, wrong sign"),
    ):  # fmt: skip
        marks: list[Mark] = []
        for look, alpha in enumerate(results.few):
            series = Series()
            for iteration in range(results.iterations + 1):
                found = results.difference(results.at_dpos(method, alpha), results.dpo, "held_out/reward", iteration)
                _add(series, iteration, found)
            marks.append(Line(look, f"alpha {plain(alpha)}", series))
        panels.append(Panel(title, marks, level=0))
    return chart(
        "True reward less DPO's, by iteration",
        "Held-out prompts, paired by seed; bands are 95% intervals. Where a band includes 0, nothing is shown.",
        panels,
        XAxis(label="iteration", whole=True),
        panel_height=110,
    )


def by_query(results: Results) -> Chart:
    """Reward by what it cost to ask."""
    marks: list[Mark] = []
    differences: list[Mark] = []
    for look, kind in enumerate(_main_kinds(results)):
        asked = [interval(results.of(kind, "queries", n)).mean for n in range(results.iterations + 1)]
        marks.append(Line(look, kind.label, _over(results, kind, "held_out/reward", asked)))
        if kind != results.dpo:
            series = Series()
            for place in range(results.iterations + 1):
                _add(series, *at_equal_queries(results, kind, results.dpo, place / results.iterations))
            differences.append(Line(look, "", series))
    return chart(
        "True reward by preference query",
        "Held-out prompts. A query is a pair of responses that the annotator compared: up to three a prompt and "
        "iteration, one for XPO. Differences are paired, after as many queries; bands are 95% intervals.",
        [Panel("true reward, share of the highest", marks), Panel("less DPO's", differences, level=0)],
        XAxis(label="queries a prompt"),
    )


def _histogram(results: Results, kind: Kind, iteration: int) -> list[float]:
    counts = next(
        line["counts"][iteration]
        for line in results.found["histograms"]
        if (line["method"], line["alpha"], line["lr"]) == (kind.method, kind.alpha, kind.lr)
    )
    return [each / sum(counts) for each in counts]


def histograms_by_alpha(results: Results) -> Chart:
    """The paper's Fig. 3, middle."""
    kinds = [results.dpo, *(results.at_dpos("selm", alpha) for alpha in results.grid["ablation"])]
    panels = []
    for look, kind in enumerate(kinds):
        mean = interval(results.of(kind, "held_out/greedy")).mean
        marks: list[Mark] = [Steps(look, kind.label, results.found["bins"], _histogram(results, kind, -1), mean)]
        panels.append(Panel(kind.label, marks, percent=True))
    return chart(
        "Rewards of greedy responses by alpha",
        "Held-out prompts of all seeds after the last iteration, over the mean of the highest rewards (the paper's "
        "Fig. 3, middle); dashed: the mean.",
        panels,
        XAxis(label="true reward"),
        panel_height=70,
    )


def histograms_by_iteration(results: Results) -> Chart:
    """The paper's Fig. 3, right."""
    panels = []
    kinds = (results.dpo, results.at_dpos("selm", results.few[0]))
    for iteration in sorted({0, 1, results.iterations // 2, results.iterations}):
        marks: list[Mark] = []
        for look, kind in enumerate(kinds):
            mean = interval(results.of(kind, "held_out/greedy", iteration)).mean
            heights = _histogram(results, kind, iteration)
            marks.append(Steps(look, kind.label, results.found["bins"], heights, mean, filled=look == 0))
        panels.append(Panel(f"iteration {iteration}" if iteration else "base model", marks, percent=True))
    return chart(
        "Rewards of greedy responses by iteration",
        "Held-out prompts of all seeds (the paper's Fig. 3, right); dashed: the means.",
        panels,
        XAxis(label="true reward"),
        panel_height=90,
    )


def implicit(results: Results) -> Chart:
    """The paper's Fig. 4."""
    panels = []
    for line in results.found["implicit"]:
        if line["alpha"] not in results.few:
            continue
        marks: list[Mark] = []
        for look, role in enumerate(("chosen", "rejected")):
            series, quantiles = Series(), line[role]["sorted"]
            for place, value in enumerate(quantiles):
                series.add(100 * place / (len(quantiles) - 1), value)
            marks.append(Line(look, role, series))
        panels.append(Panel(f"alpha {plain(line['alpha'])}", marks, level=0))
    return chart(
        "Implicit reward, SELM less DPO",
        "beta (log pi_SELM - log pi_DPO) after the last iteration, on held-out prompts' offline responses of all "
        "seeds, sorted (the paper's Fig. 4).",
        panels,
        XAxis(label="responses, %"),
    )


def what_is_explored(results: Results) -> Chart:
    """KL, entropy, responses tried, best responses seen."""
    panels = []
    for name, title in (
        ("train/kl", "KL to the base model, nats"), ("train/entropy", "entropy, nats"),
        ("rollouts", "different responses of its own, a prompt"), ("best_seen", "best response seen, share of prompts"),
    ):  # fmt: skip
        marks: list[Mark] = [
            Line(look, kind.label, _over(results, kind, name)) for look, kind in enumerate(_main_kinds(results))
        ]
        panels.append(Panel(title, marks, percent=name == "best_seen"))
    return chart(
        "What is explored",
        "Training prompts, by iteration; bands are 95% intervals over worlds.",
        panels,
        XAxis(label="iteration", whole=True),
        panel_height=110,
    )


def reward_and_kl(results: Results) -> Chart:
    """Reward at a distance from the base model, and the most there is."""
    best, dpo = Series(), Series()
    for point in results.found["best_policies"]:
        best.add(point["kl"], point["reward"])
    for lr in results.grid["lrs"]:
        kind = Kind("dpo", 0.0, lr)
        _add(dpo, interval(results.of(kind, "held_out/kl")).mean, interval(results.of(kind, "held_out/reward")))
    marks: list[Mark] = [Line(5, "KL-regularised optimum", best), Points(0, "DPO, by learning rate", dpo, joined=True)]
    others = [results.at_dpos("selm", alpha) for alpha in results.few]
    others += [results.at_dpos("selm wrong sign", results.few[0]), results.tuned("xpo")]
    for look, kind in enumerate(others, 1):
        series = Series()
        _add(series, interval(results.of(kind, "held_out/kl")).mean, interval(results.of(kind, "held_out/reward")))
        marks.append(Points(look, kind.label, series))
    return chart(
        "True reward and KL to the base model",
        "Held-out prompts, means over the seeds after the last iteration. The optimum is that of the base models.",
        [Panel("true reward, share of the highest", marks)],
        XAxis(label="KL to the base model, nats"),
        panel_height=220,
    )


def worlds(results: Results) -> Chart:
    """SELM less DPO in every world."""
    panels = []
    names = results.world_names
    for alpha in results.few:
        series = Series()
        for place, world in enumerate(names):
            dpo = results.at_dpos("dpo", 0.0, world)
            _add(series, place, results.difference(results.at_dpos("selm", alpha, world), dpo))
        marks: list[Mark] = [Points(0, "SELM less DPO", series)]
        panels.append(Panel(f"alpha {plain(alpha)}", marks, level=0))
    listed = "; ".join(f"{place + 1}: {name}" for place, name in enumerate(names))
    return chart(
        "True reward less DPO's, in other worlds",
        f"Held-out prompts, paired by seed, 95% intervals. {listed}.",
        panels,
        XAxis(label="world", names={float(place): str(place + 1) for place in range(len(names))}),
        panel_height=110,
    )


CHARTS: Mapping[str, Callable[[Results], Chart]] = {
    "alpha": by_alpha,
    "iterations": by_iteration,
    "differences": differences,
    "queries": by_query,
    "histograms-alpha": histograms_by_alpha,
    "histograms-iteration": histograms_by_iteration,
    "implicit": implicit,
    "exploration": what_is_explored,
    "kl": reward_and_kl,
    "worlds": worlds,
}


def described(drawn: Chart) -> str:
    """What a chart shows, in words and numbers: by it a file is known to be up to date, whatever drew it."""
    return f"<desc>{escape(drawn.summary)}</desc>"


def svg(drawn: Chart, palette: Sequence[tuple[str, str]]) -> str:
    """A chart as a file of its own, on white; its legend is below it."""
    colours: dict[str, Any] = {f"--s{nth}": light for nth, (light, _) in enumerate(palette)}
    colours |= {"--grid": "#d9dde2", "--paper": "#ffffff"}
    style = ";".join(f"{name}:{value}" for name, value in colours.items())
    rows = []
    top = drawn.height
    for nth, key in enumerate(drawn.keys):
        y = top + 16 + 18 * nth
        dash = f' stroke-dasharray="{" ".join(map(str, key.style.dash))}"' if key.style.dash else ""
        rows.append(
            f'<g style="color:var({key.style.variable})"><path d="M10 {y - 4}h28" stroke="currentColor" '
            f'stroke-width="2"{dash}/><g transform="translate(10 {y - 10})"><path d="{key.style.outline}" '
            f'fill="currentColor"/></g></g><text x="46" y="{y}" fill="currentColor">{key.name}</text>'
        )
    height = top + 18 * len(drawn.keys) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{drawn.width}" '
        f'height="{height:g}" viewBox="0 0 {drawn.width} {height:g}" font-family="system-ui, sans-serif" '
        f'font-size="12" style="color:#1c2530;background:#ffffff;{style}"><title>{drawn.title}</title>'
        f"{described(drawn)}{drawn.body}{''.join(rows)}</svg>\n"
    )
