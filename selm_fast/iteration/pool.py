"""Several servers, many questions: each is answered once, by whichever server can, for as long as one can."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Final

from selm_fast.errors import RunFailed
from selm_fast.iteration.completion import Question, WrongServer
from selm_fast.iteration.http_json import Away, Failed, Rejected
from selm_fast.iteration.server import Server
from selm_fast.iteration.shards import SKIPPED, Response
from selm_fast.training.signals import StopFlag

TRIES: Final = 4  # of one question at each server
_BACK_OFF_S: Final = (0.2, 10.0)  # after a first failure, and at most
_POLL_S: Final = 0.1


@dataclass(slots=True)
class _Task:
    """A question on its way.

    failures: of each server at it.  last: what the last one was.  unasked: servers in whose form it cannot be asked.
    """

    number: int
    question: Question
    failures: Counter[str] = field(default_factory=Counter)
    last: str = ""
    unasked: set[str] = field(default_factory=set)


class Unanswered(RunFailed):
    """No server answers a question; `number` is its index."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


class _Lost(Exception):
    """A server that is given up; the message says why."""


class Pool:
    """Threads that put questions to servers, as many at once to each as it is said to take."""

    def __init__(self, servers: Sequence[Server], *, concurrency: int, wait_s: float, stop: StopFlag) -> None:
        """wait_s: seconds a server may be away, or not ready, before it is given up."""
        self._servers, self._concurrency, self._wait_s, self._stop = servers, concurrency, wait_s, stop
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._living = {server.url for server in servers}
        self._well: set[str] = set()  # those that have answered since they were last away
        self._lost: dict[str, str] = {}
        self._events: queue.SimpleQueue[tuple[int, Response] | str | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()

    def answer(self, questions: Sequence[Question]) -> Generator[tuple[int, Response] | str]:
        """The response to each question by its index, as they come, and words on what happens to servers between them.

        Ends early where a stop was requested. Raises Unanswered, or RunFailed where no server is left.
        """
        self._tasks.extend(_Task(number, question) for number, question in enumerate(questions))
        left = len(questions)
        for server in self._servers:
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        try:
            while left and not self._stop.requested:
                try:
                    event = self._events.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, tuple)
                yield event
        finally:
            self._closed.set()
            with self._changed:
                self._changed.notify_all()
            for server in self._servers:
                server.close()

    def _serve(self, server: Server) -> None:
        """Wait until a server is ready, then put questions to it."""
        health = _Health(self._wait_s)
        try:
            self._connect(server, health)
            for _ in range(self._concurrency):
                threading.Thread(target=self._work, args=(server, health), daemon=True).start()
        except _Lost as lost:
            self._give_up(server, str(lost))
        except BaseException as error:
            self._events.put(error)

    def _connect(self, server: Server, health: _Health) -> None:
        said = ""
        while not self._closed.is_set():
            try:
                server.connect()
            except (Away, Failed, WrongServer) as error:  # another model's server may be replaced by this one's
                if why := server.ended():
                    raise _Lost(why) from error
                delay = health.failed(str(error))
                if str(error) != said:
                    said = str(error)
                    self._events.put(f"{server.url}: {said}; waiting for it, {self._wait_s:g} s at most")
                self._closed.wait(delay)
            else:
                if said:
                    self._events.put(f"{server.url} is ready")
                health.succeeded()
                self._note(server, well=True)
                return

    def _work(self, server: Server, health: _Health) -> None:
        try:
            while (task := self._take(server)) is not None:
                self._ask(server, health, task)
        except _Lost as lost:
            self._give_up(server, str(lost))
        except BaseException as error:
            self._events.put(error)

    def _ask(self, server: Server, health: _Health, task: _Task) -> None:
        try:
            response = server.complete(task.question)
        except Rejected as error:
            if error.status == 404:  # it serves another model now
                self._return(task)
                raise _Lost(str(error)) from error
            raise Unanswered(task.number, f"{server.url} rejects it: {error}") from error
        except WrongServer as error:
            self._return(task)
            raise _Lost(str(error)) from error
        except (Away, Failed) as error:
            if self._closed.is_set():
                return
            if isinstance(error, Failed):
                task.failures[server.url] += 1
                task.last = f"{server.url}: {error}"
            else:
                self._note(server, well=False)
            self._return(task)
            if why := server.ended():
                raise _Lost(why) from error
            self._closed.wait(health.failed(str(error)))
        else:
            if response.finish == SKIPPED:  # it has not been asked
                if not self._is_for_nobody(task, server):
                    self._return(task)
                    return
            else:
                health.succeeded()
                self._note(server, well=True)
            self._events.put((task.number, response))

    def _note(self, server: Server, *, well: bool) -> None:
        """Take note of whether a server answers."""
        with self._changed:
            if well != (server.url in self._well):
                self._well ^= {server.url}
                self._changed.notify_all()

    def _is_for_nobody(self, task: _Task, server: Server) -> bool:
        """Whether a question that a server cannot be asked is one for no other server either."""
        with self._changed:
            task.unasked.add(server.url)
            return self._living <= task.unasked

    def _take(self, server: Server) -> _Task | None:
        """A question that this server is as good for as any; None once there is nothing more to do."""
        with self._changed:
            while not self._closed.is_set() and server.url in self._living:
                for index, task in enumerate(self._tasks):
                    able = self._living - task.unasked or self._living
                    if min(task.failures[url] for url in able) >= TRIES:
                        why = f"no answer in {TRIES} tries at each server; the last was {task.last}"
                        raise Unanswered(task.number, why)
                    # Where it has failed here, others are first; not those that are away or serve something else now.
                    rivals = able & (self._well | {server.url})
                    least = min((task.failures[url] for url in rivals), default=TRIES)
                    if server.url in able and task.failures[server.url] == least < TRIES:
                        del self._tasks[index]
                        return task
                self._changed.wait()
        return None

    def _return(self, task: _Task) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()

    def _give_up(self, server: Server, why: str) -> None:
        with self._changed:
            if server.url not in self._living:
                return
            self._living.discard(server.url)
            self._lost[server.url] = why
            self._changed.notify_all()
            left = set(self._living)
        if left or self._closed.is_set():
            self._events.put(f"{server.url} is given up: {why}; {len(left)} of {len(self._servers)} servers left")
            return
        reasons = "\n".join(f"  {url}: {reason}" for url, reason in self._lost.items())
        self._events.put(RunFailed(f"no server is left:\n{reasons}"))


class _Health:
    """How long a server has failed without a success between, and how long to leave it alone now."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._since: float | None = None
        self._delay_s = _BACK_OFF_S[0]
        self._doubled = 0.0

    def succeeded(self) -> None:
        """Forget what went wrong before."""
        with self._lock:
            self._since, self._delay_s = None, _BACK_OFF_S[0]

    def failed(self, why: str) -> float:
        """Seconds to wait before the next try. Raises _Lost where it has failed for too long."""
        now = time.monotonic()
        with self._lock:
            if self._since is None:
                self._since = self._doubled = now
            elif now - self._since > self._wait_s:
                raise _Lost(f"{why}, for {now - self._since:.0f} s (rollout.wait_s)")
            elif now - self._doubled >= self._delay_s:  # once for all requests that fail together
                self._doubled, self._delay_s = now, min(2 * self._delay_s, _BACK_OFF_S[1])
            return min(self._delay_s, self._wait_s)
