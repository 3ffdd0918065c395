"""`run`: every stage of every iteration, each skipped where it is done, in processes of their own."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_fast.config import RunConfig
from selm_fast.errors import Refused, Stopped
from selm_fast.iteration.dry_run import describe_plan
from selm_fast.iteration.launch import Launcher, Processes
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import Stage, plan_stages
from selm_fast.iteration.rankers import check_ranker
from selm_fast.iteration.sources import check_run, identities
from selm_fast.iteration.status import Status, look, remove
from selm_fast.iteration.summary import iteration_row, results_table
from selm_fast.training import storage
from selm_fast.training.cache_identity import versions
from selm_fast.training.progress import Display
from selm_fast.training.signals import StopFlag

_LOCK_S = 10.0  # that the processes of a killed run may take to end


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves.

    output_dir: its folder.  model_dir, report: the last iterate and the report, None while the run is not done.
    iterations: by iteration from 0, its figures: those of `results_table`.
    """

    output_dir: Path
    model_dir: Path | None
    report: Path | None
    iterations: dict[int, dict[str, float | None]]


def run(
    config: RunConfig,
    *,
    until: str | None = None,
    redo: bool = False,
    dry_run: bool = False,
    vllm_python: str | None = None,
) -> RunResult:
    """Do a whole recipe, going on where an earlier call was stopped.

    until: stop once this stage (rollout, rank, cache or train) of the first unfinished iteration is done.
    redo: do stages again that were made with other settings; without it they are refused by name.
    dry_run: say what would be done, and what it takes, and do nothing.
    vllm_python: Python of the environment that has vLLM, for rollout.engine vllm (default: this one).
    Raises Refused before any work; RunFailed with the reason and the log of a stage that failed; Stopped after a
    signal, with everything saved.
    """
    if dry_run and (until is not None or redo):
        raise Refused("a dry run shows the whole plan and does nothing: give until or redo without it")
    display = Display()
    check_run(config, ranks=not dry_run, vllm_python=vllm_python)
    paths = Paths(config)
    if dry_run:
        record = _record(paths)
        sources, _ = identities(paths, record.get("sources", {}))
        describe_plan(paths, look(paths, plan_stages(config, sources)), display)
        return _result(paths)
    check_ranker(config)
    with (
        StopFlag() as stop,
        _locked(paths) as lock,
        Processes(paths, display, stop, lock=lock, vllm_python=vllm_python) as launcher,
    ):
        return drive(paths, launcher, display, stop, until=until, redo=redo)


def drive(
    paths: Paths, launcher: Launcher, display: Display, stop: StopFlag, *, until: str | None, redo: bool
) -> RunResult:
    """`run` behind its checks, with the stages done by `launcher`."""
    record = _record(paths)
    sources, files = identities(paths, record.get("sources", {}))
    statuses = look(paths, plan_stages(paths.config, sources))
    last = _last_stage(statuses, until)
    _refuse_or_remove(paths, statuses, redo)
    record = {
        "config": paths.config.to_json(),
        "versions": versions(),
        "sources": files,
        "stages": [status.stage.title for status in statuses],
        "done": False,
    }
    paths.root.mkdir(parents=True, exist_ok=True)
    if not _same_record(paths, record) or any(status.state != "done" for status in statuses):
        storage.write_atomic(paths.record, storage.to_json(record))
    for status in statuses:
        if status.state != "done":
            if stop.requested:
                raise Stopped(f"stopped before {status.stage.title}; run the same command to go on")
            _do(paths, status, launcher, display)
        else:
            shutil.rmtree(paths.stage(status.stage.iteration, status.stage.name) / "scratch", ignore_errors=True)
        if status.stage == last:
            display.say(f"{last.title} is done, and --until {until} stops here; without it the run goes on")
            return _result(paths)
    _close(paths, record, display)
    return _result(paths)


def _do(paths: Paths, status: Status, launcher: Launcher, display: Display) -> None:
    stage = status.stage
    marker = paths.started(stage.iteration, stage.name)
    display.say(stage.title)
    if status.state == "begun":
        begun = storage.read_json(marker)
    else:
        if paths.stage(stage.iteration, stage.name).exists():
            display.say("  what is there of it is not whole: it is made anew")
        remove(paths, stage)
        marker.parent.mkdir(parents=True, exist_ok=True)
        begun = stage.as_json() | {"seconds": 0.0}
        storage.write_atomic(marker, storage.to_json(begun))
    began = time.perf_counter()
    launcher.run(stage, seconds=None)
    # What an interrupted attempt took is not counted: nobody was there to write it down.
    begun["seconds"] += time.perf_counter() - began
    storage.write_atomic(marker, storage.to_json(begun))
    launcher.run(stage, seconds=begun["seconds"])
    if stage.name == "evaluate" and (row := iteration_row(paths, stage.iteration)) is not None:
        display.say("  " + ", ".join(f"{name} {value:.3f}" for name, value in row.items() if value is not None))


def _refuse_or_remove(paths: Paths, statuses: Sequence[Status], redo: bool) -> None:
    changed = [status for status in statuses if status.state == "changed"]
    if changed and not redo:
        lines = [f"{status.stage.title}: {'; '.join(status.changes)}" for status in changed]
        raise Refused(
            f"{paths.root} holds stages that were made with other settings or from other inputs:\n  "
            + "\n  ".join(lines)
            + "\nPut the settings back, choose another output_dir, or do these stages again with --redo"
        )
    for status in reversed(changed):
        remove(paths, status.stage)


def _last_stage(statuses: Sequence[Status], until: str | None) -> Stage | None:
    """The stage that `until` names, of the first iteration that is not trained yet."""
    if until is None:
        return None
    for status in statuses:
        if status.stage.name == "train" and status.state != "done":
            number = status.stage.iteration
            named = [s.stage for s in statuses if s.stage.iteration == number and s.stage.name == until]
            if not named:
                raise Refused(f"--until {until}: iteration {number} has no such stage: it trains on the offline pair")
            return named[0]
    return None


def _record(paths: Paths) -> dict[str, Any]:
    """What run.json says. Raises Refused where the folder is another's."""
    if paths.record.exists():
        try:
            found: dict[str, Any] = storage.read_json(paths.record)
        except storage.Damaged as damage:
            raise Refused(f"{damage}; this run cannot be gone on with: choose another output_dir") from damage
        if "sources" not in found:
            raise Refused(f"output_dir {paths.root} holds a run of selm-fast train: choose another folder")
        return found
    ours = {"lock", storage.temporary_of(paths.record).name}
    if paths.root.exists() and any(path.name not in ours for path in paths.root.iterdir()):
        raise Refused(f"output_dir {paths.root} is not empty and holds no run: choose an empty or a new folder")
    return {}


def _same_record(paths: Paths, record: dict[str, Any]) -> bool:
    if not paths.record.exists():
        return False
    before = storage.read_json(paths.record)
    return all(before[name] == record[name] for name in ("config", "versions", "sources"))


def _close(paths: Paths, record: dict[str, Any], display: Display) -> None:
    """The model folder, the report and the table of a run whose stages are all done."""
    from selm_fast.report.page import write_report

    if not storage.read_json(paths.record)["done"] or not paths.model.exists():
        shutil.rmtree(paths.model, ignore_errors=True)
        paths.report.unlink(missing_ok=True)
        with storage.new_folder(paths.model) as temporary:
            for path in Path(paths.iterate(paths.config.iterations)).iterdir():
                storage.link(path, temporary / path.name)
        storage.write_atomic(paths.record, storage.to_json(record | {"done": True}))
    if not paths.report.exists():
        write_report([paths.root], paths.report)
    display.console.print(results_table(paths))
    display.say(f"the model is in {paths.model}, the report in {paths.report}")


def _result(paths: Paths) -> RunResult:
    done = paths.record.exists() and storage.read_json(paths.record)["done"]
    rows = {number: iteration_row(paths, number) for number in range(paths.config.iterations + 1)}
    return RunResult(
        paths.root,
        paths.model if done else None,
        paths.report if done else None,
        {number: row for number, row in rows.items() if row is not None},
    )


@contextmanager
def _locked(paths: Paths) -> Iterator[int]:
    """The descriptor of the run's lock. Raises Refused where another process holds it."""
    _record(paths)
    paths.root.mkdir(parents=True, exist_ok=True)
    with (paths.root / "lock").open("a") as file:
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise Refused(
                        f"another process is at work in {paths.root}: wait for it, or choose another output_dir"
                    ) from error
                time.sleep(0.1)
        yield file.fileno()
