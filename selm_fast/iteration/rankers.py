"""Which ranker scores candidates: the one place that knows them by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch

from selm_fast.config import PAIRRM, RunConfig
from selm_fast.iteration.scorer import START_LIMIT_S, PythonScorer, check_function
from selm_fast.pairrm.checkpoint import check_checkpoint
from selm_fast.pairrm.ranker import PairRM
from selm_fast.pairrm.work import num_rows
from selm_fast.training.machine import choose_device

Texts = Sequence[tuple[str, list[str]]]  # prompts, each with its candidates


class Ranker(Protocol):
    """Anything that says how good the candidates of a prompt are.

    unit: what its progress is counted in.
    """

    unit: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def work(self, texts: Texts) -> int:
        """How many units scoring them takes."""
        ...

    def score(self, texts: Texts, on_done: Callable[[int], None]) -> list[list[float]]:
        """A score for every candidate, higher is better, NaN where there is none.

        on_done: called with the units done since the last call.
        """
        ...


def open_ranker(config: RunConfig) -> Ranker:
    """The ranker that the settings name, which must name one; it is ready inside its `with` block."""
    assert config.ranker is not None
    return PairRMRanker(config) if config.ranker == PAIRRM else FunctionRanker(config)


def check_ranker(config: RunConfig) -> None:
    """Raise Refused, before any work, where the ranker is not there or is none."""
    if config.ranker == PAIRRM:
        check_checkpoint(config.pairrm.path)
    elif config.ranker is not None:
        check_function(config.ranker, timeout_s=max(START_LIMIT_S, config.rank.timeout_s))


class FunctionRanker:
    """A function of the user's, `rank.batch_prompts` prompts a call, all with equally many candidates."""

    unit = "prompts"

    def __init__(self, config: RunConfig) -> None:
        self._batch_prompts = config.rank.batch_prompts
        self._scorer = PythonScorer(str(config.ranker), timeout_s=config.rank.timeout_s)

    def __enter__(self) -> Self:
        self._scorer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scorer.__exit__(kind, error, trace)

    def work(self, texts: Texts) -> int:
        """One for each prompt."""
        return len(texts)

    def score(self, texts: Texts, on_done: Callable[[int], None]) -> list[list[float]]:
        """As `Ranker.score`. Raises RunFailed as `PythonScorer.score` does."""
        scores: list[list[float]] = [[] for _ in texts]
        for width in sorted({len(candidates) for _, candidates in texts}):
            alike = [index for index, (_, candidates) in enumerate(texts) if len(candidates) == width]
            for start in range(0, len(alike), self._batch_prompts):
                batch = alike[start : start + self._batch_prompts]
                found = self._scorer.score([texts[i][0] for i in batch], [texts[i][1] for i in batch])
                for index, row in zip(batch, found.tolist(), strict=True):
                    scores[index] = row
                on_done(len(batch))
        return scores


class PairRMRanker:
    """PairRM on the device of this process; a row is an ordered pair of distinct candidates.

    rows, seconds: scored so far, and what that took.
    """

    unit = "rows"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._model: PairRM | None = None
        self.rows, self.seconds = 0, 0.0

    def __enter__(self) -> Self:
        device, _ = choose_device(self._config)
        settings = self._config.pairrm
        dtype = getattr(torch, settings.dtype or ("float16" if device.type == "cuda" else "float32"))
        self._model = PairRM.from_pretrained(settings.path, device=device, dtype=dtype, max_tokens=settings.max_tokens)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def work(self, texts: Texts) -> int:
        """Its rows."""
        return num_rows([candidates for _, candidates in texts])

    def score(self, texts: Texts, on_done: Callable[[int], None]) -> list[list[float]]:
        """As `Ranker.score`; all texts are sorted by length together, so many at once are fast."""
        assert self._model is not None
        began = time.perf_counter()
        scores = self._model.score(
            [prompt for prompt, _ in texts], [candidates for _, candidates in texts], on_rows=on_done
        )
        self.seconds += time.perf_counter() - began
        self.rows += self.work(texts)
        return scores
