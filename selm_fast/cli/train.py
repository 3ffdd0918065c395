"""The arguments of `selm-fast train`: a recipe, settings, and in how many processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selm_fast.cli.schema import Setting
from selm_fast.cli.settings import load_config, split_arguments
from selm_fast.config import Config
from selm_fast.errors import Refused

NPROC = Setting(
    name="nproc",
    section="",
    kind="integer",
    is_path=False,
    choices=(),
    optional=False,
    bounds=("at least 1",),
    default=None,
    description="train in so many processes of this machine, a GPU each, the weights sharded over them",
)


@dataclass(frozen=True, slots=True)
class TrainArguments:
    """What a command line asks of `train`. rest: the arguments without --nproc."""

    config: Config
    nproc: int | None
    rest: list[str]


def train_arguments(arguments: Sequence[str]) -> TrainArguments:
    """What `selm-fast train` was given. Raises: Refused for what is not understood."""
    split = split_arguments(arguments, Config, {NPROC.name: NPROC})
    config = load_config(None if split.recipe is None else Path(split.recipe), split.flags)
    nproc = int(split.options[NPROC.name]) if NPROC.name in split.options else None
    if nproc is not None and nproc < 1:
        raise Refused(f"--nproc is {nproc}; expected {NPROC.expected}")
    return TrainArguments(config, nproc, [*([split.recipe] if split.recipe else []), *split.flags])
