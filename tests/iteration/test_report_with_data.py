"""The report on a whole run with held-out rows: its last iterate against its beginning, and scores of rollouts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from selm_fast.errors import Refused
from selm_fast.iteration.paths import Paths
from selm_fast.model import Policy
from selm_fast.report import log_probs, rollout_rewards
from selm_fast.report.log_probs import implicit_rewards
from selm_fast.report.marks import Panel, Steps
from selm_fast.report.page import write_report
from selm_fast.report.rollout_rewards import read_rollouts, rollout_histograms
from selm_fast.report.runs import Run, read_runs

from ..report.checks import leave_out_other_charts
from ..report.document import chart, parse
from ..report.trained_runs import by_definition, policy_of
from ..training.harness import groups_of, make_rows, write_rows
from .harness import lines, reward, shards
from .runs import CopyOfWhole

ROWS = make_rows(5, seed=8)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs' settings name the cache in the home folder; and garbage collection is for large models."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(log_probs.gc, "collect", lambda: 0)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "rows.jsonl", ROWS))


def of(*paths: Paths) -> list[Run]:
    return read_runs([one.root for one in paths])


def from_rollouts(paths: Paths, number: int, stem: str) -> list[float]:
    """Scores of the responses of one pass to the prompts that gave a pair, by the ranker itself."""
    kept = {line["row"] for line in lines(paths.stage(number, "rank") / "rows.jsonl")}
    found = shards(paths.stage(number, "rollout"), stem)
    return sorted(reward(r["text"]) for line in found if line["row"] in kept for r in line["responses"] if r["text"])


def test_the_base_is_the_beginning(whole: Paths, data: str, tmp_path: Path) -> None:
    """Not the iterate before, which the last training had for its reference; nor does a stage's folder change."""
    before = sorted(str(path) for path in whole.root.rglob("*"))
    (found,) = implicit_rewards(of(whole), data)
    config = whole.train_config(2)
    assert "iteration 2" in found.model and found.base == f"{whole.start}, the model that the run began with"
    base = Policy.from_pretrained(whole.start)
    expected = groups_of(config, ROWS)
    chosen, rejected = by_definition(policy_of(whole.stage(2, "train")), base, expected, config.beta)
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)
    assert found.rejected == pytest.approx(rejected.numpy(), abs=1e-5)
    previous, _ = by_definition(policy_of(whole.stage(2, "train")), policy_of(whole.stage(1, "train")), expected, 0.1)
    assert abs(previous - chosen).max() > 0.01  # which would be another answer
    assert sorted(str(path) for path in whole.root.rglob("*")) == before
    assert any((tmp_path / ".cache").rglob("shard-*.safetensors"))


def test_the_last_finished_iteration_counts(copy_of_whole: CopyOfWhole, whole: Paths, data: str) -> None:
    paths = Paths(copy_of_whole())
    (paths.stage(2, "train") / "manifest.json").unlink()
    (found,) = implicit_rewards(of(paths), data)
    assert "iteration 1" in found.model
    chosen, _ = by_definition(
        policy_of(whole.stage(1, "train")),
        Policy.from_pretrained(whole.start),
        groups_of(whole.train_config(1), ROWS),
        0.1,
    )
    assert found.chosen == pytest.approx(chosen.numpy(), abs=1e-5)
    (paths.stage(1, "train") / "manifest.json").unlink()
    with pytest.raises(Refused, match="no finished training"):
        implicit_rewards(of(paths), data)


def test_rollouts_are_scored_as_their_texts(whole: Paths) -> None:
    (run,) = of(whole)
    found = read_rollouts(run)
    assert list(found) == [1, 2]
    for number, rollout in found.items():
        assert sorted(rollout.policy) == from_rollouts(whole, number, "policy") != []
        assert sorted(rollout.base) == from_rollouts(whole, number, "base") != []


def test_histograms_count_the_scores(whole: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Panel] = []
    monkeypatch.setattr(rollout_rewards, "chart", lambda title, about, panels, *_, **__: drawn.extend(panels))
    rollout_histograms(of(whole), [""], ["run"])
    assert [panel.title for panel in drawn] == ["iteration 1", "iteration 2"]
    edges = drawn[0].marks[0].edges  # type: ignore[attr-defined]
    everything = [from_rollouts(whole, number, stem) for number in (1, 2) for stem in ("policy", "base")]
    assert (edges[0], edges[-1]) == (min(map(min, everything)), max(map(max, everything)))
    for number, panel in enumerate(drawn, 1):
        assert [mark.name for mark in panel.marks] == ["policy", "base model"]
        for mark, stem in zip(panel.marks, ("policy", "base"), strict=True):
            assert isinstance(mark, Steps) and mark.edges == edges
            scores = from_rollouts(whole, number, stem)
            assert mark.middle == pytest.approx(math.fsum(scores) / len(scores))
            counts = [sum(low <= one < high for one in scores) for low, high in pairwise(edges)]
            counts[-1] += scores.count(edges[-1])
            assert np.array(mark.heights) * len(scores) == pytest.approx(counts, abs=1e-9)


def test_the_page_of_two_runs(
    copy_of_whole: CopyOfWhole, whole: Paths, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_other_charts(monkeypatch)
    copy = Paths(copy_of_whole())
    write_report([whole.root, copy.root], tmp_path / "page.html", data=data)
    page = parse((tmp_path / "page.html").read_text("utf-8"))
    figure = chart(page, "Rewards of rollouts")
    assert [one.words for one in figure.all("li")] == [
        *(f"{n} {p.root.name}" for n, p in (("A", whole), ("B", copy))),
        "base model of a run",
    ]
    texts = [one.words for one in figure.all("text")]
    assert [text for text in texts if "iteration" in text] == [f"{n}, iteration {k}" for k in (1, 2) for n in "AB"]
    (section,) = [one for one in page.all("section") if one.attributes.get("id") == "implicit"]
    assert section.words.count("the model after iteration 2") == 2 and "not the iteration before" in section.words


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def rename(path: Path) -> None:
    path.write_text(path.read_text().replace('"scores"', '"skores"', 1))


def one_score_less(path: Path) -> None:
    first, *rest = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    path.write_text("".join([json.dumps(row | {"scores": row["scores"][1:]}) + "\n", *rest]))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (cut, "not JSON"),
        (lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[1:])), "sha256"),
        (rename, "line 1: candidates and their scores"),
        (one_score_less, "scores; is it of another program"),
        (Path.unlink, "No such file"),
    ],
)
def test_damaged_ranks_are_refused(
    copy_of_whole: CopyOfWhole, data: str, tmp_path: Path, edit: Callable[[Path], object], said: str
) -> None:
    paths = Paths(copy_of_whole())
    edit(paths.stage(2, "rank") / "rows.jsonl")
    with pytest.raises(Refused, match=said) as caught:
        write_report([paths.root], tmp_path / "page.html", data=data)
    assert str(paths.stage(2, "rank") / "rows.jsonl") in str(caught.value)
    assert not (tmp_path / "page.html").exists() and not (tmp_path / ".cache").exists()


def test_a_prepared_model_is_found_in_the_run(copy_of_whole: CopyOfWhole, whole: Paths, data: str) -> None:
    """Where it is now, and not where its run was made."""
    root = Paths(copy_of_whole()).root
    shutil.copytree(whole.start, root / "prepare/model")
    record = json.loads((root / "run.json").read_text())
    record["config"] |= {"prepare": "python:recipes:make", "model": record["config"]["model"] | {"path": None}}
    (root / "run.json").write_text(json.dumps(record))
    (found,) = implicit_rewards(read_runs([root]), data)
    assert found.base.startswith(str(root / "prepare/model"))
    (expected,) = implicit_rewards(of(whole), data)
    assert np.array_equal(found.chosen, expected.chosen) and found.base_digest == expected.base_digest
