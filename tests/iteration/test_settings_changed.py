"""Which stages another setting, other rows or another model invalidate, and that `redo` does these again, no others."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import plan_stages
from selm_fast.iteration.sources import identities
from selm_fast.iteration.status import look

from ..training.harness import KILLED, in_child, write_model
from .harness import MakeRun, planned, run_inline
from .runs import RESUMABLE, CopyOfWhole, assert_same_results, contents, states

pytestmark = pytest.mark.usefixtures("plain_report")

LOOP = ("rollout", "rank", "cache", "train", "evaluate")
EVALUATIONS = tuple(f"iter-{number}/evaluate" for number in (0, 1, 2))
SECOND = tuple(f"iter-2/{name}" for name in LOOP)
FIRST = tuple(f"iter-1/{name}" for name in LOOP)
ALL = ("iter-0/evaluate", *FIRST, *SECOND)


def own(*names: str, number: int) -> tuple[str, ...]:
    return tuple(f"iter-{number}/{name}" for name in names)


# What changes; the stages that it invalidates; of those, what is said of the first.
CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "learning rate": (
        {"optim__lr": 2e-2},
        (*own("train", "evaluate", number=1), *SECOND),
        "iter-1/train: optim.lr: 0.01 there, 0.02 here",
    ),
    "learning rate of one iteration": (
        {"iteration": {2: {"optim": {"lr": 2e-2}}}},
        own("train", "evaluate", number=2),
        "iter-2/train: optim.lr: 0.01 there, 0.02 here",
    ),
    "beta": ({"beta": 0.2}, (*own("train", "evaluate", number=1), *SECOND), "iter-1/train: beta: 0.1 there, 0.2 here"),
    "alpha": ({"alpha": 0.02}, (*own("train", "evaluate", number=1), *SECOND), "iter-1/train: alpha: 0.01 there"),
    "method that explores too": (
        {"iteration": {2: {"method": "xpo"}}},
        own("train", "evaluate", number=2),
        "iter-2/train: method: selm there, xpo here",
    ),
    "method that does not explore": (
        {"iteration": {2: {"method": "dpo"}}},
        SECOND,
        "iter-2/rollout: made from another base",
    ),
    "margin": (
        {"rank__min_margin": 0.2},
        (*own("rank", "cache", "train", "evaluate", number=1), *SECOND),
        "iter-1/rank: rank.min_margin: 0.0 there, 0.2 here",
    ),
    "margin of one iteration": (
        {"iteration": {2: {"rank": {"min_margin": 0.2}}}},
        own("rank", "cache", "train", "evaluate", number=2),
        "iter-2/rank: rank.min_margin: 0.0 there, 0.2 here",
    ),
    "offline pair": (
        {"rank__offline_pair": False},
        (*FIRST, *SECOND),
        "iter-1/rollout: rank.offline_pair: True there, False here",
    ),
    "ranker": (
        {"ranker": "python:the_ranker:reward"},
        (*EVALUATIONS[:1], *own("rank", "cache", "train", "evaluate", number=1), *SECOND),
        "iter-0/evaluate: ranker: python:the_ranker:score there, python:the_ranker:reward here",
    ),
    "temperature": (
        {"rollout__temperature": 0.7},
        (*FIRST, *SECOND),
        "iter-1/rollout: rollout.temperature: 1.0 there, 0.7 here",
    ),
    "temperature of one iteration": (
        {"iteration": {2: {"rollout": {"temperature": 0.7}}}},
        SECOND,
        "iter-2/rollout: rollout.temperature: 1.0 there, 0.7 here",
    ),
    "top_p": ({"rollout__top_p": 0.9}, (*FIRST, *SECOND), "iter-1/rollout: rollout.top_p: 1.0 there, 0.9 here"),
    "responses": ({"rollout__responses": 3}, (*FIRST, *SECOND), "iter-1/rollout: rollout.responses: 2 there, 3 here"),
    "length of responses": ({"rollout__max_new_tokens": 9}, ALL, "iter-0/evaluate: rollout.max_new_tokens: 8 there"),
    "prompts of a shard": ({"rollout__shard_prompts": 3}, ALL, "iter-0/evaluate: rollout.shard_prompts: 2 there"),
    "tokens of a batch of responses": ({"rollout__max_tokens": 300}, ALL, "iter-0/evaluate: rollout.max_tokens: 200"),
    "engine": (
        {"rollout__engine": "server", "rollout__servers": "http://127.0.0.1:9"},
        ALL,
        "iter-0/evaluate: rollout.engine: transformers there, server here",
    ),
    "seed": ({"seed": 43}, ALL, "iter-0/evaluate: seed: 42 there, 43 here"),
    "length of rows": ({"data__max_length": 60}, ALL, "iter-0/evaluate: data.max_length: 64 there, 60 here"),
    "held-out prompts": (
        {"evaluation__prompts": 4},
        tuple(title for title in ALL if title != "iter-1/rollout"),  # held-out groups are ranked beside the others
        "iter-0/evaluate: evaluation.prompts: None there, 4 here",
    ),
    "no held-out prompts": (
        {"data__eval": None},
        tuple(t for t in ALL if t != "iter-1/rollout" and not t.endswith("evaluate")),
        "iter-1/rank: made from another held_out",
    ),
    "reference": (
        {"reference": "base"},
        own("cache", "train", "evaluate", number=2),
        "iter-2/cache: made from another",
    ),
    "portions": ({"portions": 3}, (*FIRST, *SECOND), "iter-1/rollout: portions: 2 there, 3 here"),
    "epochs": ({"epochs": 2}, (*own("train", "evaluate", number=1), *SECOND), "iter-1/train: epochs: 1 there, 2 here"),
    "groups of a step": (
        {"batch__groups": 2},
        (*own("cache", "train", "evaluate", number=1), *SECOND),
        "iter-1/cache: batch.groups: 3 there, 2 here",
    ),
    "tokens of a micro-batch": (
        {"batch__max_tokens": 200},
        (*EVALUATIONS[:1], *own("rank", "cache", "train", "evaluate", number=1), *SECOND),
        "iter-0/evaluate: batch.max_tokens: 240 there, 200 here",
    ),
    "activation checkpointing": (
        {"model__activation_checkpointing": "full"},
        (*own("train", "evaluate", number=1), *SECOND),
        "iter-1/train: model.activation_checkpointing: none there, full here",
    ),
    "steps between evaluations": (
        {"eval_every": 1},
        (*own("train", "evaluate", number=1), *SECOND),
        "iter-1/train: eval_every: None there, 1 here",
    ),
}
# What no result depends on.
FREE: dict[str, dict[str, Any]] = {
    "steps between looks": {"log__every": 2},
    "TensorBoard": {"log__tensorboard": True},
    "checkpoints": {"checkpoint__every": 5, "checkpoint__keep": 3},
    "processes": {"processes": 2},
    "prompts of a call": {"rank__batch_prompts": 5},
    "time of a call": {"rank__timeout_s": 1.0},
    "patience with servers": {"rollout__concurrency": 3, "rollout__timeout_s": 9.0, "rollout__wait_s": 9.0},
    "limits": {"rank__max_skipped": 0.8, "data__max_cut": 0.95, "data__max_skipped": 0.5, "max_bad_steps": 2},
    "what the defaults say": {"portions": 2, "label_smoothing": 0.0, "rollout__top_p": 1.0},
    "an iteration set to what all are": {"iteration": {1: {"optim": {"lr": 1e-2}}}},
}


@pytest.fixture
def untouched(whole: Paths) -> Iterator[None]:
    """The finished run is to the byte what it was."""
    before = contents(whole.root)
    yield
    assert contents(whole.root) == before


def change_a_word(path: Path) -> None:
    """As many bytes as before, one word of them another."""
    text = path.read_text("utf-8")
    assert "blue" in text
    path.write_text(text.replace("blue", "pink", 1), "utf-8")


def changed(config: Any) -> tuple[str, ...]:
    return tuple(title for title, state in states(config).items() if state == "changed")


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_setting_is_refused_with_the_stages_that_it_invalidates(
    make_run: MakeRun, whole: Paths, untouched: None, what: str
) -> None:
    changes, stages, said = CHANGES[what]
    config = make_run(**RESUMABLE | changes, output_dir=whole.root)
    assert changed(config) == stages
    with pytest.raises(Refused) as caught:
        run_inline(config)
    message = str(caught.value)
    assert message.startswith(f"{whole.root} holds stages that were made with other settings or from other inputs:\n")
    named = re.findall(r"^  (iter-\d/\w+): ", message, re.MULTILINE)
    assert tuple(named) == stages
    assert f"\n  {said}" in message
    assert "do these stages again with --redo" in message


@pytest.mark.parametrize("what", FREE)
def test_settings_that_no_result_depends_on_may_change(
    make_run: MakeRun, whole: Paths, untouched: None, what: str
) -> None:
    config = make_run(**RESUMABLE | FREE[what], output_dir=whole.root)
    assert set(states(config).values()) == {"done"}


def test_a_finished_run_takes_on_such_settings_and_does_nothing_else(copy_of_whole: CopyOfWhole, whole: Paths) -> None:
    config = copy_of_whole(**FREE["steps between looks"])
    assert run_inline(config).calls == []
    assert_same_results(whole.root, Paths(config).root)
    assert json.loads(Paths(config).record.read_text())["config"]["log"]["every"] == 2


def test_one_more_iteration_leaves_those_before_it_as_they_are(copy_of_whole: CopyOfWhole, whole: Paths) -> None:
    config = copy_of_whole(iterations=3, portions=2)
    launcher = run_inline(config)
    assert launcher.calls == [f"iter-3/{name}" for name in LOOP]
    root = Paths(config).root
    assert (root / "model/model.safetensors").samefile(root / "iter-3/train/model/model.safetensors")
    assert (root / "iter-2/train/model/model.safetensors").read_bytes() == (
        whole.root / "iter-2/train/model/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("source", "stages", "said"),
    [
        ("prompts.jsonl", ALL[1:], "iter-1/rollout: made from another data"),
        ("held_out.jsonl", tuple(t for t in ALL if t != "iter-1/rollout"), "iter-0/evaluate: made from another eval"),
    ],
)
def test_other_rows_in_the_same_file_are_seen(
    make_run: MakeRun, whole: Paths, untouched: None, tmp_path: Path, source: str, stages: tuple[str, ...], said: str
) -> None:
    config = make_run(**RESUMABLE, output_dir=whole.root)
    assert not changed(config)
    path = tmp_path / source
    change_a_word(path)
    assert changed(config) == stages
    with pytest.raises(Refused, match=said):
        run_inline(config)


def test_rows_that_were_written_again_as_they_were_are_the_same(
    make_run: MakeRun, whole: Paths, untouched: None, tmp_path: Path
) -> None:
    config = make_run(**RESUMABLE, output_dir=whole.root)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert set(states(config).values()) == {"done"}


def test_other_weights_in_the_same_folder_are_seen(
    make_run: MakeRun, whole: Paths, untouched: None, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    config = make_run(**RESUMABLE, output_dir=whole.root, model__path=str(model))
    assert not changed(config)  # the same bits elsewhere
    tensors = safetensors.torch.load((model / "model.safetensors").read_bytes())
    tensors["lm_head.weight"][0, 0] += 1e-3
    (model / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    assert changed(config) == ALL
    with pytest.raises(Refused, match="iter-0/evaluate: made from another model"):
        run_inline(config)


def test_another_template_in_the_folder_of_the_tokenizer_is_seen(
    make_run: MakeRun, copy_of_whole: CopyOfWhole, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("chat_template*")):
        shutil.copy(path, folder)
    config = copy_of_whole(model__tokenizer=str(folder))
    run_inline(config, redo=True)
    assert not changed(config)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert changed(config) == ALL
    with pytest.raises(Refused, match="iter-0/evaluate: made from another tokenizer"):
        run_inline(config)


def test_other_rows_in_a_folder_of_a_dataset_are_seen(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    (folder / "data/train.parquet").write_bytes(b"some rows")
    paths, held_out = (Paths(make_run(data__train=f"{folder}:{split}")) for split in ("train", "test"))
    found, files = identities(paths, {})
    assert identities(paths, files) == (found, files)
    assert identities(held_out, {})[0]["data"] != found["data"]
    (folder / "data/train.parquet").write_bytes(b"other rows")
    assert identities(paths, files)[0]["data"] != found["data"]


def test_another_name_on_a_hub_is_another_source(make_run: MakeRun) -> None:
    first, second = (
        Paths(make_run(model__path=f"{name}/model", data__train=f"{name}/rows:train")) for name in ("one", "other")
    )
    found, files = identities(first, {})
    assert found["model"] == "one/model"
    again, _ = identities(second, files)
    assert again == found | {"model": "other/model", "data": "other/rows:train"}


def test_files_are_read_again_only_where_size_or_time_say_so(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(make_run())
    found, files = identities(paths, {})
    known = json.loads(json.dumps(files))  # as from run.json
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert identities(paths, known) == (found, files)
    path = tmp_path / "prompts.jsonl"
    change_a_word(path)
    again, _ = identities(paths, known)
    assert {name for name in found if found[name] != again[name]} == {"data"}


@pytest.mark.parametrize(
    "what", ["learning rate of one iteration", pytest.param("temperature", marks=pytest.mark.slow)]
)
def test_redo_does_the_invalid_stages_again_and_no_others(
    copy_of_whole: CopyOfWhole, make_run: MakeRun, what: str
) -> None:
    changes, stages, _ = CHANGES[what]
    config = copy_of_whole(**changes)
    root = Paths(config).root
    log = root / "iter-2/logs/train.log"
    log.parent.mkdir()
    log.write_text("of what is done again")
    kept = {p: made for p, made in contents(root).items() if any(f"/{t}/" in p for t in ALL if t not in stages)}
    assert run_inline(config, redo=True).calls == list(stages)
    after = contents(root)
    assert {path: after[path] for path in kept} == kept
    assert not log.exists()
    fresh = make_run("fresh", **RESUMABLE | changes)
    run_inline(fresh)
    assert_same_results(Paths(fresh).root, root)
    assert run_inline(config).calls == []


def test_redo_that_is_killed_while_it_removes_stages_goes_on(copy_of_whole: CopyOfWhole, make_run: MakeRun) -> None:
    changes, stages, _ = CHANGES["margin"]
    config = copy_of_whole(**changes)
    root = Paths(config).root
    for number in (1, 2, 3):

        def work(number: int = number) -> None:
            """Dies in the n-th removal of a folder, with half of its files gone."""
            rmtree, removals = shutil.rmtree, 0

            def dying(path: Path, **_: Any) -> None:
                nonlocal removals
                removals += 1
                if removals == number:
                    for file in [file for file in sorted(path.rglob("*")) if file.is_file()][::2]:
                        file.unlink()
                    os._exit(KILLED)
                rmtree(path, ignore_errors=True)

            shutil.rmtree = dying  # type: ignore[assignment]
            run_inline(config, redo=True)

        assert in_child(work) == KILLED
        left = len(stages) - sum(range(number + 1))
        assert changed(config) == stages[:left]
        assert {states(config)[title] for title in stages[left:]} == {"to do"}
    with pytest.raises(Refused, match="--redo"):
        run_inline(config)
    assert run_inline(config, redo=True).calls == list(stages)
    fresh = make_run("fresh", **RESUMABLE | changes)
    run_inline(fresh)
    assert_same_results(Paths(fresh).root, root)


def test_redo_of_a_run_that_nothing_changed_does_nothing(whole: Paths, untouched: None) -> None:
    assert run_inline(whole.config, redo=True).calls == []


def test_a_stage_that_was_refused_before_it_made_anything_is_no_obstacle(make_run: MakeRun) -> None:
    """The setting that its message asks to change may be changed."""
    with pytest.raises(Refused, match="rollout.max_tokens is 20; 1 responses of 8 tokens to a prompt of .*: raise it"):
        run_inline(make_run(rollout__max_tokens=20))
    assert run_inline(make_run(), until="rollout").calls == ["iter-0/evaluate", "iter-1/rollout"]


def test_limits_may_be_raised_after_a_stage_failed_at_them(make_run: MakeRun, whole: Paths) -> None:
    with pytest.raises(RunFailed, match="at most data.max_cut = 10% may be"):
        run_inline(make_run(**RESUMABLE, data__max_cut=0.1))
    config = make_run(**RESUMABLE)
    before = contents(Paths(config).root / "iter-0/evaluate")
    assert before
    run_inline(config)
    assert before.items() <= contents(Paths(config).root / "iter-0/evaluate").items()
    assert_same_results(whole.root, Paths(config).root)


def test_every_setting_of_a_run_is_named_above_or_belongs_to_no_stage(whole: Paths) -> None:
    """The settings in the keys, so that a new one is thought about."""
    stages = plan_stages(whole.config, identities(whole, {})[0])
    assert all(status.state == "done" for status in look(whole, stages))
    names = {name for stage in planned(whole.config).values() for name in stage.settings}
    fields: set[str] = set()
    for name, value in whole.config.to_json().items():
        nested = isinstance(value, dict) and name != "iteration"
        fields |= {f"{name}.{inner}" for inner in value} if nested else {name}
    free = {
        "output_dir", "max_bad_steps", "timeout_s", "iterations", "reference", "prepare", "processes", "iteration",
        "model.path", "model.init", "model.reference", "model.tokenizer", "data.train", "data.eval", "data.max_skipped",
        "data.max_cut",
        "cache.dir", "cache.require", "log.every", "log.tensorboard", "checkpoint.every", "checkpoint.keep",
        "rank.batch_prompts", "rank.timeout_s", "rank.max_skipped", "rollout.servers", "rollout.concurrency",
        "rollout.timeout_s", "rollout.wait_s",
        "pairrm.path", "pairrm.dtype", "pairrm.max_tokens",  # where PairRM is not the ranker
    }  # fmt: skip
    assert fields - names == free
    assert names - fields == {"explores"}
