"""Which server is given which question, and when one is given up; servers are played, and so is the clock."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from selm_fast.errors import RunFailed
from selm_fast.iteration import http_json, pool
from selm_fast.iteration.completion import Question, WrongServer
from selm_fast.iteration.http_json import Away, Client, Failed, Rejected
from selm_fast.iteration.pool import TRIES, Pool, Unanswered
from selm_fast.iteration.shards import SKIPPED, STOP, Response, Sampling
from selm_fast.training.signals import StopFlag

from .completion_server import Server

QUESTIONS = [Question([number], Sampling(), number, 8) for number in range(6)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BACK_OFF_S", (0.001, 0.005))


class Played:
    """A server that does what it is told: `connects` and `completes` are called, and may raise."""

    def __init__(
        self,
        url: str,
        completes: Callable[[], Response] = lambda: Response([1], STOP),
        connects: Callable[[], object] = lambda: None,
    ) -> None:
        self.url, self._completes, self._connects = url, completes, connects
        self.asked: list[int] = []
        self.end: str | None = None
        self.closed = False

    def connect(self) -> None:
        self._connects()

    def complete(self, question: Question) -> Response:
        self.asked.append(question.seed)
        return self._completes()

    def ended(self) -> str | None:
        return self.end

    def close(self) -> None:
        self.closed = True


def raising(*errors: Exception | None) -> Callable[[], Response]:
    """Raises these one after the other, the last again and again; None is an answer."""
    left = list(errors)
    lock = threading.Lock()

    def act() -> Response:
        with lock:
            error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error
        return Response([1], STOP)

    return act


def raising_away() -> None:
    raise Away("off")


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there() and time.monotonic() < deadline:
        time.sleep(0.001)


def ask(*servers: Played, wait_s: float = 60.0, concurrency: int = 1) -> dict[int, Response]:
    """Every answer by the number of its question, each of which comes once."""
    found: dict[int, Response] = {}
    played: Sequence[Any] = servers
    for event in Pool(played, concurrency=concurrency, wait_s=wait_s, stop=StopFlag()).answer(QUESTIONS):
        if isinstance(event, tuple):
            assert event[0] not in found
            found[event[0]] = event[1]
    assert all(server.closed for server in servers)
    return found


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_time_that_a_server_took_to_be_ready_does_not_count_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads for minutes may fail once behind that."""
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)
    connects = raising(*[Away("loads")] * 9, None)

    def connect() -> None:
        clock.now += 10
        connects()

    first = raising(Failed("hiccup"), None)

    def complete() -> Response:
        clock.now += 30
        return first()

    assert len(ask(Played("a", complete, connect), wait_s=100.0)) == 6


def test_failures_with_answers_between_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)
    acts = raising(*[Failed("hiccup"), None] * 5, None)

    def complete() -> Response:
        clock.now += 60
        return acts()

    assert len(ask(Played("a", complete), wait_s=100.0)) == 6


def test_a_server_that_is_away_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)

    def connect() -> None:
        clock.now += 10
        raise Away("nobody")

    with pytest.raises(RunFailed, match=r"no server is left:\n  a: nobody, for 110 s \(rollout.wait_s\)"):
        ask(Played("a", connects=connect), wait_s=100.0)


def test_a_question_is_tried_so_often_at_each_server() -> None:
    bad = [Played(url, raising(Failed("no"))) for url in "ab"]
    with pytest.raises(Unanswered, match=f"no answer in {TRIES} tries at each server; the last was [ab]: no"):
        ask(*bad)
    assert all(max(Counter(server.asked).values()) == TRIES for server in bad)


def test_what_failed_here_is_left_to_another_that_is_well() -> None:
    """And not asked of the same one again."""

    def fail() -> Response:
        wait_until(lambda: len(good.asked) > 0)
        raise Failed("no")

    def answer() -> Response:
        wait_until(lambda: len(bad.asked) >= 5)
        time.sleep(0.02)
        return Response([1], STOP)

    bad, good = Played("bad", fail), Played("good", answer)
    assert len(ask(bad, good)) == 6
    assert len(set(bad.asked)) == len(bad.asked) == 5


@pytest.mark.parametrize("when", ["never ready", "another model's", "gone"])
def test_what_failed_here_is_not_kept_for_a_server_that_is_not_there(when: str) -> None:
    def connect() -> None:
        if when != "gone":
            raise Away("off") if when == "never ready" else WrongServer("it serves another model")

    began = time.monotonic()
    there = Played("a", raising(*[Failed("hiccup")] * 3, None))
    assert len(ask(there, Played("b", raising(Away("off")), connects=connect), wait_s=10.0)) == 6
    assert time.monotonic() - began < 5


def test_a_server_that_is_not_there_yet_may_still_answer() -> None:
    """Before it has been tried, or given up, a question is not lost."""
    tried = threading.Event()
    failing = raising(Failed("no"))

    def complete() -> Response:
        if len(bad.asked) >= TRIES * len(QUESTIONS):
            tried.set()
        return failing()

    def connect() -> None:
        assert tried.wait(60)
        time.sleep(0.05)

    bad = Played("bad", complete)
    assert len(ask(bad, Played("later", connects=connect))) == 6
    assert len(bad.asked) == TRIES * len(QUESTIONS)


def test_a_server_that_turns_out_wrong_gives_its_questions_back() -> None:
    assert len(ask(Played("a", raising(None, WrongServer("other"))), Played("b"), concurrency=2)) == 6
    with pytest.raises(RunFailed, match="no server is left:\n  a: other"):
        ask(Played("a", raising(None, WrongServer("other"))))
    away = Played("a", raising(None, Rejected(404, "no such model")))
    assert len(ask(away, Played("b"))) == 6  # it serves the next iterate by now


def test_a_question_that_a_server_rejects_is_the_end() -> None:
    with pytest.raises(Unanswered, match="a rejects it: 400: too long"):
        ask(Played("a", raising(Rejected(400, "too long"))), Played("b", connects=raising_away))


def test_a_server_whose_process_has_ended_is_not_waited_for() -> None:
    began = time.monotonic()
    for connects in (lambda: None, raising_away):
        server = Played("a", raising(Away("off")), connects)
        server.end = "vLLM was killed"
        with pytest.raises(RunFailed, match="no server is left:\n  a: vLLM was killed"):
            ask(server, wait_s=10.0)
    assert time.monotonic() - began < 5


def test_what_a_server_cannot_be_asked_is_left_out_only_where_no_other_can() -> None:
    unable = Played("unable", lambda: Response([], SKIPPED))
    found = ask(unable, Played("able", raising(Failed("hiccup"), None)))
    assert {response.finish for response in found.values()} == {STOP}
    found = ask(unable, Played("lost", raising(WrongServer("other"))))
    assert {response.finish for response in found.values()} == {SKIPPED}


def test_whatever_else_goes_wrong_in_a_thread_is_heard() -> None:
    with pytest.raises(KeyError):
        ask(Played("a", raising(KeyError("ours"))))
    with pytest.raises(KeyError):
        ask(Played("a", connects=raising(KeyError("ours"))))


# And the client beneath.

ASKED = {"model": "m", "prompt": [1], "max_tokens": 8, "temperature": 0.0, "seed": 0}


@pytest.fixture
def dripping() -> Iterator[Server]:
    """A server whose first answer comes after a while, and the second byte by byte."""
    server = Server({"style": "vllm", "faults": ["late", "drips"]})
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_answer_may_take_longer_than_a_connection_and_is_broken_off_midway(
    dripping: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_json, "_CONNECT_S", 0.1)
    client = Client(dripping.url)
    assert client.post("/v1/completions", ASKED, 20.0)["choices"]
    threading.Timer(0.2, client.close).start()
    with pytest.raises(Failed, match="the connection broke|broken off"):
        client.post("/v1/completions", ASKED, 20.0)
    with pytest.raises(Failed, match="broken off"):
        client.get("/health", 20.0)
