"""Rank: every row and every count of it, made again from the files that it came from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from selm_fast.config import RunConfig
from selm_fast.data.dataset import load_groups
from selm_fast.data.groups import TokenGroup
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import RunFailed, Stopped
from selm_fast.iteration.job import read_manifest, write_lines, write_manifest
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.prompts import portion_of
from selm_fast.iteration.scorer import PythonScorer
from selm_fast.iteration.stages import do_part, finish

from ..training.harness import write_rows
from .harness import Finished, MakeRun, StopAfter, job_of, lines, reward, shards

RANK = "iter-1/rank"
NAN = math.nan
# Scores by text, from a file beside it.
TABLE_RANKER = """
import json, pathlib
SCORES = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())

def score(prompts, candidates):
    return [[SCORES[text] for text in texts] for texts in candidates]
"""
Response = tuple[list[int], str]
Scored = Callable[[str], float]


@dataclass
class Expected:
    """What a rank stage should have made of its prompts, step by step and nothing shared with it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    identical: int = 0

    def add(
        self,
        row: int,
        prompt: list[int],
        candidates: Sequence[tuple[str, str, list[int]]],
        explored: list[int] | None,
        score: Scored,
        min_margin: float = 0.0,
    ) -> None:
        """candidates: names, texts and ids."""
        scores = [score(text) for _, text, _ in candidates]
        self.identical += len({tuple(ids) for _, _, ids in candidates}) < len(candidates)
        if len(candidates) < 2:
            self.skipped["fewer than two candidates"] += 1
            return
        if any(map(math.isnan, scores)):
            self.skipped["a score is NaN"] += 1
            return
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if max(scores) == min(scores):
            self.skipped["all scores tie"] += 1
        elif max(scores) - min(scores) < min_margin:
            self.skipped["margin below rank.min_margin"] += 1
        elif candidates[best][2] == candidates[worst][2]:
            self.skipped["chosen and rejected are identical"] += 1
        else:
            line = {"row": row, "prompt_ids": prompt}
            line |= {"chosen_ids": candidates[best][2], "rejected_ids": candidates[worst][2]}
            if explored is not None:
                line["reference_response_ids"] = explored
            line |= {"score_chosen": scores[best], "score_rejected": scores[worst]}
            line |= {"candidates": [name for name, _, _ in candidates], "scores": scores}
            self.rows.append(line | {"chosen_is": candidates[best][0], "rejected_is": candidates[worst][0]})

    def counts(self) -> dict[str, Any]:
        """The manifest's counts, from the rows alone."""
        explored = [row for row in self.rows if "reference_response_ids" in row]

        def mean(values: Sequence[float]) -> float | None:
            return pytest.approx(sum(values) / len(values)) if values else None

        tokens = {name: mean([len(row[f"{name}_ids"]) for row in self.rows]) for name in ("chosen", "rejected")}
        return {
            "prompts": len(self.rows) + self.skipped.total(),
            "groups": len(self.rows),
            "skipped": dict(self.skipped),
            "identical_candidates": self.identical,
            "chosen_is": dict(Counter(row["chosen_is"] for row in self.rows)),
            "rejected_is": dict(Counter(row["rejected_is"] for row in self.rows)),
            "explored_is_chosen": sum(row["reference_response_ids"] == row["chosen_ids"] for row in explored),
            "explored_is_rejected": sum(row["reference_response_ids"] == row["rejected_ids"] for row in explored),
            "mean_tokens": tokens | {"explored": mean([len(row["reference_response_ids"]) for row in explored])},
            "mean_score": {n: mean([row[f"score_{n}"] for row in self.rows]) for n in ("chosen", "rejected")},
            "responses_win": mean([row["chosen_is"].startswith("response ") for row in self.rows]),
        }


def offline_of(paths: Paths, source: str) -> tuple[list[TokenGroup], list[list[str]]]:
    """The rows as training tokenises them, and the texts of their chosen and rejected."""
    groups = load_groups(source, paths.config.data, load_tokenizer(paths.tokenizer), wants_explored=False).groups
    texts = []
    for row in lines(Path(source)):
        answers = [row["chosen"], row["rejected"]]
        texts.append([answer if isinstance(answer, str) else answer[-1]["content"] for answer in answers])
    return groups, texts


def counts_of(paths: Paths, number: int) -> dict[str, Any]:
    manifest = read_manifest(paths.stage(number, "rank"))
    assert manifest is not None
    return dict(manifest["counts"])


# Rows of whole runs.


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["selm", "xpo", "dpo first"])
def test_rows_and_counts_are_those_of_files_and_ranker(finished: Finished, name: str, number: int) -> None:
    paths = finished(name)
    config = paths.config.at(number)
    groups, texts = offline_of(paths, paths.train_rows)
    folder = paths.stage(number, "rollout")
    said = {stem: {line["row"]: line for line in shards(folder, stem)} for stem in ("policy", "base")}
    expected = Expected()
    for row in sorted(portion_of(12, number - 1, 2, config.seed)):
        found = {stem: by_row[row]["responses"] for stem, by_row in said.items() if row in by_row}
        candidates = [(f"response {n}", r["text"], r["ids"]) for n, r in enumerate(found.get("policy", []), 1)]
        candidates += [("base response", r["text"], r["ids"]) for r in found.get("base", [])]
        candidates = [candidate for candidate in candidates if candidate[1]]
        explorers = [ids for which, _, ids in candidates if which.startswith("base" if name == "xpo" else "response")]
        if config.rank.offline_pair:
            pair = zip(("chosen", "rejected"), texts[row], (groups[row].chosen, groups[row].rejected), strict=True)
            candidates += [(f"offline {which}", text, ids) for which, text, ids in pair]
        explored = explorers[0] if explorers and config.exploration_weight else None
        if config.rollout.responses:
            expected.add(row, groups[row].prompt, candidates, explored, reward)
        else:  # as the rows rank it
            expected.add(row, groups[row].prompt, candidates, None, lambda text, r=row: 1.0 - texts[r].index(text))
    assert lines(paths.stage(number, "rank") / "rows.jsonl") == expected.rows
    assert len(expected.rows) >= 4
    counts = counts_of(paths, number)
    counts.pop("held_out")
    assert counts == expected.counts()
    explores = config.exploration_weight != 0
    assert all(("reference_response_ids" in row) == explores for row in expected.rows)
    assert explores == (name != "dpo first" or number == 2)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["selm", "xpo"])
def test_held_out_rows_are_the_greedy_responses_of_the_iterate_before(
    finished: Finished, name: str, number: int
) -> None:
    paths = finished(name)
    assert paths.eval_rows is not None
    groups, texts = offline_of(paths, paths.eval_rows)
    expected = Expected()
    empty = 0
    for line in sorted(shards(paths.stage(number - 1, "evaluate"), "policy"), key=lambda line: line["row"]):
        row, (response,) = line["row"], line["responses"]
        if not response["text"]:
            empty += 1
            continue
        candidates = [("response 1", response["text"], response["ids"])]
        candidates += [("offline chosen", texts[row][0], groups[row].chosen)]
        candidates += [("offline rejected", texts[row][1], groups[row].rejected)]
        expected.add(row, groups[row].prompt, candidates, response["ids"], reward)
    folder = paths.stage(number, "rank")
    assert lines(folder / "held_out.jsonl") == expected.rows
    assert len(expected.rows) + empty == 5
    assert counts_of(paths, number)["held_out"] == expected.counts()


def test_no_held_out_prompts_no_held_out_rows(finished: Finished) -> None:
    paths = finished("dpo first")
    for number in (1, 2):
        assert counts_of(paths, number)["held_out"] is None
        assert not (paths.stage(number, "rank") / "held_out.jsonl").exists()


def test_rows_are_what_training_trains_on(finished: Finished) -> None:
    """Ids pass from the rollout to training as they are: no row is cut, left out or tokenised anew."""
    for name in ("selm", "xpo", "dpo first"):
        paths = finished(name)
        for number in (1, 2):
            config = paths.train_config(number)
            explores = config.exploration_weight != 0
            tokenizer = load_tokenizer(paths.tokenizer)
            groups = load_groups(config.data.train, config.data, tokenizer, wants_explored=explores).groups
            rows = lines(paths.stage(number, "rank") / "rows.jsonl")
            for row, group in zip(rows, groups, strict=True):
                names = ("prompt_ids", "chosen_ids", "rejected_ids", "reference_response_ids")
                assert [row.get(n) for n in names] == [group.prompt, group.chosen, group.rejected, group.explored]


# Responses and scores that are written by hand.


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows whose responses are `chosen <row>` and `rejected <row>`."""
    return [{"prompt": f"why {n}", "chosen": f"chosen {n}", "rejected": f"rejected {n}"} for n in range(count)]


@dataclass
class Bench:
    """One iteration over a few prompts, whose rollout and scores a test makes up.

    scores: by text.  offline: the rows as training tokenises them.
    """

    make_run: MakeRun
    folder: Path
    scores: dict[str, float]
    offline: list[TokenGroup] = field(default_factory=list)

    def config(self, rows: list[dict[str, Any]] | None = None, **settings: Any) -> RunConfig:
        """Settings of a run on these rows, or on six `pairs`."""
        source = str(write_rows(self.folder / "made_up.jsonl", rows or pairs(6)))
        values = {"iterations": 1, "data__train": source, "data__eval": None, "ranker": "python:a_table:score"}
        config = self.make_run(**values | settings)
        self.offline, _ = offline_of(Paths(config), source)
        return config

    def rank(
        self,
        config: RunConfig,
        responses: Mapping[int, Sequence[Response]] | None = None,
        base: Mapping[int, Sequence[Response]] | None = None,
        processes: int = 1,
    ) -> list[dict[str, Any]]:
        """Write a rollout and rank it; -> the rows. responses, base: by row; rows without get one of their own."""
        (self.folder / "a_table.py").write_text(TABLE_RANKER)
        (self.folder / "a_table.json").write_text(json.dumps(self.scores))
        if config.rollout.responses:
            rollout = job_of(config, "iter-1/rollout")
            rollout.folder.mkdir(parents=True, exist_ok=True)
            for stem, found in (("policy", responses or {}), *([("base", base)] if base else [])):
                shard = []
                for n, group in enumerate(self.offline):
                    said = [{"ids": i, "text": t, "finish": "stop"} for i, t in found.get(n, [([50 + n, 1], "half")])]
                    shard.append({"row": n, "prompt_ids": group.prompt, "responses": said})
                write_lines(rollout.folder / f"{stem}-00000.jsonl", shard)
            write_manifest(rollout, {}, 1.0)
        for index in range(processes):
            do_part(job_of(config, RANK, index=index, count=processes))
        finish(job_of(config, RANK, count=processes), 1.0)
        return lines(Paths(config).stage(1, "rank") / "rows.jsonl")


@pytest.fixture
def bench(make_run: MakeRun, tmp_path: Path) -> Bench:
    """`chosen <row>` scores .25 and `rejected <row>` 0; other texts are named for their score."""
    scores = {"best": 1.0, "half": 0.125, "worst": -1.0, "tied": 0.0, "no score": NAN}
    for pair in pairs(6):
        scores |= {pair["chosen"]: 0.25, pair["rejected"]: 0.0}
    return Bench(make_run, tmp_path, scores)


def test_prompts_without_a_pair_are_skipped_by_reason(bench: Bench) -> None:
    config = bench.config()
    chosen, rejected = bench.offline[2].chosen, bench.offline[3].rejected
    bench.scores |= {"chosen 0": 0.0}
    rows = bench.rank(
        config,
        {
            0: [([60, 1], "tied")],  # as do chosen 0 and rejected 0
            1: [([61, 1], "no score")],
            2: [(chosen, "worst")],  # another text of the very ids of the best candidate
            3: [(rejected, "rejected 3")],  # twice the worst: nothing to skip
            4: [([64, 1], "best")],
            5: [([1], "")],
        },
    )
    assert [row["row"] for row in rows] == [3, 4, 5]
    counts = counts_of(Paths(config), 1)
    assert counts["skipped"] == {"all scores tie": 1, "a score is NaN": 1, "chosen and rejected are identical": 1}
    assert (counts["prompts"], counts["groups"], counts["identical_candidates"]) == (6, 3, 2)
    assert counts["chosen_is"] == {"offline chosen": 2, "response 1": 1}
    # Of two equal ones the first has the name, and the explored response is it.
    assert (rows[0]["rejected_is"], rows[0]["rejected_ids"]) == ("response 1", rejected)
    assert rows[0]["reference_response_ids"] == rejected
    assert (counts["explored_is_chosen"], counts["explored_is_rejected"]) == (1, 1)
    # A response that says nothing is no candidate, and nothing to explore.
    assert rows[2]["candidates"] == ["offline chosen", "offline rejected"]
    assert "reference_response_ids" not in rows[2]
    assert counts["mean_tokens"]["explored"] == pytest.approx((len(rejected) + 2) / 2)
    assert counts["responses_win"] == pytest.approx(1 / 3)


def test_pairs_may_need_a_margin(bench: Bench) -> None:
    config = bench.config(rank__min_margin=0.5)
    rows = bench.rank(config, {2: [([62, 1], "best")], 3: [([63, 1], "worst")]})
    assert [(row["row"], row["score_chosen"], row["score_rejected"]) for row in rows] == [
        (2, 1.0, 0.0),
        (3, 0.25, -1.0),
    ]
    assert counts_of(Paths(config), 1)["skipped"] == {"margin below rank.min_margin": 4}


def test_responses_alone(bench: Bench) -> None:
    settings = {"rollout__responses": 3, "rollout__temperature": 1.0, "rank__offline_pair": False}
    config = bench.config(**settings)
    three = [([70, 1], "half"), ([71, 1], "best"), ([72, 1], "worst")]
    rows = bench.rank(
        config,
        {
            0: three,
            1: [([1], ""), *three[1:]],  # the first that says something is explored, and keeps its number
            2: [([1], ""), ([1], ""), three[2]],
            3: [([1], ""), ([1], ""), ([1], "")],
            4: [three[0]] * 3,
            5: [three[1], three[1], three[0]],
        },
    )
    assert [(row["row"], row["chosen_is"], row["rejected_is"]) for row in rows] == [
        (0, "response 2", "response 3"),
        (1, "response 2", "response 3"),
        (5, "response 1", "response 3"),
    ]
    assert [row["candidates"] for row in rows[:2]] == [
        ["response 1", "response 2", "response 3"],
        ["response 2", "response 3"],
    ]
    assert [row["reference_response_ids"] for row in rows] == [[70, 1], [71, 1], [71, 1]]
    counts = counts_of(Paths(config), 1)
    assert counts["skipped"] == {"fewer than two candidates": 2, "all scores tie": 1}
    assert counts["identical_candidates"] == 2
    assert counts["responses_win"] == 1.0


def test_the_base_explores(bench: Bench) -> None:
    """Its one response is explored even where the policy's is there, and nothing is where it said nothing."""
    config = bench.config(rollout__explored="base", method="xpo")
    own = ([80, 1], "best")
    rows = bench.rank(
        config,
        {n: [own] for n in range(6)},
        {0: [([81, 1], "worst")], 1: [([1], "")], 2: [own], 3: [([83, 1], "half")]},
    )
    assert [row.get("reference_response_ids") for row in rows[:4]] == [[81, 1], None, [80, 1], [83, 1]]
    assert rows[0]["candidates"] == ["response 1", "base response", "offline chosen", "offline rejected"]
    assert rows[1]["candidates"] == ["response 1", "offline chosen", "offline rejected"]
    assert [row["rejected_is"] for row in rows[:2]] == ["base response", "offline rejected"]
    counts = counts_of(Paths(config), 1)
    assert counts["explored_is_chosen"] == counts["explored_is_rejected"] == 1
    assert counts["responses_win"] == 1.0


def test_dpo_explores_nothing(bench: Bench) -> None:
    config = bench.config(method="dpo", alpha=0.0)
    rows = bench.rank(config, {0: [([90, 1], "best")]})
    assert rows[0]["chosen_is"] == "response 1"
    assert not any("reference_response_ids" in row for row in rows)


def test_without_responses_the_pair_is_as_the_rows_rank_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their scores where they bring any, and no ranker is asked."""
    rows = pairs(4)
    rows[0] |= {"score_chosen": 8.5, "score_rejected": 3}
    rows[1] |= {"score_chosen": 1.0, "score_rejected": 2.0}
    rows[2] |= {"score_chosen": math.inf, "score_rejected": 2.0}
    monkeypatch.setattr(PythonScorer, "__enter__", None)
    config = bench.config(rows, method="dpo", alpha=0.0, rollout__responses=0, ranker=None)
    found = bench.rank(config)
    assert [(row["chosen_is"], row["rejected_is"]) for row in found] == [("offline chosen", "offline rejected")] * 4
    assert [row["scores"] for row in found] == [[8.5, 3.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert [row["chosen_ids"] for row in found] == [group.chosen for group in bench.offline]
    assert [row["rejected_ids"] for row in found] == [group.rejected for group in bench.offline]
    # A margin is that of the rows' scores; their order alone has none.
    rows[3] |= {"score_chosen": 4.0, "score_rejected": 3.0}
    loose = {"rank__min_margin": 2.0, "rank__max_skipped": 0.5, "name": "margin"}
    config = bench.config(rows, method="dpo", alpha=0.0, rollout__responses=0, ranker=None, **loose)
    assert [row["row"] for row in bench.rank(config)] == [row["row"] for row in found[:3]]


def test_hazard_21_too_many_prompts_without_a_pair_fail(bench: Bench) -> None:
    config = bench.config(rank__max_skipped=0.5)
    bad = {n: [([60, 1], "no score")] for n in range(4)}
    assert len(bench.rank(config, {n: bad[n] for n in range(3)})) == 3
    config = bench.config(rank__max_skipped=0.5, name="more")
    with pytest.raises(RunFailed, match=r"4 of 6 prompts \(66\.7%\) gave no pair; at most rank.max_skipped = 50\.0%"):
        bench.rank(config, bad)
    folder = Paths(config).stage(1, "rank")
    assert not (folder / "rows.jsonl").exists()
    assert read_manifest(folder) is None
    bench.scores["no score"] = 0.5
    assert len(bench.rank(config, bad)) == 6  # by a ranker that was corrected: nothing of the first attempt is left
    bench.scores["no score"] = NAN
    config = bench.config(rank__max_skipped=1.0, name="none")
    with pytest.raises(RunFailed, match=r"none of 6 prompts gave a pair to train on:\s+6  a score is NaN"):
        bench.rank(config, {n: [([60, 1], "no score")] for n in range(6)})


def test_rows_skipped_before_they_had_candidates_count_and_are_no_fault_of_the_ranker(bench: Bench) -> None:
    rows = [*pairs(5), {**pairs(1)[0], "prompt": " "}]
    config = bench.config(rows, data__max_skipped=0.5, rank__max_skipped=0.0)
    assert len(bench.rank(config)) == 5
    assert counts_of(Paths(config), 1)["skipped"] == {"empty prompt": 1}
    assert counts_of(Paths(config), 1)["prompts"] == 6
    bench.scores["no score"] = NAN
    config = bench.config(rows, name="nan", data__max_skipped=0.5, rank__max_skipped=0.1)
    with pytest.raises(RunFailed, match=r"1 of 5 prompts \(20\.0%\) gave no pair(.|\n)*1  a score is NaN") as failure:
        bench.rank(config, {0: [([60, 1], "no score")]})
    assert "empty prompt" not in str(failure.value)


def test_rows_do_not_depend_on_processes_or_batches(bench: Bench) -> None:
    responses = {0: [([60, 1], "best")], 1: [([61, 1], "worst")], 2: [([62, 1], "")], 5: [([65, 1], "tied")]}
    found = []
    for name, processes, batch, shard in (("one", 1, 64, 256), ("two", 2, 1, 2), ("many", 5, 2, 1)):
        config = bench.config(name=name, rank__batch_prompts=batch, rollout__shard_prompts=shard)
        bench.rank(config, responses, processes=processes)
        found.append(((Paths(config).stage(1, "rank") / "rows.jsonl").read_bytes(), counts_of(Paths(config), 1)))
    assert found[0] == found[1] == found[2]


def test_what_is_ranked_is_not_ranked_again(bench: Bench) -> None:
    config = bench.config(rollout__shard_prompts=2, ranker="python:the_ranker:score")
    calls = bench.folder / "the_ranker.py.calls"
    expected = bench.rank(config)
    asked = calls.read_text().splitlines()
    calls.unlink()
    again = bench.config(name="again", rollout__shard_prompts=2, ranker="python:the_ranker:score")
    bench.rank(again)  # writes the rollout
    calls.unlink()
    folder = Paths(again).stage(1, "rank")
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(Stopped, match="stopped in iter-1/rank; what is ranked is saved"):
        do_part(job_of(again, RANK, stop=StopAfter(2)))
    assert calls.read_text().splitlines() == asked[:4]
    assert bench.rank(again) == expected
    assert calls.read_text().splitlines() == asked


def test_a_rollout_that_was_changed_is_not_ranked(bench: Bench) -> None:
    config = bench.config()
    bench.rank(config)
    shard = Paths(config).stage(1, "rollout") / "policy-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"half", b"best"))
    with pytest.raises(RunFailed, match="policy-00000.jsonl was changed since its stage was done"):
        do_part(job_of(config, RANK))
