"""Completion servers as the engine: whatever they do, the rollout is complete and right, or says what is missing."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selm_fast.config import API_KEY, RunConfig
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.iteration import pool, server_engine
from selm_fast.iteration.completion import as_text
from selm_fast.iteration.evaluate import finish_evaluate
from selm_fast.iteration.job import read_manifest
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.prompts import load_prompts
from selm_fast.iteration.stages import do_part, finish
from selm_fast.training.progress import Display
from selm_fast.training.signals import StopFlag

from ..training.harness import write_rows
from . import completion_server
from .completion_server import Server, answer_ids, answer_text
from .harness import MakeRun, job_of, lines, shards

ROLLOUT = "iter-1/rollout"
SCRIPT = Path(completion_server.__file__)
LIMIT = 8
Start = Callable[..., Server]
RunScript = Callable[..., tuple[subprocess.Popen[str], int]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back off for milliseconds."""
    monkeypatch.setattr(pool, "_BACK_OFF_S", (0.01, 0.05))


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers in threads of this process."""
    started: list[Server] = []

    def start(style: str = "vllm", **settings: Any) -> Server:
        server = Server({"style": style, "faults": ["ok"], **settings})
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def make(make_run: MakeRun) -> Callable[..., RunConfig]:
    """Settings of a run whose engine is these servers; a portion has 12 prompts, a shard 3."""

    def make(*urls: str, **overrides: Any) -> RunConfig:
        own = {
            "portions": 1, "iterations": 1, "rollout__engine": "server", "rollout__servers": ",".join(urls),
            "rollout__shard_prompts": 3, "rollout__concurrency": 2, "rollout__timeout_s": 10.0, "rollout__wait_s": 20.0,
        }  # fmt: skip
        return make_run(**own | overrides)

    return make


def roll_out(
    config: RunConfig, *, display: Display | None = None, stop: StopFlag | None = None
) -> list[dict[str, Any]]:
    """The lines of the first rollout, in the order of its shards."""
    do_part(job_of(config, ROLLOUT, display=display, stop=stop))
    return shards(Paths(config).stage(1, "rollout"), "policy")


def check_answers(found: list[dict[str, Any]]) -> None:
    """Every prompt once, with the answer to it and to no other."""
    assert sorted(line["row"] for line in found) == list(range(12))
    for line in found:
        ids, finish = answer_ids(line["prompt_ids"], LIMIT)
        (response,) = line["responses"]
        assert (response["ids"], response["finish"]) == (ids, finish)
        assert "retokenised" not in response


def heard() -> tuple[io.StringIO, Display]:
    """What a display is told to say, and the display."""
    said = io.StringIO()
    return said, Display(console=Console(file=said, width=500, soft_wrap=True))


# Where all goes well.


def test_ids_go_out_and_come_back(make: Callable[..., RunConfig], start: Start, tmp_path: Path) -> None:
    log = tmp_path / "asked"
    server = start(log=str(log))
    config = make(server.url + "/v1/")
    found = roll_out(config)
    check_answers(found)
    asked = lines(log)
    assert sorted(line["prompt"] for line in asked) == sorted(line["prompt_ids"] for line in found)
    assert {line["model"] for line in asked} == {str(Path(str(config.model.path)).absolute())}
    assert [len(line["prompt_ids"]) for line in found] == sorted(
        (len(line["prompt_ids"]) for line in found), reverse=True
    )
    finish(job_of(config, ROLLOUT), 1.0)
    manifest = read_manifest(Paths(config).stage(1, "rollout"))
    assert manifest is not None
    ends = Counter(line["responses"][0]["finish"] for line in found)
    assert manifest["counts"]["finish"] == ends
    assert len(ends) == 2
    assert manifest["counts"]["retokenised"] == 0
    assert len(manifest["files"]) == 4


def test_samples_have_seeds_of_their_own_and_are_drawn_again_alike(
    make: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    sampled = {"rollout__responses": 3, "rollout__temperature": 1.0}
    found = []
    for name in ("one", "two"):
        servers = [start(log=str(tmp_path / f"asked-{name}")) for _ in range(2)]
        found.append(roll_out(make(*(server.url for server in servers), name=name, **sampled)))
    assert found[0] == found[1]
    assert all(len({tuple(response["ids"]) for response in line["responses"]}) == 3 for line in found[0])
    seeds = [line["seed"] for line in lines(tmp_path / "asked-one")]
    assert len(set(seeds)) == len(seeds) == 36
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_several_servers_share_the_prompts(make: Callable[..., RunConfig], start: Start, tmp_path: Path) -> None:
    servers = [start(faults=["late"], log=str(tmp_path / str(n))) for n in range(3)]
    began = time.monotonic()
    check_answers(roll_out(make(*(server.url for server in servers))))
    assert sum(len(lines(tmp_path / str(n))) for n in range(3)) == 12
    assert all(len(lines(tmp_path / str(n))) >= 2 for n in range(3))  # each has two under way at once
    assert time.monotonic() - began < 12 * 0.2  # not one after the other


@pytest.mark.parametrize("style", ["ids", "text", "transformers"])
def test_servers_that_give_no_ids(make: Callable[..., RunConfig], start: Start, style: str) -> None:
    """Their text is tokenised here, and that is said; an end that they leave out is put there."""
    server = start(style)
    config = make(server.url)
    tokenizer = load_tokenizer(str(config.model.path))
    for line in roll_out(config):
        text = as_text(line["prompt_ids"], tokenizer)
        assert text is not None
        said, _ = answer_text(str(line["prompt_ids"]) if style == "ids" else text, LIMIT)
        (response,) = line["responses"]
        assert response["retokenised"] is True
        assert response["text"] == said.strip()
        ids = tokenizer.encode([said])[0]
        cut = len(ids) > LIMIT or (style == "ids" and answer_ids(line["prompt_ids"], LIMIT)[1] == "length")
        assert response["finish"] == ("length" if cut else "stop")
        assert response["ids"] == (ids[:LIMIT] if cut else [*ids, 1])
    said_, display = heard()
    finish(job_of(config, ROLLOUT, display=display), 1.0)
    assert "12 responses came as text and were tokenised here, maybe into other ids" in said_.getvalue()


def test_prompts_that_no_text_has_are_left_out_and_counted(
    make: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    """A special token that somebody typed would become a real one at the server."""
    rows = [{"prompt": f"why {n}", "chosen": " yes", "rejected": " no"} for n in range(12)]
    rows[4]["prompt"] = "why <|eos|> not"
    path = write_rows(tmp_path / "typed.jsonl", rows)
    for row in rows:  # only in a conversation is it kept as plain text
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["chosen"], row["rejected"] = ([{"role": "assistant", "content": row[n]}] for n in ("chosen", "rejected"))
    write_rows(path, rows)
    log = tmp_path / "asked"
    settings = {"data__train": str(path), "data__eval": None}
    config = make(start("text", log=str(log)).url, data__max_skipped=0.1, **settings)
    found = {line["row"]: line["responses"][0] for line in roll_out(config)}
    assert found[4] == {"ids": [], "text": "", "finish": "skipped"}
    assert all(response["ids"] for row, response in found.items() if row != 4)
    assert len(lines(log)) == 11
    said, display = heard()
    job = job_of(config, ROLLOUT, display=display)
    finish(job, 1.0)
    assert "1 of 12 responses are missing: no text has the token ids of their prompts" in said.getvalue()
    do_part(job_of(config, "iter-1/rank"))  # the offline pair is left to rank
    strict = make(start("text").url, name="strict", **settings)
    roll_out(strict)
    with pytest.raises(RunFailed, match=r"at most data\.max_skipped = 5\.0% may be: use servers that take token ids"):
        finish(job_of(strict, ROLLOUT), 1.0)
    for name, styles in (("ids", ["vllm"]), ("both", ["text", "vllm"])):
        urls = [start(style, faults=["late"]).url for style in styles]
        found_all = roll_out(make(*urls, name=name, **settings))
        assert all(line["responses"][0]["finish"] != "skipped" for line in found_all)


def test_a_held_out_prompt_without_a_response_is_no_loss(
    make: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    rows = [{"prompt": f"why {n}", "chosen": " yes", "rejected": " no"} for n in range(5)]
    conversation = [{"role": "user", "content": "why <|eos|> not"}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    path = write_rows(tmp_path / "typed.jsonl", [*rows[:2], {"prompt": conversation, **answers}, *rows[2:]])
    config = make(start("text").url, data__eval=str(path), data__max_skipped=0.2)
    job = job_of(config, "iter-0/evaluate")
    do_part(job)
    finish(job, 1.0)
    assert [line["row"] for line in lines(job.folder / "responses.jsonl")] == [0, 1, 3, 4, 5]
    found = json.loads((job.folder / "metrics.json").read_bytes())
    versus = found["win_rate"]["reference"]
    assert versus["wins"] + versus["ties"] + versus["losses"] == 5
    assert found["prompts"] == 6
    # Compared with it are the prompts that both have answered, all of them at a server that takes ids.
    model = Paths(config).stage(1, "train") / "model"
    model.parent.mkdir(parents=True)
    model.symlink_to(str(config.model.path))
    config = make(start().url, data__eval=str(path), data__max_skipped=0.2)
    job = job_of(config, "iter-1/evaluate")
    do_part(job)
    found = finish_evaluate(job)["win_rate"]
    pairs = {name: versus["wins"] + versus["ties"] + versus["losses"] for name, versus in found.items()}
    assert pairs == {"reference": 6, "base": 5}
    stopped = StopFlag()
    stopped.request()
    with pytest.raises(Stopped, match="stopped in iter-1/evaluate; its responses are saved"):
        finish_evaluate(job_of(config, "iter-1/evaluate", stop=stopped))


# Where it does not.

FAULTS = ["drop", "ok", "500", "truncated", "ok", "short", "twice", "429", "empty", "abort", "late", "ok", "ok"]


def test_a_faulty_server_answers_every_prompt_in_the_end(make: Callable[..., RunConfig], start: Start) -> None:
    check_answers(roll_out(make(start(faults=FAULTS).url)))


@pytest.mark.parametrize("fault", ["slow", "drips"])
def test_a_slow_answer_is_asked_for_again(make: Callable[..., RunConfig], start: Start, fault: str) -> None:
    server = start(faults=[fault, *["ok"] * 20])
    began = time.monotonic()
    check_answers(roll_out(make(server.url, rollout__timeout_s=0.5)))
    assert 0.5 <= time.monotonic() - began < 20


def test_a_busy_server_is_asked_later(make: Callable[..., RunConfig], start: Start) -> None:
    """That it takes no more for now is no failure at a prompt."""
    check_answers(roll_out(make(start(faults=["429"] * 9 + ["ok"] * 12).url, rollout__concurrency=1)))


def test_a_good_server_makes_up_for_a_bad_one(make: Callable[..., RunConfig], start: Start) -> None:
    for fault in ("500", "drop"):
        check_answers(roll_out(make(start(faults=[fault]).url, start(faults=["late"]).url, name=fault)))


def test_a_server_that_never_answers_right_is_the_end(make: Callable[..., RunConfig], start: Start) -> None:
    config = make(start(faults=["500"]).url)
    with pytest.raises(RunFailed) as failed:
        roll_out(config)
    text = str(failed.value)
    assert "no answer in 4 tries at each server; the last was http://127.0.0.1:" in text
    assert text.startswith("row ")
    assert "HTTP 500" in text
    assert "12 of 12 prompts have no response (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)" in text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("rejects", r"row \d+: http://127.0.0.1:\d+ rejects it: 400"),
        ("reads-another", "it has read another prompt than it was sent"),
        ("other-ids", "it answers with token ids beyond the 284 of the model: another tokenizer"),
    ],
)
def test_answers_that_no_retry_mends(make: Callable[..., RunConfig], start: Start, fault: str, message: str) -> None:
    config = make(start(faults=["ok", "ok", fault]).url, rollout__concurrency=1)
    with pytest.raises(RunFailed, match=message) as failed:
        roll_out(config)
    assert "10 of 12 prompts have no response" in str(failed.value)


def test_other_models_and_keys_are_named(
    make: Callable[..., RunConfig], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(start(models=["another"]).url, rollout__wait_s=0.2)
    with pytest.raises(RunFailed, match=r"it serves another and not .*, for 0 s \(rollout.wait_s\)"):
        roll_out(config)
    with pytest.raises(RunFailed, match=r"it does not complete prompts for .* \(404: .*no model"):
        roll_out(make(start("text", models=["another"]).url, name="text", rollout__wait_s=0.2))
    locked = start(key="secret")
    with pytest.raises(RunFailed, match=rf"it wants a key \(401: .*\): put it in {API_KEY}"):
        roll_out(make(locked.url, name="locked", rollout__wait_s=0.2))
    monkeypatch.setenv(API_KEY, "secret")
    check_answers(roll_out(make(locked.url, name="unlocked")))
    listed = str(Path(str(config.model.path))) + "/."
    check_answers(roll_out(make(start(models=[listed]).url, name="listed")))  # another spelling of the same folder


def test_each_model_is_asked_of_the_servers_that_have_it(
    make: Callable[..., RunConfig], start: Start, tmp_path: Path
) -> None:
    """Methods that need two models find each; a server of another one is left alone."""
    config = make("http://127.0.0.1:9")
    model = str(Path(str(config.model.path)).absolute())
    have, have_not = (
        start(models=[model], log=str(tmp_path / "have")),
        start(models=["other"], log=str(tmp_path / "not")),
    )
    check_answers(roll_out(make(have_not.url, have.url)))
    assert len(lines(tmp_path / "have")) == 12
    began = time.monotonic()
    shaky = start(models=[model], faults=["drop", *["ok"] * 20])
    check_answers(roll_out(make(have_not.url, shaky.url, name="shaky")))
    assert time.monotonic() - began < 15  # not kept for the one that may have the model later
    assert not (tmp_path / "not").exists()


def test_a_server_that_is_not_ready_is_waited_for(make: Callable[..., RunConfig], start: Start) -> None:
    said, display = heard()
    server = start(ready_after=3)
    check_answers(roll_out(make(server.url), display=display))
    assert f"{server.url}: HTTP 503: a word; waiting for it, 20 s at most" in said.getvalue()
    assert f"{server.url} is ready" in said.getvalue()


def test_nobody_there(make: Callable[..., RunConfig], start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunFailed, match=f"no server is left:\n  {url}: connection refused, for 0 s"):
        roll_out(make(url, rollout__wait_s=0.2))
    said, display = heard()
    check_answers(roll_out(make(url, start(faults=["late"]).url, name="one of two"), display=display))
    assert f"{url}: connection refused; waiting for it, 20 s at most" in said.getvalue()


@pytest.fixture
def run_script() -> Iterator[RunScript]:
    """Starts servers as processes, each with its port; none is left behind."""
    with ExitStack() as stack:

        def run(**settings: Any) -> tuple[subprocess.Popen[str], int]:
            command = [sys.executable, str(SCRIPT), json.dumps({"faults": ["ok"], **settings})]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, int(process.stdout.readline())

        yield run


def test_killed_midway_and_nobody_else(make: Callable[..., RunConfig], run_script: RunScript, tmp_path: Path) -> None:
    """What was finished stays; the same command goes on with the rest."""
    faults = [*["ok"] * 7, "die"]
    process, port = run_script(style="vllm", faults=faults)
    config = make(f"http://127.0.0.1:{port}", rollout__concurrency=1, rollout__wait_s=0.3)
    with pytest.raises(RunFailed, match=r"no server is left:\n.*\n5 of 12 prompts have no response \(rows") as failed:
        roll_out(config)
    assert process.wait() == -signal.SIGKILL
    folder = Paths(config).stage(1, "rollout")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("policy-*")}
    assert sorted(before) == ["policy-00000.jsonl", "policy-00001.jsonl"]
    assert "finished shards are kept" in str(failed.value)
    log = tmp_path / "asked"
    process, port = run_script(style="vllm", port=port, log=str(log))
    check_answers(roll_out(config))
    assert len(lines(log)) == 6
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("policy-*")}.items()


def test_killed_midway_and_started_again(make: Callable[..., RunConfig], run_script: RunScript) -> None:
    process, port = run_script(style="vllm", faults=["ok", "ok", "die"])

    def restart() -> None:
        process.wait()
        time.sleep(0.2)
        run_script(style="vllm", port=port)

    thread = threading.Thread(target=restart)
    thread.start()
    check_answers(roll_out(make(f"http://127.0.0.1:{port}")))
    thread.join()


def test_killed_midway_and_another_takes_over(
    make: Callable[..., RunConfig], start: Start, run_script: RunScript
) -> None:
    process, port = run_script(style="vllm", faults=["ok", "die"])
    said, display = heard()
    dying = f"http://127.0.0.1:{port}"
    config = make(dying, start(faults=["late"]).url, rollout__wait_s=0.2)
    check_answers(roll_out(config, display=display))
    assert process.wait() == -signal.SIGKILL
    assert f"{dying} is given up: connection refused, for 0 s (rollout.wait_s); 1 of 2 servers left" in said.getvalue()


def test_a_stop_keeps_the_finished_shards(make: Callable[..., RunConfig], start: Start) -> None:
    server = start(faults=[*["ok"] * 7, *["slow"] * 5])
    config = make(server.url, rollout__concurrency=1)  # in their order
    folder = Paths(config).stage(1, "rollout")

    class Enough(StopFlag):
        def __init__(self) -> None: ...

        @property
        def requested(self) -> bool:  # type: ignore[override]
            return len(list(folder.glob("policy-*"))) == 2

    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped in iter-1/rollout; 6 of 12 prompts have their responses"):
        roll_out(config, stop=Enough())
    assert time.monotonic() - began < 8  # what is under way is broken off
    server.settings["faults"] = ["ok"]
    check_answers(roll_out(config))


def test_the_key_is_in_no_message(
    make: Callable[..., RunConfig], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, "top-secret\n")  # as files end
    said, display = heard()
    config = make(start(key="top-secret", faults=["tells"]).url)
    with pytest.raises(RunFailed, match=r"HTTP 500: .*Authorization: Bearer \[key\]") as failed:
        roll_out(config, display=display)
    assert "top-secret" not in str(failed.value) + said.getvalue() + json.dumps(config.to_json())
    monkeypatch.setenv(API_KEY, "top-\nsecret")
    with pytest.raises(Refused, match=f"{API_KEY} holds a character that no HTTP header may have") as refused:
        roll_out(config)
    assert "secret" not in str(refused.value)


def test_a_model_without_room_is_refused(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(Refused, match="rollout.max_new_tokens is 100000 and data.max_prompt_length 40; .* positions"):
        roll_out(make("http://127.0.0.1:9", rollout__max_new_tokens=100000))


def test_connections_are_files(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual limit of 1024 is raised for them, or too many are refused."""
    limits = (1024, 4096)
    monkeypatch.setattr(server_engine.resource, "getrlimit", lambda _: limits)
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(server_engine.resource, "setrlimit", lambda _, values: found.append(values))
    server_engine._allow_connections(2, 128)
    assert found == []
    server_engine._allow_connections(8, 128)
    assert found == [(1280, 4096)]
    limits = (1024, 1024)
    eight = make(*(f"http://127.0.0.1:{port}" for port in range(1, 9)), rollout__concurrency=128)
    with pytest.raises(Refused, match="rollout.concurrency is 128, at each of 8 servers.* to 96"):
        roll_out(eight)


def test_urls_are_base_urls(make: Callable[..., RunConfig]) -> None:
    config = make("http://one:8000/v1/", " http://two:8000 ", "http://one:8000")
    assert config.rollout.urls == ["http://one:8000", "http://two:8000"]
    for url, message in (("http://one:800000", "[Pp]ort"), ("http://me:secret@one", API_KEY), ("one:8000", "base URL")):
        with pytest.raises(ValueError, match=message):
            make(url)


def test_texts_are_read_back_as_the_ids_they_stand_for(make_run: MakeRun) -> None:
    config = make_run()
    tokenizer = load_tokenizer(str(config.model.path))
    for prompt in load_prompts(str(config.data.train), config.data, tokenizer).prompts:
        text = as_text(prompt.ids, tokenizer)
        assert text is not None
        assert tokenizer.encode([text])[0] == prompt.ids
    (typed,) = tokenizer.encode(["<|eos|>"])
    assert typed == [1]
    literal = tokenizer.encode_literally("<|eos|>")
    assert literal is not None
    assert as_text(literal, tokenizer) is None  # its text would become the real one
    (word,) = tokenizer.encode(["é"])
    assert len(word) == 2
    assert as_text(word[:1], tokenizer) is None  # cut inside a character
