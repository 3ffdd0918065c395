"""Export: a Hugging Face model folder from a run's masters, which transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import selm_fast
from selm_fast.errors import Refused
from selm_fast.training import storage
from selm_fast.training.final import load_masters
from selm_fast.training.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAPERS = {
    "selm": "[SELM](https://arxiv.org/abs/2405.19332)",
    "xpo": "[XPO](https://arxiv.org/abs/2405.21046)",
    "dpo": "[DPO](https://arxiv.org/abs/2305.18290)",
}


def save_assets(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write what an export needs beside the weights, once: model and generation configuration, tokenizer."""
    if folder.exists():
        return
    with storage.new_folder(folder) as temporary:
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def export_run(run: Path, out: Path, dtype: str | None = None) -> None:
    """Write the weights of a run's newest checkpoint to `out` as a model folder.

    dtype: "bfloat16" or "float32" (the masters themselves); None: the run's compute dtype.
    Raises Refused where `run` holds no checkpoint or `out` exists.
    """
    folder = RunFolder(run)
    record = folder.record()
    if record is None:
        raise Refused(f"{run} holds no run: it has no run.json; give the output_dir of selm-fast train")
    if out.exists():
        raise Refused(f"{out} exists and is never overwritten; choose a new folder")
    dtype = dtype or record["dtype"]
    weights, step = load_masters(folder, DTYPES[dtype])
    write_model(out, folder.assets, weights, dtype, record | {"step": step})


def write_model(out: Path, assets: Path, weights: dict[str, Tensor], dtype: str, record: dict[str, Any]) -> None:
    """Write a model folder, whole or not at all: weights (in `dtype`), configuration, tokenizer, model card."""
    config = AutoConfig.from_pretrained(assets)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])  # its dtype is what config.json will say
    if (assets / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(assets)
    with storage.new_folder(out) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        for path in assets.iterdir():
            if not (temporary / path.name).exists():
                shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(model_card(record), "utf-8")


def model_card(record: dict[str, Any]) -> str:
    """The README.md of an exported model: what it is, how it was trained."""
    config = record["config"]
    method = config["method"]
    base = config["model"]["path"] or f"random weights ({Path(config['model']['init']).name})"
    settings = {
        "method": method,
        "beta": config["beta"],
        "exploration weight": record["exploration_weight"],
        "learning rate": config["optim"]["lr"],
        "groups a step": config["batch"]["groups"],
        "steps": record["step"],
        "groups": record["num_groups"],
        "max length": config["data"]["max_length"],
        "seed": config["seed"],
    }
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["selm_fast", method, "preference-optimization"],
    }
    if config["model"]["path"] is not None and not Path(config["model"]["path"]).exists():
        header["base_model"] = config["model"]["path"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [
        f"# {Path(base).name}, trained with {PAPERS[method]}",
        "",
        f"Trained from {Path(base).name} by selm_fast {selm_fast.__version__}.",
        "",
    ]
    lines += ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items()), ""]
    return "\n".join(lines)
