"""A trainer on random weights that are made where they are used: no file and no host memory holds a model of 8B."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks.train.workload import LENGTHS, SHAPES, Row, Settings, Workload, generate, read
from selm_fast.config import Config
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import Plan, plan_epoch
from selm_fast.model import Policy
from selm_fast.model.shape import shape_of
from selm_fast.model.sharding import local
from selm_fast.training.dither import salt_of
from selm_fast.training.loop import Trainer
from selm_fast.training.machine import choose_device, matmul_flops
from selm_fast.training.masters import ShardedMasters, spread
from selm_fast.training.optimizer import AdamW
from selm_fast.training.progress import Display
from selm_fast.training.reference_cache import ReferenceCache, ReferenceLogps
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.signals import StopFlag
from selm_fast.training.utilisation import Utilisation
from selm_fast.training.weights import sharded
from selm_fast.training.world import World

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = SHAPES | {"tiny": TINY}
MEANS = LENGTHS | {"tiny": (10, 16, 16, 16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and how it is trained.

    steps: that are timed; one before them warms up, and one after them is watched for what waits for the device.
    repeated: steps on the groups of one micro-batch, whose loss must fall.  twice: whether two runs are compared.
    """

    name: str
    shape: str
    checkpointing: str
    moments: str
    groups: int = 32
    steps: int = 10
    max_tokens: int = 16384
    max_length: int = 1024
    repeated: int = 8
    twice: bool = False

    @property
    def settings(self) -> Settings:
        """What the rows are cut by, and the method."""
        return Settings(
            groups=self.groups, max_tokens=self.max_tokens, max_length=self.max_length,
            max_prompt_length=self.max_length // 2,
        )  # fmt: skip

    def config(self, device: str) -> Config:
        """The settings of `train`."""
        shared = self.settings
        return Config.model_validate(
            {
                "method": "selm", "alpha": shared.alpha, "beta": shared.beta, "seed": shared.seed, "device": device,
                "model": {"activation_checkpointing": self.checkpointing},
                "data": {"max_length": shared.max_length, "max_prompt_length": shared.max_prompt_length},
                "batch": {"groups": self.groups, "max_tokens": self.max_tokens, "shuffle": False},
                "optim": {
                    "lr": shared.lr, "schedule": "constant", "warmup": 0.0, "moments": self.moments,
                    "max_grad_norm": shared.max_grad_norm,
                },
            }
        )  # fmt: skip


def groups_of(case: Case, data: Path | None, scratch: Path) -> list[TokenGroup]:
    """Enough groups for every step, of lengths like UltraFeedback's, or the first of real rows.

    data: a folder with selm_train.jsonl and tokenizer/.
    Raises ValueError where it has too few.
    """
    wanted = case.groups * (case.steps + 2)
    rows: Sequence[Row]
    if data is None:
        rows = generate(wanted, MODELS[case.shape]["vocab_size"], MEANS[case.shape], case.settings)
    else:
        (scratch / "tokenizer").symlink_to((data / "tokenizer").resolve())
        workload = Workload(
            folder=scratch, shape=case.shape, device="cpu", dtype="fp32", source=data.name, settings=case.settings
        )
        rows = read(data / "selm_train.jsonl", workload)
        if len(rows) < wanted:
            raise ValueError(f"--data has {len(rows)} rows; {case.name} takes {wanted}")
    return [TokenGroup(row.prompt, row.chosen, row.rejected, row.explored) for row in rows[:wanted]]


def plan_of(groups: Sequence[TokenGroup], config: Config, ranks: int = 1) -> Plan:
    """The plan that `train` makes of them."""
    batch = config.batch
    return plan_epoch(
        groups, groups_per_step=batch.groups, max_tokens=batch.max_tokens, seed=config.seed, shuffle=batch.shuffle,
        ranks=ranks,
    )  # fmt: skip


def write_config(shape: str, folder: Path) -> Path:
    """The model's config.json, the only file there is of it."""
    LlamaConfig(**MODELS[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    return folder


@torch.no_grad()
def draw(parameters: Mapping[str, nn.Parameter], *, seed: int, deviation: float) -> None:
    """Fill shards where they lie: matrices normal around 0, norms ones; the same seed gives the same bits."""
    for name, parameter in parameters.items():
        part = local(parameter)
        generator = torch.Generator(part.device).manual_seed((seed ^ salt_of(name)) % 2**63)
        part.fill_(1.0) if parameter.dim() < 2 else part.normal_(0.0, deviation, generator=generator)


def load(config: Config, model: Path, world: World) -> tuple[Policy, ShardedMasters]:
    """As `load` of `selm_fast.training.weights`, but for where the weights come from. model: folder of config.json."""
    dtype = choose_device(config)[1]
    deviation = LlamaConfig.from_pretrained(model).initializer_range
    policy = sharded(config, str(model), world, dtype, lambda found: draw(found, seed=config.seed, deviation=deviation))
    masters = ShardedMasters(policy, dtype)
    if dtype == torch.bfloat16:
        spread(masters.masters, config.seed)
    return policy, masters


def reference_of(policy: Policy, masters: ShardedMasters, plan: Plan, world: World, cache: Path) -> ReferenceLogps:
    """The reference pass of `train`."""
    identity = {"dtype": str(masters.compute).removeprefix("torch.")}
    found = ReferenceCache(cache, identity).fill(plan, policy, world=world, stop=StopFlag())
    masters.publish()
    return found


def trainer_of(
    config: Config, world: World, policy: Policy, masters: ShardedMasters, plans: list[Plan], reference: ReferenceLogps,
    optimizer: AdamW | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of `train`, without a folder that it could write to. optimizer: one that has its moments already."""
    utilisation = Utilisation(shape_of(policy.model), world.size, matmul_flops(world.device, masters.compute))
    return Trainer(
        config, world, RunFolder(Path(os.devnull)), policy, masters, optimizer or AdamW(masters.masters, config),
        plans, reference, None, None, utilisation, Display(quiet=True), StopFlag(), _heard,
    )  # fmt: skip


def _heard(_: dict[str, Any]) -> None:
    """Nobody listens to the log."""
