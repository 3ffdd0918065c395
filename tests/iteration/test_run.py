"""A whole run: what it leaves, what it skips, where it stops, whose folders it keeps its hands off."""

from __future__ import annotations

import hashlib
import json
import shutil
from io import StringIO
from typing import Any

import pytest
import transformers
from rich.console import Console

from selm_fast.config import RunConfig
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration import run as run_module
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.run import drive, run
from selm_fast.training.cache_identity import versions
from selm_fast.training.progress import Display

from .harness import Inline, MakeRun, planned, run_inline
from .runs import RESUMABLE, CopyOfWhole, assert_same_results, contents, states

pytestmark = pytest.mark.usefixtures("plain_report")


def output_of(config: RunConfig) -> tuple[str, list[str]]:
    """What a run prints, and the stages it did."""
    launcher = Inline(Paths(config))
    console = Console(file=StringIO(), width=200)
    drive(Paths(config), launcher, Display(console=console), launcher.stop, until=None, redo=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue(), launcher.calls


def test_every_stage_leaves_a_manifest_of_what_it_was_made_from_and_of_its_files(whole: Paths) -> None:
    stages = planned(whole.config)
    assert len(stages) == 1 + 2 * 5
    for title, stage in stages.items():
        folder = whole.root / title
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        files.pop("manifest.json")
        assert manifest.pop("counts")
        assert manifest.pop("seconds") > 0
        assert manifest == {
            "stage": stage.name,
            "iteration": stage.iteration,
            "key": stage.key,
            "settings": stage.settings,
            "inputs": stage.inputs,
            "processes": 1,
            "versions": versions(),
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
            },
        }
        assert bool(files) == (stage.name != "cache")  # whose shards have a manifest of their own
    # What a stage reads is the output of another, by key, or what the run began with.
    sources = json.loads(whole.record.read_text("utf-8"))["sources"]
    known = {stage.key for stage in stages.values()} | {source["identity"] for source in sources.values()}
    assert {key for stage in stages.values() for key in stage.inputs.values()} <= known


def test_a_finished_run_has_a_model_a_report_and_nothing_half_done(whole: Paths) -> None:
    record = json.loads(whole.record.read_text("utf-8"))
    assert record["done"] is True
    assert record["config"] == whole.config.to_json()
    trained = whole.root / "iter-2/train/model"
    assert {path.name for path in whole.model.iterdir()} == {path.name for path in trained.iterdir()}
    for path in whole.model.iterdir():
        assert path.samefile(trained / path.name)  # no second copy of the weights
    assert whole.report.exists()
    assert_same_results(whole.root, whole.root)
    transformers.AutoModelForCausalLM.from_pretrained(whole.model)


def test_the_same_command_on_a_finished_run_prints_its_table_and_does_nothing(whole: Paths) -> None:
    before = contents(whole.root)
    output, calls = output_of(whole.config)
    assert calls == []
    assert contents(whole.root) == before
    (head,) = (line.split() for line in output.splitlines() if "iteration" in line)
    assert {"reward", "margin", "KL"} <= set(head)
    metrics = [whole.root / f"iter-{number}/evaluate/metrics.json" for number in range(3)]
    rewards = [json.loads(path.read_text("utf-8"))["reward"]["mean"] for path in metrics]
    shown = [line.split()[:2] for line in output.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    assert shown == [[str(number), f"{reward:.3f}"] for number, reward in enumerate(rewards)]
    assert f"the model is in {whole.model}, the report in {whole.report}" in output


@pytest.mark.parametrize("lost", ["model", "report.html"])
def test_a_model_or_a_report_that_is_gone_is_made_again(copy_of_whole: CopyOfWhole, lost: str) -> None:
    config = copy_of_whole()
    path = Paths(config).root / lost
    assert run_inline(config).calls == []  # it knows its new folder now
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_inline(config).calls == []
    assert path.exists()


def test_until_stops_behind_its_stage_and_the_run_goes_on_without_it(make_run: MakeRun, whole: Paths) -> None:
    config = make_run(**RESUMABLE)
    root = Paths(config).root
    expected = list(planned(config))
    done: list[str] = []

    def more(until: str | None, *names: str) -> None:
        done.extend(names)
        assert run_inline(config, until=until).calls == list(names)
        state = states(config)
        assert [title for title in expected if state[title] == "done"] == done
        assert {state[title] for title in expected if title not in done} <= {"to do"}
        assert (root / "model").exists() == (until is None)

    more("rollout", "iter-0/evaluate", "iter-1/rollout")
    more("rollout")
    more("cache", "iter-1/rank", "iter-1/cache")
    more("rank")
    more("cache")
    more("train", "iter-1/train")
    more("rollout", "iter-1/evaluate", "iter-2/rollout")
    more("rank", "iter-2/rank")
    more("rank")
    more("train", "iter-2/cache", "iter-2/train")
    more(None, "iter-2/evaluate")
    assert_same_results(whole.root, root)


def test_until_train_does_the_next_iteration_each_time(make_run: MakeRun) -> None:
    config = make_run(data__eval=None)
    stages = list(planned(config))
    assert run_inline(config, until="train").calls == stages[:4]
    assert run_inline(config, until="train").calls == stages[4:]
    assert run_inline(config, until="train").calls == []
    assert json.loads(Paths(config).record.read_text("utf-8"))["done"] is True


def test_until_a_stage_that_an_iteration_has_not_is_refused(make_run: MakeRun) -> None:
    config = make_run(iteration={1: {"method": "dpo", "rollout": {"responses": 0}}})
    with pytest.raises(Refused, match="--until rollout: iteration 1 has no such stage"):
        run_inline(config, until="rollout")
    assert not Paths(config).root.exists()


def test_a_stop_before_a_stage_is_heard(make_run: MakeRun) -> None:
    launcher = Inline(Paths(make_run()))
    launcher.stop.request()
    with pytest.raises(Stopped, match="stopped before iter-0/evaluate; run the same command to go on"):
        drive(launcher.paths, launcher, Display(quiet=True), launcher.stop, until=None, redo=False)
    assert launcher.calls == []


@pytest.mark.parametrize(
    ("title", "name", "damage"),
    [
        ("iter-0/evaluate", "responses.jsonl", "missing"),
        ("iter-1/rollout", "policy-00001.jsonl", "truncated"),
        ("iter-1/rank", "rows.jsonl", "missing"),
        ("iter-2/rank", "held_out.jsonl", "truncated"),
        ("iter-1/cache", "manifest.json", "truncated"),
        ("iter-2/train", "metrics.jsonl", "missing"),
        ("iter-2/evaluate", "sample-00000.jsonl", "truncated"),
    ],
)
def test_a_stage_that_has_lost_a_file_is_done_again_and_no_other(
    copy_of_whole: CopyOfWhole, whole: Paths, title: str, name: str, damage: str
) -> None:
    config = copy_of_whole()
    assert run_inline(config).calls == []  # it knows its new folder now
    root = Paths(config).root
    path = root / title / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])

    def of_others() -> dict[str, tuple[int, bytes]]:
        stage = title.partition("/")[2]
        own = (f"/{title}/", f"/{title.replace(stage, f'started/{stage}.json')}")
        return {
            name: made for name, made in contents(root).items() if "/iter-" in name and not any(o in name for o in own)
        }

    before = of_others()
    output, calls = output_of(config)
    assert calls == [title]
    assert f"{title}\n  what is there of it is not whole: it is made anew" in output
    assert_same_results(whole.root, root)
    assert of_others() == before
    assert (root / "model/model.safetensors").samefile(root / "iter-2/train/model/model.safetensors")


def test_a_stage_with_the_manifest_of_another_is_done_again(copy_of_whole: CopyOfWhole, whole: Paths) -> None:
    """Somebody put another iteration's folder in its place: its files are whole, and not what was asked for."""
    config = copy_of_whole()
    root = Paths(config).root
    shutil.rmtree(root / "iter-2/rollout")
    shutil.copytree(root / "iter-1/rollout", root / "iter-2/rollout")
    assert run_inline(config).calls == ["iter-2/rollout"]
    assert_same_results(whole.root, root)


def test_a_stage_whose_folder_is_removed_is_done_again(copy_of_whole: CopyOfWhole, whole: Paths) -> None:
    config = copy_of_whole()
    lost = ["iter-1/rollout", "iter-1/rank", "iter-2/cache", "iter-2/train"]
    for title in lost:
        shutil.rmtree(Paths(config).root / title)
    assert run_inline(config).calls == lost
    assert_same_results(whole.root, Paths(config).root)


@pytest.mark.parametrize(
    ("altered", "done", "reader"),
    [
        ("iter-1/rollout/policy-00001.jsonl", "rollout", "iter-1/rank"),
        pytest.param("iter-1/rollout/base-00000.jsonl", "rollout", "iter-1/rank", marks=pytest.mark.slow),
        ("iter-0/evaluate/policy-00000.jsonl", "rollout", "iter-1/rank"),
        ("iter-1/rank/rows.jsonl", "rank", "iter-1/cache"),
        pytest.param("iter-1/rank/rows.jsonl", "cache", "iter-1/train", marks=pytest.mark.slow),
        ("iter-1/rank/held_out.jsonl", "cache", "iter-1/train"),
        ("iter-0/evaluate/responses.jsonl", "train", "iter-1/evaluate"),
    ],
)
def test_rows_that_were_altered_are_refused_where_they_are_read(
    copy_of_whole: CopyOfWhole, altered: str, done: str, reader: str
) -> None:
    config = copy_of_whole()
    root = Paths(config).root
    titles = list(planned(config))
    for title in titles[titles.index(f"iter-1/{done}") + 1 :]:
        shutil.rmtree(root / title)
    path = root / altered
    data = bytearray(path.read_bytes())
    digit = next(index for index in range(len(data) // 2, len(data)) if data[index] in b"12345678")
    data[digit] += 1
    path.write_bytes(data)
    launcher = Inline(Paths(config))
    with pytest.raises(RunFailed) as caught:
        drive(launcher.paths, launcher, Display(quiet=True), launcher.stop, until=None, redo=False)
    assert str(caught.value).startswith(f"{path} was changed since its stage was done")
    assert f"remove {path.parent} to have it made again" in str(caught.value)
    assert launcher.calls == [reader]
    # As the message says.
    shutil.rmtree(path.parent)
    until = reader.partition("/")[2].replace("evaluate", "rollout")  # which is of the next iteration
    assert run_inline(config, until=until).calls[:2] == [str(path.parent.relative_to(root)), reader]


def test_a_run_whose_folder_another_process_works_in_is_refused(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run()
    paths = Paths(config)
    monkeypatch.setattr(run_module, "_LOCK_S", 0.2)
    with run_module._locked(paths):
        before = contents(paths.root)
        with pytest.raises(Refused, match=f"another process is at work in {paths.root}: wait for it"):
            run(config)
        assert contents(paths.root) == before
    with run_module._locked(paths):
        pass


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(make_run: MakeRun) -> None:
    config = make_run()
    root = Paths(config).root
    root.mkdir()
    (root / "thesis.tex").write_text("\\documentclass{book}")
    before = contents(root)
    for attempt in (run, run_inline):
        with pytest.raises(Refused, match=f"output_dir {root} is not empty and holds no run: choose an empty or a new"):
            attempt(config)
    assert contents(root) == before


def test_a_folder_of_a_training_run_is_refused_and_left_alone(make_run: MakeRun, whole: Paths) -> None:
    config = make_run(output_dir=whole.root / "iter-1/train")
    before = contents(whole.root)
    for attempt in (run, run_inline):
        with pytest.raises(Refused, match="holds a run of selm-fast train: choose another folder"):
            attempt(config)
    assert contents(whole.root) == before


def test_a_folder_whose_record_is_damaged_is_refused_and_left_alone(copy_of_whole: CopyOfWhole) -> None:
    config = copy_of_whole()
    record = Paths(config).record
    record.write_bytes(record.read_bytes()[:-20])
    before = contents(Paths(config).root)
    with pytest.raises(Refused, match="run.json: .*; this run cannot be gone on with: choose another output_dir"):
        run(config)
    assert contents(Paths(config).root) == before


def test_a_ranker_may_take_as_long_to_import_as_a_call_may(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr("selm_fast.iteration.launch._WORKER", ("cat",))  # which ends with its input
    monkeypatch.setattr("selm_fast.iteration.rankers.check_function", lambda _, *, timeout_s: limits.append(timeout_s))
    monkeypatch.setattr("selm_fast.iteration.run.drive", lambda *_, **__: None)
    for seconds in (5.0, 7000.0):
        run(make_run(rank__timeout_s=seconds))
    assert limits == [600.0, 7000.0]


@pytest.mark.parametrize("options", [{"until": "rank"}, {"redo": True}], ids=str)
def test_a_dry_run_takes_no_other_option(make_run: MakeRun, options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="a dry run shows the whole plan and does nothing: give until or redo without it"):
        run(make_run(), dry_run=True, **options)


def test_a_dry_run_makes_no_folder_and_changes_none(make_run: MakeRun, whole: Paths) -> None:
    config = make_run()
    assert run(config, dry_run=True).model_dir is None
    assert not Paths(config).root.exists()
    before = contents(whole.root)
    assert run(whole.config, dry_run=True).model_dir == whole.model
    assert contents(whole.root) == before
