"""Real folders of `selm-fast train`, trained from a tiny model, and their implicit rewards by the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.model import Policy
from selm_fast.report.runs import Run, read_runs
from selm_fast.training.final import load_masters
from selm_fast.training.run_folder import RunFolder

from ..training.harness import Rows, groups_of, make_rows, override, run

TRAINED_ON = make_rows(8, seed=41)
BETA = 0.1


def held_out_rows() -> Rows:
    """Rows of which some are left out: numbers of rows are not places among the groups."""
    rows = make_rows(9, seed=42)
    rows[1] |= {"prompt": "why", "chosen": " the same", "rejected": " the same"}
    # Equal up to the limit of a short `data.max_length`, and so of no use under it.
    start = " " + "water stone " * 4
    rows[4] |= {"prompt": "how", "chosen": start + "yes", "rejected": start + "no"}
    return rows


def settings(folder: Path, model: Path, **overrides: Any) -> Config:
    """Settings of a tiny training; `optim__lr=1e-4` sets optim.lr."""
    values: dict[str, Any] = {
        "output_dir": folder,
        "method": "dpo",
        "beta": BETA,
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {"max_length": 64, "max_prompt_length": 40},
        "batch": {"groups": 4, "max_tokens": 120},
        "optim": {"lr": 1e-2, "warmup": 0.0},
        "cache": {"dir": str(folder.parent / "cache")},
    }
    return Config.model_validate(override(values, overrides))


def train_run(folder: Path, model: Path, **overrides: Any) -> Path:
    """A finished training."""
    run(settings(folder, model, **overrides), TRAINED_ON)
    return folder


def read(*folders: Path) -> list[Run]:
    """The runs in folders."""
    return read_runs(folders)


def groups(folder: Path, model: Path, **overrides: Any) -> list[TokenGroup]:
    """The held-out groups as a run with these settings reads them."""
    return groups_of(settings(folder, model, **{"data__max_skipped": 1.0} | overrides), held_out_rows())


def policy_of(folder: Path) -> Policy:
    """The model that a training has left, in fp32."""
    kept = RunFolder(folder)
    return Policy.from_tensors(kept.assets, load_masters(kept)[0])


def by_definition(policy: Policy, base: Policy, found: list[TokenGroup], beta: float) -> tuple[Tensor, Tensor]:
    """beta * [log pi(y|x) - log pi_base(y|x)] of chosen and of rejected, by each model's own unpacked forward."""

    def of(prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            here, there = (model.own_logps(prompt, response).double().sum().item() for model in (policy, base))
        return beta * (here - there)

    return (
        torch.tensor([of(group.prompt, group.chosen) for group in found], dtype=torch.float64),
        torch.tensor([of(group.prompt, group.rejected) for group in found], dtype=torch.float64),
    )
