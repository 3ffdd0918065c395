"""What the page and the document show is what the committed results say, computed here in another way."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from benchmarks import machine
from benchmarks.exploration import __main__ as command
from benchmarks.exploration import document, figures, page, results
from benchmarks.exploration.analysis import Results
from benchmarks.exploration.environment import Floats
from benchmarks.exploration.grid import DEFAULT
from benchmarks.exploration.matched import at_equal_kl
from benchmarks.exploration.tables import tables
from tests.report.document import Element, parse

T_19 = 2.0930  # 97.5% quantile of Student's t with 19 degrees of freedom, from a published table
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
Key = tuple[str, str, float, float]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return results.read(machine.ROOT / results.DEFAULT_PATH)


@pytest.fixture(scope="module")
def runs(result: Mapping[str, Any]) -> dict[Key, list[Any]]:
    """By world, method, alpha and learning rate: the runs in the order of their seeds."""
    found: dict[Key, list[Any]] = defaultdict(list)
    for run in sorted(result["exploration"]["runs"], key=lambda run: run["seed"]):
        found[run["world"], run["method"], run["alpha"], run["lr"]].append(run)
    return found


@pytest.fixture(scope="module")
def shown(result: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The rows of each table of the page, by the table's id."""
    root = parse(page.render(result))
    return {
        str(table.attributes["id"]): [
            [cell.words for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")[1:]
        ]
        for table in root.all("table")
    }


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]


def check_cell(text: str, *values: float) -> None:
    """A cell shows these numbers, to half of their last digits."""
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    assert len(found) == len(values), text
    for shown_as, value in zip(found, values, strict=True):
        decimals = len(shown_as.partition(".")[2])
        assert abs(float(shown_as.replace(",", "")) - value) <= 0.5001 * 10**-decimals, (text, value)


def last(found: list[Any], *names: str) -> Floats:
    values = []
    for run in found:
        for name in names:
            run = run[name]
        values.append(run[-1])
    return np.array(values)


def interval(values: Floats) -> tuple[float, float, float]:
    assert len(values) == 20
    half = T_19 * values.std(ddof=1) / np.sqrt(20)
    return values.mean(), values.mean() - half, values.mean() + half


def check_verdict(text: str, found: tuple[float, float, float]) -> None:
    _, low, high = found
    assert text == ("shown: higher" if low > 0 else "shown: lower" if high < 0 else "not shown")


def key_of(label: str, lr: float, world: str = "default") -> Key:
    name, _, alpha = label.partition(", alpha ")
    names = {
        "DPO": "dpo", "SELM": "selm", "SELM, sampled y": "selm sampled", "SELM, exact expectation": "selm exact",
        "SELM, wrong sign": "selm wrong sign", "XPO": "xpo", "XPO without its term": "xpo",
    }  # fmt: skip
    return world, names[name], float(alpha or 0), lr


def test_results_are_of_the_whole_grid_and_nothing_reported_was_tuned_on(result: Mapping[str, Any]) -> None:
    found = result["exploration"]
    assert found["grid"] == json.loads(json.dumps(DEFAULT.to_json(), default=list))
    assert len(found["grid"]["seeds"]) >= 20
    assert {run["seed"] for run in found["runs"]} == set(found["grid"]["seeds"])
    assert {run["seed"] for run in found["tuning"]} == set(found["grid"]["tuning_seeds"])
    assert not set(found["grid"]["seeds"]) & set(found["grid"]["tuning_seeds"])
    by_kind: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for run in found["tuning"]:
        by_kind[run["method"], run["alpha"], run["lr"]].append(run["reward"])
    for method, at in found["tuned"].items():
        of_method = {kind: np.mean(rewards) for kind, rewards in by_kind.items() if kind[0] == method}
        assert max(of_method, key=lambda kind: of_method[kind]) == (method, at["alpha"], at["lr"])
    assert not result["commit"]["dirty"]


def test_rewards_and_differences_by_alpha(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    lr = result["exploration"]["tuned"]["dpo"]["lr"]
    dpo = runs["default", "dpo", 0.0, lr]
    assert len(shown["alpha"]) == 1 + len(DEFAULT.ablation) + len(DEFAULT.few)
    for label, reward, difference, verdict, on_training, *figures_ in shown["alpha"]:
        found = runs[key_of(label, lr)]
        check_cell(reward, last(found, "held_out", "reward").mean())
        names = (("held_out", "kl"), ("held_out", "entropy"), ("rollouts",), ("best_seen",))
        for text, name in zip(figures_, names, strict=True):
            check_cell(text, last(found, *name).mean())
        if label == "DPO":
            assert difference == verdict == on_training == "\N{EN DASH}"
            continue
        of = {part: interval(last(found, part, "reward") - last(dpo, part, "reward")) for part in ("held_out", "train")}
        check_cell(difference, *of["held_out"])
        check_verdict(verdict, of["held_out"])
        check_cell(on_training, *of["train"])


def test_the_terms_beside_each_other(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    lr = result["exploration"]["tuned"]["dpo"]["lr"]
    assert len(shown["terms"]) == 4 * len(DEFAULT.few)
    for label, _, to_dpo, verdict, to_greedy, own_verdict in shown["terms"]:
        world, method, alpha, _ = key = key_of(label, lr)
        rewards = last(runs[key], "held_out", "reward")
        found = interval(rewards - last(runs[world, "dpo", 0.0, lr], "held_out", "reward"))
        check_cell(to_dpo, *found)
        check_verdict(verdict, found)
        if method != "selm":
            found = interval(rewards - last(runs[world, "selm", alpha, lr], "held_out", "reward"))
            check_cell(to_greedy, *found)
            check_verdict(own_verdict, found)


def lowest(differences: list[Floats]) -> tuple[float, float, float]:
    return min(map(interval, differences), key=lambda found: found[1])


def after_as_many(these: list[Any], those: list[Any]) -> tuple[float, Floats]:
    """Queries, and the differences of rewards by seed, by numpy's interpolation."""
    asked, differences = [], []
    for run, other in zip(these, those, strict=True):
        asked.append(min(run["queries"][-1], other["queries"][-1]))
        here, there = (np.interp(asked[-1], one["queries"], one["held_out"]["reward"]) for one in (run, other))
        differences.append(here - there)
    return float(np.mean(asked)), np.array(differences)


def at_kl_of(runs: Mapping[Key, list[Any]], key: Key) -> Floats:
    """Reward less that of DPO's line over the root of the KL, of each seed within the line."""
    lines = [runs[each] for lr in DEFAULT.lrs if (each := ("default", "dpo", 0.0, lr)) != key]
    differences = []
    for seed, run in enumerate(runs[key]):
        points = sorted(
            [(line[seed]["held_out"]["kl"][-1] ** 0.5, line[seed]["held_out"]["reward"][-1]) for line in lines]
            + [(0.0, run["held_out"]["reward"][0])]
        )
        root = run["held_out"]["kl"][-1] ** 0.5
        if root <= points[-1][0]:
            differences.append(run["held_out"]["reward"][-1] - np.interp(root, *zip(*points, strict=True)))
    return np.array(differences)


def test_best_settings_learning_rates_and_worlds(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    best = result["exploration"]["tuned"]["dpo"]["lr"]
    at_rates = [last(runs["default", "dpo", 0.0, lr], "held_out", "reward") for lr in DEFAULT.lrs]
    dpo = last(runs["default", "dpo", 0.0, best], "held_out", "reward")
    assert [row[0].partition(",")[0] for row in shown["best"]] == ["DPO", "SELM", "XPO", "XPO without its term"]
    for label, lr, reward, difference, verdict, least, of_least, queries in shown["best"]:
        found = runs[key_of(label, float(lr))]
        rewards = last(found, "held_out", "reward")
        check_cell(reward, rewards.mean())
        check_cell(queries, last(found, "queries").mean())
        if label != "DPO":
            check_cell(difference, *interval(rewards - dpo))
            check_verdict(verdict, interval(rewards - dpo))
            check_cell(least, *lowest([rewards - other for other in at_rates]))
            check_verdict(of_least, lowest([rewards - other for other in at_rates]))
    compared = 0
    for table, first in (("rates", 4), ("worlds", 3)):
        for row in shown[table]:
            world, lr = ("default", float(row[0])) if table == "rates" else (row[0], best)
            dpo = last(runs[world, "dpo", 0.0, lr], "held_out", "reward")
            check_cell(row[1 if table == "rates" else 2], dpo.mean())
            if table == "rates":
                for text, name in zip(row[2:4], ("kl", "entropy"), strict=True):
                    check_cell(text, last(runs[world, "dpo", 0.0, lr], "held_out", name).mean())
            for alpha, cell, verdict in zip(DEFAULT.few, row[first::2], row[first + 1 :: 2], strict=True):
                if (found := runs.get((world, "selm", alpha, lr))) is None:
                    assert cell == "\N{EN DASH}"
                    continue
                check_cell(cell, *interval(last(found, "held_out", "reward") - dpo))
                check_verdict(verdict, interval(last(found, "held_out", "reward") - dpo))
                compared += 1
    assert compared >= 2 * (len(DEFAULT.worlds) - 1 + 2)


def test_equal_kl_reads_dpos_line_where_it_reaches(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    tuned = result["exploration"]["tuned"]
    assert shown["equal-kl"][0][0] == "DPO"
    for label, kl, difference, verdict, seeds in shown["equal-kl"]:
        key = key_of(label, tuned["xpo" if label.startswith("XPO") else "dpo"]["lr"])
        check_cell(kl, last(runs[key], "held_out", "kl").mean())
        differences = at_kl_of(runs, key)
        assert int(seeds) == len(differences)
        if len(differences) == 20:
            check_cell(difference, *interval(differences))
            check_verdict(verdict, interval(differences))
        elif len(differences) > 1:
            assert numbers(difference)[0] == pytest.approx(differences.mean(), abs=0.01)


def test_the_line_of_equal_kl_begins_at_the_base_model(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]]
) -> None:
    other = deepcopy(dict(result["exploration"]))
    kind = Results(other).at_dpos("selm", DEFAULT.few[0])
    near = [run for run in other["runs"] if (run["method"], run["alpha"], run["lr"]) == ("selm", kind.alpha, kind.lr)]
    for run in near:
        run["held_out"]["kl"][-1] = 0.25
    key = ("default", "selm", kind.alpha, kind.lr)
    of_default = sorted((run for run in near if run["world"] == "default"), key=lambda run: run["seed"])
    found, count = at_equal_kl(Results(other), kind)
    assert found is not None
    assert count == 20
    assert found.mean == pytest.approx(at_kl_of(dict(runs) | {key: of_default}, key).mean(), abs=1e-9)


def test_equal_queries_compare_lines_where_both_have_asked(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    best = result["exploration"]["tuned"]["dpo"]["lr"]
    assert len(shown["queries"]) >= 4
    for label, lr, queries, difference, verdict, least, of_least in shown["queries"]:
        found = runs[key_of(label, float(lr))]
        asked, differences = after_as_many(found, runs["default", "dpo", 0.0, best])
        check_cell(queries, asked)
        check_cell(difference, *interval(differences))
        check_verdict(verdict, interval(differences))
        at_rates = [after_as_many(found, runs["default", "dpo", 0.0, rate])[1] for rate in DEFAULT.lrs]
        check_cell(least, *lowest(at_rates))
        check_verdict(of_least, lowest(at_rates))


def test_coins_teach_nothing(
    runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]], result: Mapping[str, Any]
) -> None:
    """The zero-reward control: over all its runs together the true reward does not drift, though the policies move.

    Six intervals of 95% are shown; that all include 0 would be asking too much of chance.
    """
    lr = result["exploration"]["tuned"]["dpo"]["lr"]
    assert len(shown["control"]) == 1 + len(DEFAULT.few)
    drifts = []
    for label, *cells, kl in shown["control"]:
        found = runs[key_of(label, lr, "zero reward")]
        for part, text, verdict in zip(("train", "held_out"), cells[::2], cells[1::2], strict=True):
            start = np.array([run[part]["reward"][0] for run in found])
            drifts.append(last(found, part, "reward") - start)
            mean, low, high = interval(drifts[-1])
            check_cell(text, mean, low, high)
            assert verdict == ("drifts up" if low > 0 else "drifts down" if high < 0 else "no drift shown")
        check_cell(kl, last(found, "held_out", "kl").mean())
        assert numbers(kl)[0] > 0.1
    _, low, high = interval(np.mean(drifts, 0))
    assert low < 0 < high


def test_implicit_rewards(result: Mapping[str, Any], shown: Mapping[str, list[list[str]]]) -> None:
    for row, line in zip(shown["implicit"], result["exploration"]["implicit"], strict=True):
        chosen, rejected = (np.array(line[role]["means"]) for role in ("chosen", "rejected"))
        assert row[0] == f"SELM, alpha {line['alpha']:g}"
        for place, values in enumerate((chosen, rejected, chosen - rejected)):
            check_cell(row[1 + 2 * place], *interval(values))
            check_verdict(row[2 + 2 * place], interval(values))
        for role in ("chosen", "rejected"):
            quantiles = line[role]["sorted"]
            assert quantiles == sorted(quantiles)
            # As many responses of each seed: the mean over quantiles is about the mean of the seeds' means.
            spread = quantiles[-1] - quantiles[0]
            assert np.mean(quantiles) == pytest.approx(np.mean(line[role]["means"]), abs=0.02 * spread)


def test_every_claim_is_about_the_runs_that_it_names(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]], shown: Mapping[str, list[list[str]]]
) -> None:
    """Each sentence, the figure that stands beside it, computed from the runs, and on which side of 0 it is shown."""
    tuned = result["exploration"]["tuned"]
    best, selm, xpo = tuned["dpo"]["lr"], tuned["selm"], tuned["xpo"]

    def of(method: str, alpha: float, lr: float, *names: str) -> Floats:
        return last(runs["default", method, alpha, lr], *(names or ("held_out", "reward")))

    dpo, at_rates = of("dpo", 0.0, best), [of("dpo", 0.0, lr) for lr in DEFAULT.lrs]
    expected: dict[str, tuple[float, float, float]] = {}
    lower = set()
    for alpha in DEFAULT.few:
        named = f"SELM (alpha {alpha:g})"
        greedy = of("selm", alpha, best)
        expected[f"At the learning rate that is best for DPO, {named} beats it"] = interval(greedy - dpo)
        differences = at_kl_of(runs, ("default", "selm", alpha, best))
        if len(differences) == 20:
            expected[f"At equal KL to the base model, {named} beats DPO"] = interval(differences)
        text = f"With the wrong sign (alpha {alpha:g}), the term does harm: it loses to DPO"
        expected[text] = interval(of("selm wrong sign", alpha, best) - dpo)
        lower.add(text)
        for method, name in (("selm sampled", "a sample"), ("selm exact", "the exact expectation")):
            text = f"Pushing the greedy response down gives a higher reward than {name} (alpha {alpha:g})"
            expected[text] = interval(greedy - of(method, alpha, best))
        for path, text in (
            (("rollouts",), f"{named} tries more different responses"),
            (("best_seen",), f"{named} comes upon more of the best responses"),
            (("train", "entropy"), f"{named} keeps more entropy"),
        ):
            expected[text] = interval(of("selm", alpha, best, *path) - of("dpo", 0.0, best, *path))
    at_its_best = of("selm", selm["alpha"], selm["lr"])
    expected["SELM beats DPO, each at its best settings"] = interval(at_its_best - dpo)
    text = "At its best settings, SELM beats DPO at each of its learning rates"
    expected[text] = lowest([at_its_best - other for other in at_rates])
    text = "With the alpha of the paper's Zephyr and Phi-3, 0.001, SELM beats DPO"
    expected[text] = interval(of("selm", 1e-3, best) - dpo)
    with_term, without = of("xpo", xpo["alpha"], xpo["lr"]), of("xpo", 0.0, xpo["lr"])
    expected["XPO beats XPO without its term, at the same learning rate"] = interval(with_term - without)
    text = "After as many iterations, and fewer queries, XPO beats DPO, each at its best settings"
    expected[text] = interval(with_term - dpo)
    found = runs["default", "xpo", xpo["alpha"], xpo["lr"]]
    text = "After as many queries, and more steps, XPO beats DPO at each of its learning rates"
    expected[text] = lowest([after_as_many(found, runs["default", "dpo", 0.0, lr])[1] for lr in DEFAULT.lrs])
    told = {text: (figure, verdict) for text, _, figure, verdict in shown["claims"]}
    assert len(told) == len(shown["claims"]) >= 18
    assert expected.keys() - told.keys() <= {"SELM beats DPO, each at its best settings"}
    for text, (figure, verdict) in told.items():
        if text not in expected:
            assert "At equal KL" in text
            continue
        mean, low, high = expected[text]
        check_cell(figure, mean, low, high)
        if low <= 0 <= high:
            assert verdict == "not shown", text
        else:
            assert verdict == ("shown" if (mean < 0) == (text in lower) else "the opposite is shown"), text


def test_tuning_is_shown_with_what_it_chose(result: Mapping[str, Any], shown: Mapping[str, list[list[str]]]) -> None:
    means: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for run in result["exploration"]["tuning"]:
        means[run["method"], run["alpha"], run["lr"]].append(run["reward"])
    assert len(shown["tuning"]) == sum(map(len, DEFAULT.tuning_alphas.values()))
    for label, *cells in shown["tuning"]:
        _, method, alpha, _ = key_of(label, 0.0)
        for text, lr in zip(cells, DEFAULT.lrs, strict=True):
            check_cell(text, float(np.mean(means[method, alpha, lr])))
    bold = [row for row in document.blocks(result)["tuning"].splitlines() if "**" in row]
    assert [row.count("**") for row in bold] == [2] * len(DEFAULT.tuning_alphas)


def test_settings_are_those_of_the_grid(result: Mapping[str, Any], shown: Mapping[str, list[list[str]]]) -> None:
    told = dict(shown["setup"])
    assert (told["vocabulary"], told["iterations"], told["schedule"]) == ("8", "6", "cosine")
    assert (told["beta"], told["warmup"], told["seeds"]) == ("0.1", "0.1", "300 to 319")
    assert told["tuning seeds"] == "1000 to 1009"
    check_cell(told["KL of the prior to the base model, nats"], result["exploration"]["base"]["kl_of_prior"])


def test_the_policies_are_below_the_best_there_are(result: Mapping[str, Any], runs: Mapping[Key, list[Any]]) -> None:
    best = [(point["kl"], point["reward"]) for point in result["exploration"]["best_policies"]]
    kls, rewards = zip(*best, strict=True)
    assert list(rewards) == sorted(rewards)
    for (world, *_), found in runs.items():
        if world == "default":
            kl, reward = (last(found, "held_out", name).mean() for name in ("kl", "reward"))
            assert reward < np.interp(kl, kls, rewards)


def test_histograms_count_every_held_out_prompt_of_every_seed(
    result: Mapping[str, Any], runs: Mapping[Key, list[Any]]
) -> None:
    found = result["exploration"]
    bins = np.array(found["bins"])
    held_out = DEFAULT.worlds["default"].settings.held_out_prompts
    for line in found["histograms"]:
        for iteration, counts in enumerate(line["counts"]):
            assert sum(counts) == held_out * 20
            of_seeds = [
                run["held_out"]["greedy"][iteration]
                for run in runs["default", line["method"], line["alpha"], line["lr"]]
            ]
            mean = np.dot((bins[:-1] + bins[1:]) / 2, counts) / sum(counts)
            assert mean == pytest.approx(np.mean(of_seeds), abs=(bins[1] - bins[0]) / 2)


def test_charts_are_of_the_results(result: Mapping[str, Any], runs: Mapping[Key, list[Any]]) -> None:
    found = Results(result["exploration"])
    lr = found.dpo.lr
    rewards = {
        name: np.mean([run["held_out"]["reward"] for run in runs["default", name, alpha, lr]], 0)
        for name, alpha in (("dpo", 0.0), ("selm", DEFAULT.few[0]))
    }
    drawn = {name: figures.CHARTS[name](found) for name in ("iterations", "queries", "differences", "implicit")}
    for name in ("iterations", "queries"):
        for start, end in (rewards["dpo"][[0, -1]], rewards["selm"][[0, -1]]):
            assert f"from {start:#.3g} to {end:#.3g}" in drawn[name].summary.replace("\N{MINUS SIGN}", "-")
    pushed = (rewards["selm"] - rewards["dpo"])[-1]
    said = re.search(r"greedy y: alpha 0.1 from \S+ to (\S+)\.", drawn["differences"].summary)
    assert said is not None
    check_cell(said[1], pushed)
    quantiles = result["exploration"]["implicit"]
    line = next(line for line in quantiles if line["alpha"] == DEFAULT.few[0])
    said = re.search(r"alpha 0.1: chosen from (\S+) to (\S+)\.", drawn["implicit"].summary)
    assert said is not None
    check_cell(f"{said[1]} {said[2]}", line["chosen"]["sorted"][0], line["chosen"]["sorted"][-1])


def test_another_result_gives_another_page(result: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machine.ROOT)
    other = deepcopy(dict(result))
    for run in other["exploration"]["runs"]:
        if run["method"] == "selm":
            run["held_out"]["reward"][-1] += 0.5
    for before, after in zip(
        tables(Results(result["exploration"])), tables(Results(other["exploration"])), strict=True
    ):
        unmoved = before.name in ("implicit", "setup", "tuning")
        assert (before.rows == after.rows) == unmoved, before.name
    assert {str(document.DOCUMENT), "docs/exploration/alpha.svg"} <= set(document.stale(other))


def test_the_document_shows_what_the_results_say(
    result: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(machine.ROOT)
    assert command.main(["--check"]) == 0
    text = document.DOCUMENT.read_text("utf-8")
    for name in document.blocks(result):
        assert f"<!-- table: {name} -->" in text, name
    for image in re.findall(r"\]\((exploration/[a-z-]+\.svg)\)", text):
        assert (document.DOCUMENT.parent / image).is_file(), image
    with pytest.raises(ValueError, match="no table is called nothing"):
        document.filled("<!-- table: nothing -->\n<!-- end -->", result)
    assert capsys.readouterr().err == ""


def test_the_documents_sentences_hold_no_measured_number(result: Mapping[str, Any]) -> None:
    """What was measured stands in tables, which are made; in a sentence only settings have decimals."""
    text = (machine.ROOT / document.DOCUMENT).read_text("utf-8")
    prose = document._BLOCK.sub("", text)
    grid = result["exploration"]["grid"]
    settings = {float(alpha) for alpha in (*grid["ablation"], *grid["few"])} | {float(lr) for lr in grid["lrs"]}
    allowed = {f"{value:g}" for value in settings} | {"2.0"}  # AlpacaEval's name
    found = re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\d)", re.sub(r"arXiv \d+\.\d+|equation \S+", "", prose))
    assert set(found) <= allowed
    assert "%" not in prose.replace("95%", "")
