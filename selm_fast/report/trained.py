"""Which model a run has trained last, which one it began with, and under which settings to ask both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_fast.config import Config
from selm_fast.errors import Refused
from selm_fast.report import files
from selm_fast.report.runs import Run
from selm_fast.training.inputs import Sizes, measure
from selm_fast.training.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The last model that a run has finished, and the one that it began with.

    run: its name.  model: what the policy is, in words.  base_name: where the base is from.  base_role: what it is.
    policy, base: settings of the training that made the policy, with the `model` of each.
    recorded: the digest of the base's weights when the run began, and the dtype they computed in; None: not recorded.
    """

    run: str
    model: str
    base_name: str
    base_role: str
    policy: Config
    base: Config
    recorded: tuple[str, str] | None

    @property
    def cache(self) -> Path:
        """Where log-probs of its models are kept."""
        return self.policy.cache.dir.expanduser()


def last_trained(run: Run) -> Trained:
    """The models of a run. Raises Refused where no training is finished or its model is not there any more."""
    number = _last_iteration(run)
    folder = RunFolder(run.folder if run.plain else run.folder / f"iter-{number}/train")
    record = files.read_mapping(folder.record_path)
    config = _config(record, folder)
    if run.plain:
        of_base, source, name = record, *_base_of_training(config)
    else:
        first = RunFolder(run.folder / "iter-1/train").record_path
        of_base = files.read_mapping(first) if first.exists() else {}
        source = name = str(run.folder / "prepare/model") if run.setting("prepare") else str(run.setting("model.path"))
    digest = of_base.get("reference" if run.plain and config.model.reference is not None else "weights")
    dtype = of_base.get("dtype")
    path, kept = _weights(folder)
    model = "the model that was trained" if run.plain else f"the model after iteration {number}"
    # What a pass without gradients never needs, and what would load one base twice for two runs.
    settings: dict[str, Any] = {"activation_checkpointing": "none", "reference": None, "init": None}
    if folder.assets.is_dir():  # a copy, which is still there where the model that it came with is not
        settings["tokenizer"] = str(folder.assets)
    common = config.model_copy(
        update={
            # The dither moves no weight by as much as bf16 can hold; in fp32 it is there only where it was asked for.
            "grid_dither": config.grid_dither or False,
            # Rows left out are counted on the page.
            "data": config.data.model_copy(update={"max_skipped": 1.0}),
            "cache": config.cache.model_copy(update={"dir": _cache(run, config)}),
        }
    )
    policy = common.model.model_copy(update=settings | {"path": path})
    base = common.model.model_copy(
        update=settings | {"path": source, "init": None if source is not None else config.model.init}
    )
    return Trained(
        run=run.name,
        model=f"{model} ({kept})",
        base_name=name,
        base_role="its reference model"
        if run.plain and config.model.reference
        else "the model that the run began with",
        policy=common.model_copy(update={"model": policy}),
        base=common.model_copy(update={"model": base}),
        recorded=(digest, dtype) if isinstance(digest, str) and dtype in ("float32", "bfloat16") else None,
    )


def check_models(trained: Trained) -> Sizes:
    """The sizes of a run's policy. Raises Refused where one of its two models cannot be read."""
    try:
        base = measure(trained.base)
    except Refused as error:
        raise Refused(
            f"the base model of {trained.run}, {trained.base_name}, cannot be read: {error}; put it back where it was "
            "(a relative path counts from the folder that the report is started in)"
        ) from error
    sizes = measure(trained.policy)
    if sizes.vocab != base.vocab:
        raise Refused(
            f"the policy of {trained.run} has {sizes.vocab} token ids and its base model {trained.base_name} has "
            f"{base.vocab}: no response has a log-prob under both"
        )
    return sizes


def _last_iteration(run: Run) -> int:
    """The last iteration whose training is finished; 1 of a folder of `train` alone."""
    finished: Sequence[int] = [1] if run.plain and run.done else []
    if not run.plain:
        finished = [one.number for one in run.iterations if "train" in one.manifests]
    if not finished:
        raise Refused(
            f"{run.folder} has no finished training, and so no implicit rewards: let it finish an iteration, or leave "
            "out --data"
        )
    return finished[-1]


def _config(record: dict[str, Any], folder: RunFolder) -> Config:
    """The settings of a training, from its record."""
    values = record.get("config")
    if isinstance(values, dict) and values.get("method") == "dpo":
        values = {name: value for name, value in values.items() if name != "alpha"}  # the default, written out
    return files.checked(Config, values, f"{folder.record_path}: config")


def _base_of_training(config: Config) -> tuple[str | None, str]:
    """Path of the reference model of a training (None: random weights), and its name."""
    path = config.model.reference or config.model.path
    return path, path if path is not None else f"random weights of {config.model.init}"


def _weights(folder: RunFolder) -> tuple[str, str]:
    """Where the weights of a finished training are, and in which form."""
    if folder.masters.exists() or any(folder.checkpoints.glob("step-*")):
        return str(folder.path), "its fp32 masters"
    if (folder.model / "config.json").is_file():
        return str(folder.model), "its exported weights"
    raise Refused(f"{folder.path} has neither masters nor a model any more: there is nothing to ask for log-probs")


def _cache(run: Run, config: Config) -> Path:
    """The cache of reference log-probs that the run's settings name: a stage's own folder is none of a report's."""
    found = run.setting("cache.dir")
    return Path(found) if isinstance(found, str) else config.cache.dir
