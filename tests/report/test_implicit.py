"""Implicit rewards on held-out rows: beta times what a response has gained since the run began, computed once."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selm_fast.cli.main import main
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.report import implicit_view, log_probs
from selm_fast.report.implicit import Difference, ImplicitRewards, difference
from selm_fast.report.implicit_view import difference_table, warning
from selm_fast.report.log_probs import implicit_rewards
from selm_fast.report.marks import Line, Panel
from selm_fast.report.page import write_report
from selm_fast.training.signals import StopFlag

from ..training.harness import WORDS, write_model, write_rows, write_tokenizer
from .checks import assert_shows, leave_out_other_charts
from .document import Element, chart, parse, points, summary, table
from .test_page_itself import assert_coloured, assert_readable, assert_references, assert_safe
from .trained_runs import BETA, by_definition, groups, held_out_rows, policy_of, read, settings, train_run

REWARDS = "Implicit rewards on held-out rows"
DIFFERENCES = "Differences of implicit rewards to A"
STRANGE = "1<b onclick=alert(1)>$x_"  # a name that no page may take for more than a name
OTHER: dict[str, Any] = {"beta": 0.2, "data__max_length": 24, "data__max_prompt_length": 12}
NAMES = ["A dpo", "B selm", f"C {STRANGE}"]
MINUS = "\N{MINUS SIGN}"
Keys = list[tuple[bytes, ...]]


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Every test asks for `one_thread`: a cache is of a number of threads."""


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes four times as long as loading a tiny model, and matters to large ones alone."""
    monkeypatch.setattr(log_probs.gc, "collect", lambda: 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, held-out rows, and runs that began with that model; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder / "base")
    write_rows(folder / "held_out.jsonl", held_out_rows())
    train_run(folder / "dpo", folder / "base")
    train_run(folder / "selm", folder / "base", method="selm", alpha=0.5, optim__lr=3e-3)
    write_model(folder / "other", seed=5)
    write_tokenizer(folder / "other", words=WORDS[10:])
    train_run(folder / STRANGE, folder / "other", **OTHER)
    return folder


@pytest.fixture
def data(home: Path) -> str:
    return str(home / "held_out.jsonl")


@pytest.fixture
def here(home: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change: its caches are its own, its base model another folder."""
    shutil.copytree(home, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "page.html"))
    for path in (tmp_path / "copy").glob("*/run.json"):
        path.write_text(path.read_text().replace(str(home), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The sequence keys of each packed forward."""
    seen: Keys = []
    whole = Policy.sequence_logps

    def counted(self: Policy, batch: Any) -> Tensor:
        seen.append(batch.sequence_keys)
        return whole(self, batch)

    monkeypatch.setattr(Policy, "sequence_logps", counted)
    return seen


@pytest.fixture(scope="module")
def rewards(home: Path) -> Iterator[list[ImplicitRewards]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probs.gc, "collect", lambda: 0)
        yield implicit_rewards(read(home / "dpo", home / "selm", home / STRANGE), str(home / "held_out.jsonl"))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def full(home: Path, rewards: list[ImplicitRewards]) -> tuple[Element, str]:
    """The report on all three, from the caches that `rewards` has filled: parsed, and as it is in its file."""
    folders = [home / name for name in ("dpo", "selm", STRANGE)]
    write_report(folders, home / "page.html", data=str(home / "held_out.jsonl"))
    html = (home / "page.html").read_text("utf-8")
    return parse(html), html


def interval(values: Any) -> tuple[float, float, float]:
    """Mean of some values and its normal 95% interval."""
    mean, half = statistics.fmean(values), 1.959964 * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


@pytest.mark.parametrize(
    ("nth", "name", "base", "changed"),
    [(0, "dpo", "base", {}), (1, "selm", "base", {}), (2, STRANGE, "other", OTHER)],
    ids=["dpo", "selm", "other"],
)
def test_equal_the_definition(
    home: Path, rewards: list[ImplicitRewards], nth: int, name: str, base: str, changed: dict[str, Any]
) -> None:
    found, expected = rewards[nth], groups(home / name, home / base, **changed)
    assert found.rows.tolist() == [group.row_id for group in expected]
    beta = changed.get("beta", BETA)
    chosen, rejected = by_definition(policy_of(home / name), Policy.from_pretrained(home / base), expected, beta)
    assert abs(chosen).max() > 0.1  # the model has moved
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)
    assert found.rejected == pytest.approx(rejected.numpy(), abs=1e-5)
    assert found.rows_read == 9 == len(found.rows) + sum(found.skipped.values())


def test_differences_are_of_equal_rows(home: Path, rewards: list[ImplicitRewards]) -> None:
    """Of policies that began as one, the base cancels out: beta times the difference of the two policies."""
    found = difference(rewards[1], rewards[0])
    same = groups(home / "dpo", home / "base")
    chosen, rejected = by_definition(policy_of(home / "selm"), policy_of(home / "dpo"), same, BETA)
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)
    assert found.rejected == pytest.approx(rejected.numpy(), abs=1e-5)


def test_rows_that_one_run_leaves_out(rewards: list[ImplicitRewards]) -> None:
    """Rows are matched by their numbers, whatever tokens a run makes of them; those of one run alone are counted."""
    first, _, short = rewards
    assert first.rows.tolist() == [0, 2, 3, 4, 5, 6, 7, 8] and short.rows.tolist() == [0, 2, 3, 5, 6, 7, 8]
    for one, other, sign in ((short, first, 1), (first, short, -1)):
        found = difference(one, other)
        assert found.rows.tolist() == short.rows.tolist()
        assert (found.only_this, found.only_other) == ((0, 1) if sign > 0 else (1, 0))
        kept = [row != 4 for row in first.rows]
        assert found.chosen == pytest.approx(sign * (short.chosen - first.chosen[kept]), abs=1e-12)
        assert found.rejected == pytest.approx(sign * (short.rejected - first.rejected[kept]), abs=1e-12)


def test_a_second_report_makes_no_forward_pass(here: Path, forwards: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    runs, data = read(here / "dpo", here / "selm"), str(here / "held_out.jsonl")
    first = implicit_rewards(runs, data)
    assert len(forwards) == 3 * len(set(forwards))  # the base once for both runs, and two policies
    forwards.clear()
    for one, again in zip(first, implicit_rewards(runs, data), strict=True):
        assert np.array_equal(one.chosen, again.chosen) and np.array_equal(one.rejected, again.rejected)
    implicit_rewards(runs[1:], data)
    assert not forwards
    assert capsys.readouterr().out.count("from the cache, no forward pass") == 3 + 2
    write_rows(Path(data), held_out_rows()[5:])  # other rows are others
    implicit_rewards(runs[1:], data)
    assert forwards


def test_caches_of_their_own(here: Path, forwards: Keys) -> None:
    """A base that two runs share is passed over once, wherever each of them keeps its log-probs."""
    path = here / "selm/run.json"
    path.write_text(path.read_text().replace(str(here / "cache"), str(here / "second")))
    runs, data = read(here / "dpo", here / "selm"), str(here / "held_out.jsonl")
    implicit_rewards(runs, data)
    assert len(forwards) == 3 * len(set(forwards))
    assert sorted(len(list((here / name).iterdir())) for name in ("cache", "second")) == [1, 2]
    forwards.clear()
    implicit_rewards(runs, data)
    implicit_rewards(runs[::-1], data)
    assert not forwards


def test_a_base_of_random_weights(here: Path) -> None:
    init = {"model__path": None, "model__init": here / "base/config.json", "model__tokenizer": str(here / "base")}
    train_run(here / "drawn", here / "base", **init, seed=3)
    (found,) = implicit_rewards(read(here / "drawn"), str(here / "held_out.jsonl"))
    base, expected = Policy.from_config(here / "base/config.json", seed=3), groups(here / "dpo", here / "base")
    chosen, _ = by_definition(policy_of(here / "drawn"), base, expected, BETA)
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)
    assert found.base.startswith("random weights of ")


def test_in_bf16(here: Path, rewards: list[ImplicitRewards]) -> None:
    """Rewards are those of the weights as they compute; a base is one in whatever dtype it is asked."""
    train_run(here / "bf16", here / "base", dtype="bfloat16")
    found, whole = implicit_rewards(read(here / "bf16", here / "dpo"), str(here / "held_out.jsonl"))
    assert found.base_digest == whole.base_digest
    assert np.array_equal(whole.chosen, rewards[0].chosen)
    expected = groups(here / "dpo", here / "base")
    chosen, _ = by_definition(policy_of(here / "bf16"), Policy.from_pretrained(here / "base"), expected, BETA)
    assert found.chosen == pytest.approx(chosen.numpy(), abs=0.1)
    assert abs(found.chosen - chosen.numpy()).max() > 1e-4  # it did compute in bf16
    assert abs(chosen).max() > 0.3


def test_a_pass_over_other_packs_is_not_used(here: Path, forwards: Keys) -> None:
    """A difference between two policies may be as small as what other neighbours in a pack round off."""
    runs, data = read(here / "dpo"), str(here / "held_out.jsonl")
    implicit_rewards(runs, data)
    forwards.clear()
    write_rows(Path(data), held_out_rows()[:-1])  # the cache holds every sequence of these
    implicit_rewards(runs, data)
    assert len(forwards) == 2 * len(set(forwards)) > 0


def test_a_run_against_itself(here: Path) -> None:
    shutil.copytree(here / "dpo", here / "again")
    one, other = implicit_rewards(read(here / "dpo", here / "again"), str(here / "held_out.jsonl"))
    found = difference(other, one)
    assert not found.chosen.any() and not found.rejected.any() and one.chosen.any()
    ((_, _, rows),) = difference_table([found], ["B"], ["A", "B"]).bodies
    assert [(row.cells[0].text, row.cells[0].note) for row in rows[:3]] == [("0.000", "0.000 to 0.000, not shown")] * 3
    assert warning([one, other], "AB") is None


def test_other_bases_and_betas_are_said(here: Path, rewards: list[ImplicitRewards]) -> None:
    assert warning(rewards[:2], "AB") is None
    train_run(here / "own reference", here / "other", model__reference=str(here / "base"))
    (found,) = implicit_rewards(read(here / "own reference"), str(here / "held_out.jsonl"))
    assert found.base == f"{here / 'base'}, its reference model"
    assert found.base_digest == rewards[0].base_digest == rewards[1].base_digest != rewards[2].base_digest
    expected = groups(here / "own reference", here / "other")
    chosen, _ = by_definition(policy_of(here / "own reference"), Policy.from_pretrained(here / "base"), expected, BETA)
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)  # the reference is the base


def test_the_page_shows_them(full: tuple[Element, str], rewards: list[ImplicitRewards]) -> None:
    page, html = full
    assert_safe(page, html)
    assert_references(page, html)
    assert_readable(page)
    assert_coloured(page)
    (section,) = [one for one in page.all("section") if one.attributes.get("id") == "implicit"]
    assert [one.words.split(":")[0] for one in section.all("p", "about")[1:4]] == NAMES
    assert section.words.count("the model that the run began with; beta 0.1.") == 2
    (note,) = section.all("p", "missing")
    assert "C began with other weights than A" in note.words and "different betas" in note.words
    shown = table(page, REWARDS)
    for name, one in zip(NAMES, rewards, strict=True):
        for measure, values in (
            ("reward of chosen", one.chosen),
            ("reward of rejected", one.rejected),
            ("margin, chosen over rejected", one.chosen - one.rejected),
        ):
            assert_shows(shown[f"Mean: {measure}"][name], *interval(values))
        share = sum(one.chosen > one.rejected) / len(one.rows)
        assert_shows(shown["Mean: accuracy"][name].split("|")[0], share)
        assert_shows(shown["Rows: rows used"][name], len(one.rows), len(one.rows) / 9)
    skipped = [list(row.values()) for name, row in shown.items() if name.startswith("Rows: skipped")]
    assert [sum(map(int, column)) for column in zip(*skipped, strict=True)] == [1, 1, 2]


def test_the_page_shows_their_differences(full: tuple[Element, str], rewards: list[ImplicitRewards]) -> None:
    shown = table(full[0], DIFFERENCES)
    assert list(shown["rows compared"].values()) == ["8", "7"]
    assert list(shown["left out: used by A alone"].values()) == ["0", "1"]
    assert list(shown["left out: used by the other alone"].values()) == ["0", "0"]
    found = difference(rewards[1], rewards[0])
    for name, values in (
        ("reward of chosen", found.chosen),
        ("reward of rejected", found.rejected),
        ("margin, chosen over rejected", found.chosen - found.rejected),
    ):
        text = shown[name][f"B {MINUS} A"]
        mean, low, high = interval(values)
        assert text.endswith(", not shown") == (low <= 0 <= high)
        assert_shows(text.removesuffix(", not shown"), mean, low, high)


@pytest.mark.parametrize(("centre", "shown"), [(0.0, False), (1.0, True), (-1.0, True)])
def test_what_is_not_shown(centre: float, shown: bool) -> None:
    rows = np.arange(10)
    values = np.linspace(-0.1, 0.1, 10)
    found = Difference(rows=rows, chosen=centre + values, rejected=values[::-1], only_this=0, only_other=0)
    ((_, _, table),) = difference_table([found], ["B"], ["A", "B"]).bodies
    assert ["not shown" not in row.cells[0].note for row in table[:3]] == [shown, False, shown]


def test_the_charts_show_them(full: tuple[Element, str], rewards: list[ImplicitRewards]) -> None:
    page, _ = full
    title = "Sorted differences of implicit rewards"
    figure = chart(page, title)
    assert [one.words for one in figure.all("li")] == ["chosen", "rejected"]
    assert {f"B {MINUS} A", f"C {MINUS} A"} <= {one.words for one in figure.all("text")}
    assert "greatest, chosen and rejected each sorted by itself" in figure.words
    for variable, kind in (("--s0", "chosen"), ("--s1", "rejected")):
        values = np.sort(getattr(difference(rewards[1], rewards[0]), kind))
        (line,) = points(figure, variable)
        xs, ys = np.array(line).T
        assert len(line) == len(values) and np.ptp(np.diff(xs)) <= 0.2 + 1e-9  # written in tenths
        # y grows downward: the drawn heights are the sorted values, but for scale and place.
        slope, place = np.polyfit(values, ys, 1)
        assert slope < 0 and ys == pytest.approx(slope * values + place, abs=0.2)
        said = summary(page, title).split(f"B {MINUS} A: {kind} from ")[1].split(". ")[0]
        assert_shows(said, values[0], values[-1])
    spread = summary(page, "Distribution of implicit rewards")
    for letter, one in zip("ABC", rewards, strict=True):
        means = [part.split(". ")[0].rstrip(".") for part in spread.split(f"{letter}: ")[1:]]
        assert [part.split()[0] for part in means] == ["chosen", "rejected"]
        for part, values in zip(means, (one.chosen, one.rejected), strict=True):
            assert_shows(part, float(values.mean()))


def test_many_rows_are_drawn_as_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chart of 60,000 rows has as many points as one of 240, its ends among them."""
    panels: list[Panel] = []
    monkeypatch.setattr(implicit_view, "chart", lambda title, about, drawn, *_, **__: panels.extend(drawn))
    rng = np.random.default_rng(0)
    one, other = (
        ImplicitRewards(
            model="", base="", base_digest="", beta=1.0, rows=np.arange(60_000), chosen=rng.normal(size=60_000),
            rejected=rng.normal(size=60_000), rows_read=60_000, skipped={},
        )
        for _ in range(2)
    )  # fmt: skip
    implicit_view.implicit_view([one, other], "rows", "AB", "AB")
    for mark, values in zip(panels[-1].marks, (other.chosen - one.chosen, other.rejected - one.rejected), strict=True):
        assert isinstance(mark, Line) and len(mark.series.xs) == 240
        assert (mark.series.ys[0], mark.series.ys[-1]) == (values.min(), values.max())
        assert (mark.series.xs[0], mark.series.xs[-1]) == (0, 100) and mark.series.ys == sorted(mark.series.ys)
    heights = panels[0].marks[1].heights  # type: ignore[attr-defined]
    edges = panels[0].marks[1].edges  # type: ignore[attr-defined]
    assert heights == pytest.approx(
        [((one.rejected >= a) & (one.rejected < b)).mean() for a, b in pairwise(edges)], abs=1e-4
    )


def test_one_run_on_the_command_line(
    home: Path, data: str, tmp_path: Path, rewards: list[ImplicitRewards], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_other_charts(monkeypatch)
    assert main(["report", str(home / "selm"), "--data", data, "--out", str(tmp_path / "page.html")]) == 0
    page = parse((tmp_path / "page.html").read_text("utf-8"))
    shown = table(page, REWARDS)
    assert_shows(shown["Mean: reward of chosen"]["selm"], *interval(rewards[1].chosen))
    titles = [one.all("h3")[0].words for one in page.all("figure")]
    assert "Distribution of implicit rewards" in titles and "Sorted differences of implicit rewards" not in titles
    assert "Rewards of rollouts" not in titles  # a folder of `train` alone has none


def test_the_export_serves_where_the_masters_are_gone(here: Path, rewards: list[ImplicitRewards]) -> None:
    shutil.rmtree(here / "dpo/checkpoints")
    (found,) = implicit_rewards(read(here / "dpo"), str(here / "held_out.jsonl"))
    assert "exported weights" in found.model and "fp32 masters" in rewards[0].model
    assert found.chosen == pytest.approx(rewards[0].chosen, abs=1e-5)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x10
    path.write_bytes(raw)


def unfinished(here: Path) -> None:
    path = here / "dpo/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"done": False}))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data": (lambda here: (here / "held_out.jsonl").unlink(), "no such file"),
    "no rows": (lambda here: (here / "held_out.jsonl").write_text(""), "no rows"),
    "other columns": (lambda here: (here / "held_out.jsonl").write_text('{"text": "a"}\n'), "text"),
    "useless rows": (
        lambda here: write_rows(here / "held_out.jsonl", held_out_rows()[1:2]),
        "all 1 rows are unusable",
    ),
    "unfinished": (unfinished, "has no finished training"),
    "no model": (
        lambda here: [shutil.rmtree(here / "dpo" / name) for name in ("checkpoints", "model")],
        "neither masters nor a model",
    ),
    "no base": (lambda here: shutil.rmtree(here / "base"), "base model of selm"),
    "changed base": (
        lambda here: [shutil.rmtree(here / "base"), write_model(here / "base", seed=9)],
        "have changed since selm began",
    ),
    "other base": (
        lambda here: [shutil.rmtree(here / "base"), write_model(here / "base", vocab_size=300)],
        "has 300",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_before_any_pass(here: Path, forwards: Keys, capsys: pytest.CaptureFixture[str], what: str) -> None:
    edit, said = REFUSALS[what]
    edit(here)
    runs = [str(here / "selm"), str(here / "dpo")]
    assert main(["report", *runs, "--out", str(here / "page.html"), "--data", str(here / "held_out.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not forwards and not (here / "page.html").exists() and not (here / "cache").exists()


def test_too_large_for_one_device(here: Path, forwards: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "memory_bytes", lambda device: 1000)
    with pytest.raises(Refused, match="works on one device alone"):
        implicit_rewards(read(here / "dpo"), str(here / "held_out.jsonl"))
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refused, match="one process"):
        implicit_rewards(read(here / "dpo"), str(here / "held_out.jsonl"))


def test_damaged_masters_fail_and_what_was_computed_is_kept(here: Path, forwards: Keys) -> None:
    for path in (here / "selm/checkpoints").rglob("weights-*"):
        damage(path)
    with pytest.raises(RunFailed, match="damaged"):
        implicit_rewards(read(here / "dpo", here / "selm"), str(here / "held_out.jsonl"))
    assert forwards
    forwards.clear()
    implicit_rewards(read(here / "dpo"), str(here / "held_out.jsonl"))
    assert not forwards


def test_a_stop_saves_and_the_same_command_goes_on(
    here: Path, forwards: Keys, monkeypatch: pytest.MonkeyPatch, rewards: list[ImplicitRewards]
) -> None:
    flags: list[StopFlag] = []
    make, counted = StopFlag.__init__, Policy.sequence_logps

    def made(self: StopFlag) -> None:
        make(self)
        flags.append(self)

    def stopping(self: Policy, batch: Any) -> Tensor:
        if len(forwards) == 4:  # in the pass of the first policy, after that of the base
            flags[-1].request()
        return counted(self, batch)

    monkeypatch.setattr(StopFlag, "__init__", made)
    monkeypatch.setattr(Policy, "sequence_logps", stopping)
    command = ["report", str(here / "dpo"), "--out", str(here / "page.html"), "--data", str(here / "held_out.jsonl")]
    assert main(command) == Stopped.exit_code == 75
    assert len(forwards) == 5 and not (here / "page.html").exists()
    monkeypatch.setattr(Policy, "sequence_logps", counted)
    before = list(forwards)
    forwards.clear()
    (found,) = implicit_rewards(read(here / "dpo"), str(here / "held_out.jsonl"))
    passes = 2 * len(set(before + forwards))
    assert len(before) + len(forwards) == passes  # nothing is computed twice
    assert np.array_equal(found.chosen, rewards[0].chosen)


def test_settings_are_the_runs_own(home: Path) -> None:
    """A record of DPO has the default alpha written out, which its settings refuse."""
    assert json.loads((home / "dpo/run.json").read_text())["config"]["alpha"] == settings(home, home / "base").alpha
