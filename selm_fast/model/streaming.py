"""Weights from safetensors files straight into the shards of a model: no process ever holds the whole of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from selm_fast.errors import Refused
from selm_fast.model import support
from selm_fast.model.sharding import first_row, local


def build(source: str, *, trust_remote_code: bool) -> Any:
    """The model that a folder or hub name describes: parameters on the meta device, tied as they should be.

    Buffers (rotary frequencies) are computed as in any construction; on the meta device they would have to be guessed.
    Raises Refused for what is not served.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        support.check_config(config.to_dict(), trust_remote_code=trust_remote_code, source=source)
        with no_init_weights(), _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            model.tie_weights()
    except (OSError, ValueError) as error:
        raise (error if isinstance(error, Refused) else Refused(f"cannot load the model {source}: {error}")) from error
    with suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that is registered while the block runs goes to the meta device; its memory was never touched."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied must stay the same object
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def stream(source: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read the weights of a folder or hub name into parameters, sharded or whole; each process reads its rows alone.

    parameters: fp32, by their names in the model, tied ones once.
    Raises Refused where the files are not of this model.
    """
    try:
        files = _files(source)
        missing = sorted(parameters.keys() - files.keys())
        if missing:
            shown = ", ".join(missing[:3]) + " and others" * (len(missing) > 3)
            raise Refused(
                f"{source} has no weights named {shown}: its files are not of this model, or name its weights in an "
                "older way; load it with transformers and save it again with save_pretrained"
            )
        by_file: dict[Path, list[str]] = {}
        for name in parameters:
            by_file.setdefault(files[name], []).append(name)
        for path, names in sorted(by_file.items()):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    _fill(parameters[name], file.get_slice(name), f"{name} in {path}")
    except (OSError, SafetensorError) as error:
        raise Refused(f"cannot load the weights of {source}: {error}") from error


def _fill(parameter: nn.Parameter, stored: Any, what: str) -> None:
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise Refused(
            f"{what} is {tuple(stored.get_shape())} and the model's is {tuple(parameter.shape)}: "
            "the weights are not those of its config.json"
        )
    target, start = local(parameter), first_row(parameter)
    if target.numel():
        target.copy_(stored[start : start + target.shape[0]])


def _files(source: str) -> dict[str, Path]:
    """Which file each stored tensor is in."""
    source = os.path.expanduser(source)
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        paths = sorted({Path(path) for path in get_checkpoint_shard_files(source, index)[0]})
    else:
        paths = [Path(str(cached_file(source, SAFE_WEIGHTS_NAME)))]
    files: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


@torch.no_grad()
def take(tensors: Callable[[str], Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Fill parameters, sharded or whole, from whole tensors by name."""
    for name, parameter in parameters.items():
        target, start = local(parameter), first_row(parameter)
        target.copy_(tensors(name)[start : start + target.shape[0]])
