"""Completion servers as the engine of a rollout: those of `rollout.servers`, or vLLM's that are started here."""

from __future__ import annotations

import os
import resource
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import AutoConfig, GenerationConfig

from selm_fast.config import API_KEY
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration.completion import Question
from selm_fast.iteration.generate import check_positions, eos_ids
from selm_fast.iteration.http_json import Client
from selm_fast.iteration.job import Job
from selm_fast.iteration.pool import Pool, Unanswered
from selm_fast.iteration.prompts import Prompt
from selm_fast.iteration.server import Server
from selm_fast.iteration.shards import Response, Sampling, Shard
from selm_fast.iteration.vllm_servers import VllmServer, start_vllm
from selm_fast.model import support

_SHOWN = 10  # rows that a message names
_OTHER_FILES = 256  # that a process may have open beside its connections


class ServerEngine:
    """Servers that answer for one model, and those of them that were started for it."""

    def __init__(self, job: Job, tokenizer: Tokenizer, model: str) -> None:
        """model: folder or hub name."""
        # Servers know a folder by the path that it has on every machine.
        model = str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model
        self._job, self._tokenizer, self._model = job, tokenizer, model
        self._started: list[VllmServer] = []
        self._key = _key_given()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._started = []

    def answer(
        self,
        shards: Sequence[Shard],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: Callable[[str], int],
        on_answered: Callable[[int], None],
    ) -> Iterator[tuple[Shard, dict[int, list[Response]]]]:
        """As `Engine.answer`; prompts of all shards are under way together, the longest first."""
        limit = self._job.config.rollout.max_new_tokens
        under_way = _UnderWay(shards, sampling.copies)
        questions, asked = [], []
        for shard in shards:
            of_shard = seed(shard.name)
            for place, index in enumerate(shard.prompts):
                for copy in range(sampling.copies):
                    number = (of_shard + place * sampling.copies + copy) % 2**31  # what servers take for a seed
                    questions.append(Question(prompts[index].ids, sampling, number, limit))
                    asked.append((shard, index, copy))
        servers, settings = self._servers(), self._job.config.rollout
        _allow_connections(len(servers), settings.concurrency)
        pool = Pool(servers, concurrency=settings.concurrency, wait_s=settings.wait_s, stop=self._job.stop)
        try:
            with closing(pool.answer(questions)) as events:
                for event in events:
                    if isinstance(event, str):
                        self._job.display.say(event)
                        continue
                    number, response = event
                    shard, index, copy = asked[number]
                    if under_way.add(shard, index, copy, response):
                        on_answered(1)
                    if (whole := under_way.take(shard)) is not None:
                        yield shard, whole
        except RunFailed as error:
            raise RunFailed(f"{_named(error, asked, prompts)}\n{under_way.missing(prompts)}") from error

    def _servers(self) -> list[Server]:
        config, trust = self._job.config, self._job.config.model.trust_remote_code
        try:
            model = AutoConfig.from_pretrained(self._model, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            raise Refused(f"cannot read the configuration of {self._model}: {error}") from error
        check_positions(self._model, model, config)
        try:
            generation = GenerationConfig.from_pretrained(self._model)
        except OSError:  # it has no file of its own
            generation = GenerationConfig.from_model_config(model)
        ends = eos_ids(self._tokenizer, generation)
        vocab_size = getattr(model.get_text_config(), "vocab_size", self._tokenizer.max_id + 1)
        settings: dict[str, Any] = {"timeout_s": config.rollout.timeout_s, "vocab_size": vocab_size}
        if config.rollout.engine == "server":
            clients = [(Client(url, self._key), settings) for url in config.rollout.urls]
        else:
            support.check_source(self._model, trust_remote_code=trust)
            if not self._started:
                key = secrets.token_hex(16)  # nobody else on this machine is to use them
                self._started = start_vllm(self._job, self._model, key, self._stack)
                self._key = key
            clients = [(Client(server.url, self._key), settings | {"ended": server.ended}) for server in self._started]
        return [Server(client, self._model, self._tokenizer, ends, **own) for client, own in clients]


class _UnderWay:
    """The responses that are there, of the shards that are not whole yet."""

    def __init__(self, shards: Sequence[Shard], copies: int) -> None:
        self._copies = copies
        self._total = sum(shard.num_prompts for shard in shards)
        self._answers: dict[str, dict[int, dict[int, Response]]] = {
            shard.name: {index: {} for index in shard.prompts} for shard in shards
        }

    def add(self, shard: Shard, index: int, copy: int, response: Response) -> bool:
        """Keep a response; -> whether its prompt has all of them now."""
        found = self._answers[shard.name][index]
        found[copy] = response
        return len(found) == self._copies

    def take(self, shard: Shard) -> dict[int, list[Response]] | None:
        """The responses to a shard's prompts, no longer kept here; None while some are missing."""
        answers = self._answers[shard.name]
        if any(len(found) < self._copies for found in answers.values()):
            return None
        del self._answers[shard.name]
        return {index: [found[copy] for copy in range(self._copies)] for index, found in answers.items()}

    def missing(self, prompts: Sequence[Prompt]) -> str:
        """Which prompts have no response, in words."""
        every = [(index, found) for answers in self._answers.values() for index, found in answers.items()]
        rows = sorted(prompts[index].row for index, found in every if len(found) < self._copies)
        shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
        return (
            f"{len(rows)} of {self._total} prompts have no response (rows {shown}); finished shards are kept: the same "
            "command goes on with the others"
        )


def _key_given() -> str | None:
    """The key of the servers. Raises Refused, without repeating it, where no request could carry it."""
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise Refused(f"{API_KEY} holds a character that no HTTP header may have: set it to the key alone")
    return key or None


def _allow_connections(servers: int, concurrency: int) -> None:
    """Let this process open as many files as it will have connections. Raises Refused where it must not."""
    wanted = servers * concurrency + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Refused(
            f"rollout.concurrency is {concurrency}, at each of {servers} servers, and this process may open {hard} "
            f"files (ulimit -Hn): lower rollout.concurrency to {max(1, (hard - _OTHER_FILES) // servers)}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _named(error: RunFailed, asked: Sequence[tuple[Shard, int, int]], prompts: Sequence[Prompt]) -> str:
    return f"row {prompts[asked[error.number][1]].row}: {error}" if isinstance(error, Unanswered) else str(error)
