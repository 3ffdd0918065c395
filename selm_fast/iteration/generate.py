"""transformers' own `generate` as the engine of a rollout: token ids in, token ids and finish reasons out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from selm_fast.config import RunConfig
from selm_fast.data.tokenizer import Tokenizer
from selm_fast.errors import Refused
from selm_fast.iteration.job import Job
from selm_fast.iteration.prompts import Prompt
from selm_fast.iteration.shards import Response, Sampling, Shard
from selm_fast.model import support
from selm_fast.training.machine import choose_device


class LocalEngine:
    """A model in this process, loaded when it is first asked."""

    def __init__(self, job: Job, tokenizer: Tokenizer, model: str) -> None:
        """model: folder or hub name."""
        self._job, self._tokenizer, self._model = job, tokenizer, model
        self._generator: Generator | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._generator = None  # and with it the memory of its weights

    def answer(
        self,
        shards: Sequence[Shard],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: Callable[[str], int],
        on_answered: Callable[[int], None],
    ) -> Iterator[tuple[Shard, dict[int, list[Response]]]]:
        """As `Engine.answer`, batch by batch."""
        if self._generator is None:
            self._generator = Generator(self._model, self._tokenizer, self._job.config)
        for shard in shards:
            answers: dict[int, list[Response]] = {}
            with torch.random.fork_rng():
                torch.manual_seed(seed(shard.name))
                for batch in shard.batches:
                    if self._job.stop.requested:
                        return
                    ids = [prompts[index].ids for index in batch]
                    found = self._generator.answer(
                        ids, copies=sampling.copies, temperature=sampling.temperature, top_p=sampling.top_p
                    )
                    answers |= dict(zip(batch, found, strict=True))
                    on_answered(len(batch))
            yield shard, answers


class Generator:
    """A model that answers batches of prompts."""

    def __init__(self, path: str, tokenizer: Tokenizer, config: RunConfig) -> None:
        """path: folder or hub name. Raises Refused where it is not served or has no room for prompt and response."""
        device, dtype = choose_device(config)
        trust = config.model.trust_remote_code
        support.check_source(path, trust_remote_code=trust)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=trust, attn_implementation="sdpa",
                output_loading_info=True,
            )  # fmt: skip
            model, info = loaded
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise Refused(f"cannot load the model {path}: {error}") from error
        if info["missing_keys"]:  # transformers would go on with random ones in their place
            raise Refused(f"{path} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
        self.model = model.to(device).eval()
        self.limit: int = config.rollout.max_new_tokens
        check_positions(path, model.config, config)
        self.eos_ids = eos_ids(tokenizer, model.generation_config)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], *, copies: int = 1, temperature: float = 0.0, top_p: float = 1.0
    ) -> list[list[Response]]:
        """`copies` responses to each prompt of one left-padded batch. temperature 0 is greedy."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        pad = self.eos_ids[0]
        device = self.model.device
        ids = torch.tensor([[pad] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        # Whole and our own: a model's file may ask for penalties, beams or a top_k that nobody here asked for.
        self.model.generation_config = GenerationConfig(
            do_sample=temperature > 0, max_new_tokens=self.limit, eos_token_id=self.eos_ids, pad_token_id=pad,
            num_return_sequences=copies, **sampling,
        )  # fmt: skip
        output = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        found = [self._response(row) for row in output[:, longest:].tolist()]
        return [found[start : start + copies] for start in range(0, len(found), copies)]

    def _response(self, ids: list[int]) -> Response:
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return Response(ids, "length") if end is None else Response(ids[: end + 1], "stop")


def check_positions(path: str, model: PretrainedConfig, config: RunConfig) -> None:
    """Raise Refused where a model has no room for prompt and response."""
    room = getattr(model, "max_position_embeddings", None)
    limit, prompt = config.rollout.max_new_tokens, config.data.max_prompt_length
    if room is not None and prompt + limit > room:
        raise Refused(
            f"rollout.max_new_tokens is {limit} and data.max_prompt_length {prompt}; "
            f"{path} has {room} positions: lower one of them"
        )


def eos_ids(tokenizer: Tokenizer, generation: GenerationConfig | None) -> list[int]:
    """The tokens that end a response: the tokenizer's and its template's, and those of the model's own file."""
    own = None if generation is None else generation.eos_token_id
    return sorted(tokenizer.eos_ids | set([own] if isinstance(own, int) else own or ()))
