"""Rollout: how prompts are cut into shards, what is in them, and that neither a stop nor the processes change it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selm_fast.config import RunConfig
from selm_fast.data.dataset import load_groups
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration.job import read_manifest
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.prompts import portion_of
from selm_fast.iteration.rollout import check_cut
from selm_fast.iteration.shards import plan_shards
from selm_fast.iteration.stages import do_part, finish
from selm_fast.training.progress import Display

from ..training.harness import own_model
from .harness import Finished, MakeRun, StopAfter, job_of, lines, shards

ROLLOUT = "iter-1/rollout"
SAMPLED = {"rollout__responses": 2, "rollout__temperature": 1.0, "rollout__shard_prompts": 3}


def files_of(folder: Path) -> dict[str, bytes]:
    """The shards of a rollout."""
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def roll_out(config: RunConfig, count: int = 1) -> dict[str, bytes]:
    """The shards of the first iteration, by so many processes."""
    for index in range(count):
        do_part(job_of(config, ROLLOUT, index=index, count=count))
    return files_of(Paths(config).stage(1, "rollout"))


# Which prompts meet.


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    copies=st.integers(1, 4),
    max_new_tokens=st.integers(1, 30),
    spare=st.integers(0, 900),
    shard_prompts=st.integers(1, 20),
)
def test_shards_hold_every_prompt_once_in_batches_that_fit(
    lengths: list[int], copies: int, max_new_tokens: int, spare: int, shard_prompts: int
) -> None:
    budget = copies * (max(lengths) + max_new_tokens) + spare
    found = plan_shards(
        lengths, stem="policy", copies=copies, max_new_tokens=max_new_tokens, max_tokens=budget,
        shard_prompts=shard_prompts,
    )  # fmt: skip
    assert [shard.name for shard in found] == [f"policy-{number:05d}.jsonl" for number in range(len(found))]
    batches = [batch for shard in found for batch in shard.batches]
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)

    def padded(batch: Sequence[int], more: int = 0) -> int:
        return copies * (len(batch) + more) * (max(lengths[index] for index in batch) + max_new_tokens)

    assert all(padded(batch) <= budget for batch in batches)
    assert all(padded(batch, 1) > budget for batch in batches[:-1])  # none could take one prompt more
    for shard in found:
        assert shard.num_prompts == sum(map(len, shard.batches))
        assert sum(map(len, shard.batches[:-1])) < shard_prompts  # full, and then no batch is added
    assert all(shard.num_prompts >= shard_prompts for shard in found[:-1])


def test_a_prompt_that_no_batch_holds_is_refused() -> None:
    settings: dict[str, Any] = {"stem": "x", "copies": 2, "max_new_tokens": 10, "shard_prompts": 4}
    assert plan_shards([5, 20, 7], max_tokens=60, **settings)
    with pytest.raises(Refused, match="max_tokens is 59; 2 responses of 10 tokens to a prompt of 20 take 60: raise it"):
        plan_shards([5, 20, 7], max_tokens=59, **settings)
    assert plan_shards([], max_tokens=60, **settings) == []


# What is in the shards.


def test_responses_are_those_of_the_iterate_before_and_of_the_base(finished: Finished) -> None:
    """Greedy: each is what transformers' own `generate` says, one prompt at a time, by the model it should be of."""
    paths = finished("xpo")
    said: dict[tuple[int, str], list[list[int]]] = {}
    rows: dict[int, set[int]] = {1: set(), 2: set()}
    for number in (1, 2):
        models = {"policy": paths.start if number == 1 else paths.stage(1, "train") / "model", "base": paths.start}
        for stem, folder in models.items():
            own = own_model(folder, torch.float32)
            found = shards(paths.stage(number, "rollout"), stem)
            assert {line["row"] for line in found} == portion_of(12, number - 1, 2, paths.config.seed)
            assert len(found) == 6
            rows[number] |= {line["row"] for line in found}
            said[number, stem] = []
            for line in found:
                ids = torch.tensor([line["prompt_ids"]])
                output = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
                (response,) = line["responses"]
                assert response["ids"] == output[0, ids.shape[1] :].tolist()
                assert response["finish"] == ("stop" if response["ids"][-1] == 1 else "length")
                said[number, stem].append(response["ids"])
    assert said[1, "policy"] == said[1, "base"]
    assert said[2, "policy"] != said[2, "base"]
    assert rows[1] | rows[2] == set(range(12))
    assert not rows[1] & rows[2]


@pytest.mark.parametrize("name", ["selm", "xpo", "dpo first"])
def test_prompts_are_those_of_training_and_texts_are_what_the_ids_say(finished: Finished, name: str) -> None:
    paths = finished(name)
    tokenizer = load_tokenizer(paths.tokenizer)
    groups = load_groups(paths.train_rows, paths.config.data, tokenizer, wants_explored=False).groups
    backend = tokenizer.hf.backend_tokenizer
    for number in (1, 2):
        copies = paths.config.at(number).rollout.responses
        found = shards(paths.stage(number, "rollout"), "policy")
        assert len(found) == (6 if copies else 0)
        texts = []
        for line in found:
            assert line["prompt_ids"] == groups[line["row"]].prompt
            assert len(line["responses"]) == copies
            for response in line["responses"]:
                assert response["text"] == backend.decode(response["ids"], skip_special_tokens=True).strip()
                assert 1 not in response["ids"][:-1]
                assert (response["ids"][-1] == 1) == (response["finish"] == "stop")
                assert len(response["ids"]) == 8 or response["finish"] == "stop"
                texts.append(response["text"])
        assert not any("<|" in text for text in texts)
    assert any(response["finish"] == "stop" for line in found for response in line["responses"])


def test_counts_are_those_of_the_shards(finished: Finished) -> None:
    for name in ("xpo", "dpo first"):
        paths = finished(name)
        manifest = read_manifest(paths.stage(2, "rollout"))
        assert manifest is not None
        counts = manifest["counts"]
        passes = [shards(paths.stage(2, "rollout"), stem) for stem in ("policy", "base")]
        responses = [response for found in passes for line in found for response in line["responses"]]
        assert counts["prompts"] == 6
        assert counts["responses"] == len(responses) == (12 if name == "xpo" else 18)
        assert counts["skipped"] == {}
        for finish_ in ("stop", "length"):
            assert counts["finish"][finish_] == sum(response["finish"] == finish_ for response in responses)
        lengths = sorted(len(response["ids"]) for response in responses)
        assert counts["tokens"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert counts["tokens"]["max"] == lengths[-1]
        assert counts["tokens"]["median"] == lengths[(len(lengths) - 1) // 2]
        assert len(manifest["files"]) == len(files_of(paths.stage(2, "rollout"))) >= 2


# What must not matter.


@pytest.mark.parametrize("changes", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_shards_do_not_depend_on_the_processes(make_run: MakeRun, ending_model: Path, changes: dict[str, Any]) -> None:
    changes = {"model__path": str(ending_model), "rollout__max_tokens": 80, **changes}
    alone = roll_out(make_run("alone", **changes))
    assert len(alone) >= 2
    assert roll_out(make_run("many", **changes), 3) == alone
    responses = [
        r["ids"] for data in alone.values() for line in data.splitlines() for r in json.loads(line)["responses"]
    ]
    if changes.get("rollout__responses"):
        assert len({tuple(ids) for ids in responses}) > 6  # no two shards of one seed, no copies that are equal


def test_parts_make_different_shards(make_run: MakeRun) -> None:
    config = make_run(**SAMPLED)
    names = []
    for index in range(2):
        before = set(files_of(Paths(config).stage(1, "rollout")))
        do_part(job_of(config, ROLLOUT, index=index, count=2))
        names.append(set(files_of(Paths(config).stage(1, "rollout"))) - before)
    assert names == [{"policy-00000.jsonl"}, {"policy-00001.jsonl"}]


def test_seed_and_iteration_change_samples(make_run: MakeRun) -> None:
    found = [
        roll_out(make_run(name, portions=1, seed=seed, **SAMPLED)) for name, seed in (("a", 1), ("b", 2), ("c", 1))
    ]
    assert found[0] == found[2] != found[1]
    config = make_run("a", portions=1, seed=1, **SAMPLED)
    again = Paths(config).stage(2, "rollout")
    shutil.copytree(config.model.path, Paths(config).stage(1, "train") / "model")
    do_part(job_of(config, "iter-2/rollout"))  # of the same model on the same prompts
    assert [line["row"] for line in shards(again, "policy")] == [
        line["row"] for line in shards(Paths(config).stage(1, "rollout"), "policy")
    ]
    assert files_of(again) != found[0]


@pytest.mark.parametrize("changes", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_shards_do_not_depend_on_a_stop(make_run: MakeRun, ending_model: Path, changes: dict[str, Any]) -> None:
    # one prompt a batch, so that there is a stop inside a shard too
    changes = {"model__path": str(ending_model), "rollout__max_tokens": 80 if changes else 45, **changes}
    expected = roll_out(make_run("whole", **changes))
    config = make_run("stopped", **changes)
    folder = Paths(config).stage(1, "rollout")
    seen: list[int] = []
    for looks in (0, 2, 3):  # before the first batch, and at later ones
        with pytest.raises(Stopped, match=r"stopped in iter-1/rollout; \d+ of 6 prompts have their responses"):
            do_part(job_of(config, ROLLOUT, stop=StopAfter(looks)))
        assert files_of(folder).items() <= expected.items()
        seen.append(len(files_of(folder)))
    assert seen[0] == 0 < seen[-1] < len(expected)
    assert roll_out(config) == expected


def test_a_finished_shard_is_not_made_again(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run()
    roll_out(config)
    monkeypatch.setattr("selm_fast.iteration.generate.Generator", None)
    roll_out(config)
    (Paths(config).stage(1, "rollout") / "policy-00001.jsonl").unlink()
    with pytest.raises(TypeError):  # there is something to generate again
        roll_out(config)


def test_the_random_state_of_the_process_is_left_as_it_was(make_run: MakeRun) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    roll_out(make_run(**SAMPLED))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    roll_out(make_run("again", **SAMPLED))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(3), expected)


# Where it fails.


def test_hazard_22_cut_responses_warn_and_then_fail(make_run: MakeRun) -> None:
    def check(cut: int, of: int, limit: float) -> str:
        said = io.StringIO()
        display = Display(console=Console(file=said, width=500, soft_wrap=True))
        job = job_of(make_run(data__max_cut=limit), ROLLOUT, display=display)
        responses = [{"finish": "length" if index < cut else "stop"} for index in range(of)]
        assert check_cut(job, responses) == cut / of
        return said.getvalue()

    assert check(5, 10, 0.9) == check(0, 10, 0.9) == ""
    assert check(6, 10, 0.9) == "warning: 60% of 10 responses were cut at rollout.max_new_tokens = 8\n"
    assert "90% of 10" in check(9, 10, 0.9)
    with pytest.raises(RunFailed, match=r"91% of 100 .* at most data\.max_cut = 90% may be: raise one of the two"):
        check(91, 100, 0.9)


def test_hazard_22_a_rollout_of_cut_responses_is_no_finished_stage(make_run: MakeRun) -> None:
    config = make_run(data__max_cut=0.5)
    roll_out(config)
    job = job_of(config, ROLLOUT)
    assert all(r["finish"] == "length" for line in shards(job.folder, "policy") for r in line["responses"])
    with pytest.raises(RunFailed, match=r"100% of 6 responses were cut .* may lack its EOS"):
        finish(job, 1.0)
    assert read_manifest(job.folder) is None


def test_shards_that_lack_a_prompt_are_no_finished_stage(make_run: MakeRun) -> None:
    config = make_run()
    roll_out(config)
    job = job_of(config, ROLLOUT)
    path = job.folder / "policy-00000.jsonl"
    first = lines(path)[0]
    path.write_text(json.dumps(first) + "\n" + json.dumps(first) + "\n")
    with pytest.raises(RunFailed, match="the policy shards do not hold every prompt once"):
        finish(job, 1.0)
    path.unlink()
    with pytest.raises(RunFailed, match="the policy shards do not hold every prompt once"):
        finish(job, 1.0)
    assert read_manifest(job.folder) is None
