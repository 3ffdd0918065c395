"""One completion server: whether it is there with the right model, and one response from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from selm_fast.config import API_KEY
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.iteration.completion import FORMS, Form, Question, WrongServer, as_text, body, response_of
from selm_fast.iteration.http_json import Client, Failed, Rejected
from selm_fast.iteration.shards import SKIPPED, Response, Sampling

_PROBE_S: Final = 30.0
# These list just what they serve; what others list says nothing about what they serve.
_LISTING: Final = ("vllm", "sglang")


class Server:
    """A server of OpenAI's completions API at one base URL, asked for one model."""

    def __init__(
        self,
        client: Client,
        model: str,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        *,
        vocab_size: int,
        timeout_s: float,
        ended: Callable[[], str | None] = lambda: None,
    ) -> None:
        """model: its folder or hub name, by which the server knows it.

        vocab_size: of the model.  timeout_s: of one response.
        ended: why the server is gone for good, None while it may be there.
        """
        self._client, self._model, self._tokenizer, self._eos_ids = client, model, tokenizer, eos_ids
        self._vocab_size, self._timeout_s = vocab_size, timeout_s
        self.ended = ended
        self._form: Form | None = None

    @property
    def url(self) -> str:
        return self._client.url

    def connect(self) -> None:
        """Find out by what name the server knows the model, and in which form it takes questions.

        Raises Away or Failed where it may be ready later, WrongServer where it serves something else.
        """
        with suppress(Rejected):  # not every server tells
            self._client.check("/health", _PROBE_S)
        with suppress(Failed, Rejected):  # it lists nothing: what it serves shows when it is asked
            self._model = self._listed()
        probe = Question([*self._tokenizer.prefix_ids, self._eos_ids[0]], Sampling(), 0, 1)
        said = ""
        for form in FORMS:
            try:
                self._post(probe, list(probe.prompt) if form.ids else "a", form)
            except Rejected as reason:
                said = str(reason)
                if reason.status in (401, 403):
                    raise WrongServer(f"it wants a key ({said}): put it in {API_KEY}") from reason
                if reason.status == 404:
                    break
                continue
            self._form = form
            return
        raise WrongServer(f"it does not complete prompts for {self._model} ({said})")

    def complete(self, question: Question) -> Response:
        """One response; a skipped one where it takes text and the prompt has none.

        Raises Away, Failed, Rejected, or WrongServer.
        """
        form = self._form
        assert form is not None
        prompt = list(question.prompt) if form.ids else as_text(question.prompt, self._tokenizer)
        if prompt is None:
            return Response([], SKIPPED)
        answer = self._post(question, prompt, form)
        return response_of(answer, question, self._eos_ids, self._tokenizer, self._vocab_size)

    def _post(self, question: Question, prompt: list[int] | str, form: Form) -> Any:
        asked = body(question, prompt, self._model, form, self._eos_ids)
        return self._client.post("/v1/completions", asked, self._timeout_s)

    def close(self) -> None:
        """Break off what is under way."""
        self._client.close()

    def _listed(self) -> str:
        """The model as the server lists it. Raises WrongServer where it lists what it serves, and this is not there."""
        answer = self._client.get("/v1/models", _PROBE_S)
        try:
            cards: list[dict[str, Any]] = list(answer["data"])
            names = [str(card["id"]) for card in cards]
        except (TypeError, KeyError) as error:
            raise Failed(f"it lists no models: {str(answer)[:80]!r}") from error
        for name in names:
            if name == self._model or _same_folder(name, self._model):
                return name
        if cards and all(card.get("owned_by") in _LISTING for card in cards):
            raise WrongServer(f"it serves {', '.join(names)} and not {self._model}")
        return self._model


def _same_folder(one: str, other: str) -> bool:
    try:
        return Path(one).expanduser().samefile(other)
    except OSError:
        return False
