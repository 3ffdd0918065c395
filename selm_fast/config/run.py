"""Every setting of a whole recipe: those of its training runs, and of what is around them."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from selm_fast.config.training import Config, Count, Fraction, NonNegative, Positive, PositiveCount, Section

PAIRRM: Final = "pairrm"
API_KEY: Final = "SELM_FAST_API_KEY"  # the environment variable that holds the key of the servers


class RolloutConfig(Section):
    """What the policy answers, and how the answers are generated."""

    engine: Literal["transformers", "server", "vllm"] = Field(
        "transformers",
        description="what generates: transformers' own generate; the completion servers of rollout.servers; "
        "or vLLM servers started here, one for each GPU",
    )
    servers: str | None = Field(
        None,
        description="base URLs of OpenAI-compatible completion servers, separated by commas: "
        "http://node1:8000,http://node2:8000",
    )
    concurrency: PositiveCount = Field(128, description="requests under way at each server, at most")
    timeout_s: Positive = Field(600.0, description="seconds that a server may take for one response")
    wait_s: Positive = Field(600.0, description="seconds that a server may be away, or take to start or to load")
    responses: Count = Field(
        1, description="responses of the policy to each prompt; 0 trains on the offline pair as the rows rank it"
    )
    explored: Literal["policy", "base"] = Field(
        "policy",
        description="whose answer the exploration term takes: the policy's first response, or one more of the base's",
    )
    temperature: NonNegative = Field(0.0, description="of sampling; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of probability that is sampled from")
    max_new_tokens: PositiveCount = Field(1024, description="tokens of a response, at most")
    max_tokens: PositiveCount = Field(65536, description="padded tokens of one batch, prompts and responses together")
    shard_prompts: PositiveCount = Field(256, description="prompts of a file: what a stop loses at most")

    @field_validator("servers")
    @classmethod
    def _urls(cls, servers: str | None) -> str | None:
        servers = None if servers is None else ",".join(url.strip() for url in servers.split(","))
        for url in [] if servers is None else servers.split(","):
            parts = urlsplit(url)
            _ = parts.port  # a ValueError where it is no number of a port
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is no base URL of a server; expected http://HOST:PORT, several with commas")
            if parts.username is not None or parts.password is not None:
                raise ValueError(
                    f"the URL of {parts.hostname} holds a name or password; put the key of the servers in {API_KEY}"
                )
        return servers

    @model_validator(mode="after")
    def _servers_where_asked(self) -> Self:
        if self.engine == "server" and self.servers is None:
            raise ValueError("rollout.engine is server and rollout.servers is not set: give the URLs of the servers")
        if self.engine != "server" and self.servers is not None:
            raise ValueError(
                f"rollout.servers is set and rollout.engine is {self.engine}; set rollout.engine to server, or "
                "rollout.servers to null"
            )
        return self

    @property
    def urls(self) -> list[str]:
        """Base URLs of the servers, without the path of the API."""
        found = [] if self.servers is None else self.servers.split(",")
        return list(dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in found))


class RankConfig(Section):
    """Which candidates there are, and which groups are worth training on."""

    offline_pair: bool = Field(True, description="chosen and rejected of the rows are candidates too")
    min_margin: NonNegative = Field(0.0, description="least difference of score between chosen and rejected")
    batch_prompts: PositiveCount = Field(64, description="prompts of one call of the ranker")
    timeout_s: Positive = Field(600.0, description="seconds that one call of the ranker may take")
    max_skipped: Fraction = Field(0.05, description="share of prompts that may be skipped before it is an error")


class PairRMConfig(Section):
    """The ranker `pairrm`: which checkpoint, and how it computes."""

    path: str = Field("llm-blender/PairRM", description="folder or hub name of a PairRM checkpoint in safetensors")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="of its computation; bfloat16 changes ranks (default: float16 on a GPU, float32 on a CPU)",
    )
    max_tokens: PositiveCount = Field(16384, description="padded tokens of one batch, at most")

    @field_validator("path")
    @classmethod
    def _home(cls, path: str) -> str:
        return os.path.expanduser(path)


class EvaluationConfig(Section):
    """What each iterate is asked on the held-out prompts (`data.eval`)."""

    prompts: PositiveCount | None = Field(None, description="held-out prompts, the first ones (default: all)")


class RunConfig(Config):
    """Every setting of a whole recipe: iterations of rollout, rank, cache and train (SELM, Algorithm 1)."""

    iterations: PositiveCount = Field(3, description="times to roll out, rank and train")
    portions: PositiveCount | None = Field(
        None, description="equal parts of the prompts, one for each iteration in turn (default: as many as iterations)"
    )
    reference: Literal["previous", "base"] = Field(
        "previous", description="reference of each iteration: the iterate before, or the model the run began with"
    )
    ranker: str | None = Field(None, description="scores candidates: pairrm, or python:MODULE:FUNCTION")
    prepare: str | None = Field(
        None, description="makes model and rows first, in the run's own folder: python:MODULE:FUNCTION"
    )
    processes: PositiveCount | None = Field(
        None, description="processes of a stage, a GPU each (default: as many as GPUs); on a CPU, training is in one"
    )
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rank: RankConfig = Field(default_factory=RankConfig)
    pairrm: PairRMConfig = Field(default_factory=PairRMConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    iteration: dict[PositiveCount, dict[str, Any]] = Field(
        default_factory=dict, description="settings of one iteration alone, by its number"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.model.reference is not None:
            raise ValueError("model.reference is for train; in a run, reference is previous or base")
        if self.model.init is not None:
            raise ValueError("model.init gives random weights, which have no answers worth ranking; give model.path")
        given = (self.model.path, self.model.tokenizer, self.data.train, self.data.eval)
        if self.prepare is not None and any(given):
            raise ValueError(
                "prepare makes the model and the rows; drop model.path, model.tokenizer, data.train and data.eval"
            )
        if self.ranker is not None and self.ranker != PAIRRM:
            parse_function("ranker", self.ranker, or_else=PAIRRM)
        if self.prepare is not None:
            parse_function("prepare", self.prepare)
        return self

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        rollout = self.rollout
        if rollout.responses > 1 and rollout.temperature == 0:
            raise ValueError(
                f"rollout.responses is {rollout.responses} and rollout.temperature is 0: greedy responses to one "
                "prompt are all equal; raise the temperature or ask for one"
            )
        wants_explored = self.exploration_weight != 0
        if wants_explored and rollout.explored == "policy" and rollout.responses == 0:
            raise ValueError(
                f"method {self.method} explores the policy's own response and rollout.responses is 0; ask for 1, "
                "or use method dpo"
            )
        candidates = rollout.responses + self.samples_base + 2 * self.rank.offline_pair
        if candidates < 2:
            raise ValueError(
                f"{candidates} of two candidates a prompt; raise rollout.responses or set rank.offline_pair to true"
            )
        if not self.rank.offline_pair and rollout.temperature == 0:
            raise ValueError(
                "rank.offline_pair is false and rollout.temperature is 0: in the first iteration the greedy responses "
                "of the policy and of the base are equal; raise the temperature"
            )
        return self

    @model_validator(mode="after")
    def _each_iteration(self) -> Self:
        problems: list[InitErrorDetails] = []
        for number, changes in self.iteration.items():
            if number > self.iterations:
                raise ValueError(f"iteration.{number} is set and iterations is {self.iterations}")
            if fixed := sorted((set(changes) & set(type(self).model_fields)) - set(PER_ITERATION)):
                raise ValueError(
                    f"iteration.{number}.{fixed[0]}: the same in every iteration; what may differ: "
                    f"{', '.join(PER_ITERATION)}"
                )
            try:
                self.at(number)
            except ValidationError as error:
                problems += _inside(error, "iteration", number)
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @property
    def samples_base(self) -> bool:
        """Whether the base model answers too: its sample is the explored response."""
        return self.exploration_weight != 0 and self.rollout.explored == "base"

    @property
    def generates(self) -> bool:
        """Whether there are responses to rank, and not the rows' own pairs alone."""
        return self.rollout.responses > 0 or self.samples_base

    def at(self, number: int) -> RunConfig:
        """The settings of one iteration, counted from 1: these, with its own in their place."""
        changes = self.iteration.get(number, {})
        values = self.model_dump(exclude_unset=True)
        values.pop("iteration", None)
        if changes.get("method") == "dpo":
            values.pop("alpha", None)  # of the other iterations
        for name, change in changes.items():
            own = change.model_dump(exclude_unset=True) if isinstance(change, Section) else change
            whole = values.get(name, {})
            values[name] = {**whole, **own} if isinstance(own, dict) and isinstance(whole, dict) else own
        return RunConfig.model_validate(values)


def _inside(error: ValidationError, *outer: str | int) -> list[InitErrorDetails]:
    """The problems of an error, found inside of something."""
    return [
        {"type": e["type"], "loc": (*outer, *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
        for e in error.errors()
    ]


def parse_function(name: str, value: str, or_else: str | None = None) -> tuple[str, str]:
    """Module and function of a setting that names one, or that may be `or_else` besides. Raises ValueError."""
    match = re.fullmatch(r"python:([\w.]+):(\w+)", value)
    if match is None:
        either = "" if or_else is None else f"{or_else} or "
        raise ValueError(f"{name} is {value!r}; expected {either}python:MODULE:FUNCTION")
    return match[1], match[2]


# What may differ between the iterations of a run: how it answers, ranks and learns, not on what or from what.
PER_ITERATION = (
    "method", "beta", "alpha", "label_smoothing", "epochs", "optim", "batch", "rollout", "rank", "checkpoint", "log",
)  # fmt: skip
