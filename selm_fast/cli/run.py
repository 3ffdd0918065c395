"""The arguments of `selm-fast run`: a recipe by name or path, settings, and how far to go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selm_fast.cli.schema import Setting
from selm_fast.cli.settings import load_run_config, split_arguments
from selm_fast.cli.shipped import find_recipe, shipped
from selm_fast.config import RunConfig
from selm_fast.errors import Refused

UNTIL = Setting(
    name="until",
    section="",
    kind="string",
    is_path=False,
    choices=("rollout", "rank", "cache", "train"),
    optional=False,
    bounds=(),
    default=None,
    description="stop once this stage is done",
)
VLLM_PYTHON = Setting(
    name="vllm-python",
    section="",
    kind="string",
    is_path=True,
    choices=(),
    optional=False,
    bounds=(),
    default=None,
    description="Python of the environment that has vLLM, for rollout.engine vllm (default: this one)",
)
SWITCHES = {
    "dry-run": "say what would be done, and do nothing",
    "redo": "do again the stages that changed settings invalidate",
}


@dataclass(frozen=True, slots=True)
class RunArguments:
    """What a command line asks of `run`."""

    config: RunConfig
    until: str | None
    redo: bool
    dry_run: bool
    vllm_python: str | None


def run_arguments(arguments: Sequence[str]) -> RunArguments:
    """What `selm-fast run` was given; a run without output_dir goes to runs/ and the recipe's name.

    Raises: Refused for what is not understood, and where there is no recipe.
    """
    own: dict[str, Setting | None] = {UNTIL.name: UNTIL, VLLM_PYTHON.name: VLLM_PYTHON} | dict.fromkeys(SWITCHES)
    split = split_arguments(arguments, RunConfig, own)
    if split.recipe is None:
        raise Refused(f"no recipe is given; expected a YAML file or one of {', '.join(shipped())}")
    path = find_recipe(split.recipe)
    config = load_run_config(path, split.flags)
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": Path("runs") / path.stem})
    given = split.options
    return RunArguments(config, given.get(UNTIL.name), "redo" in given, "dry-run" in given, given.get(VLLM_PYTHON.name))
