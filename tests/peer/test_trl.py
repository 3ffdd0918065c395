"""Invariant 3: with alpha 0 this is TRL's DPO: the same ids, losses, gradients, and weights after five steps."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selm_fast.config import Config
from selm_fast.data.dataset import load_groups
from selm_fast.data.packing import pack
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.model import Policy
from selm_fast.training.run_train import train

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (extra: peer)"),
]

WORDS = ["sky", "sea", "air", "blue", "green", "is", "not", "why", "how", "light", "tree", "stone", "water", "over"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
ROWS, STEP = 20, 4  # five steps
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "grad_norm", "learning_rate",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, no network, no progress bars."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny Llama and another one, its reference, each with a tokenizer of words."""
    backend = Backend(models.WordLevel({word: nth for nth, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **tokens, additional_special_tokens=SPECIAL[3:], chat_template=CHAT
    )
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS) + 6, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    paths = {}
    for seed, name in enumerate(("policy", "reference")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        paths[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def make_rows(conversational: bool) -> list[dict[str, Any]]:
    """Rows of all lengths, some of one-word responses."""
    generator = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    rows: list[dict[str, Any]] = []
    while len(rows) < ROWS:
        prompt, chosen, rejected = text(1, 10), text(1, 12), text(1, 12)
        if chosen == rejected:
            continue
        if conversational:
            answers = {"chosen": chosen, "rejected": rejected}
            rows.append(
                {"prompt": [{"role": "user", "content": prompt}]}
                | {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
            )
        else:
            rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


@dataclass
class Setup:
    """What both trainers are told."""

    conversational: bool = False
    own_reference: bool = False  # a reference model other than the policy before its first step
    precompute: bool = False  # TRL's; ours always is
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta: float = 0.1
    lr: float = 1e-3
    max_tokens: int = 16384  # ours: micro-batches


def trl_trainer(setup: Setup, folders: dict[str, str], output: Path) -> Any:
    """TRL's trainer, in fp32 and in the order of the rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    schedule = "constant_with_warmup" if setup.schedule == "constant" else setup.schedule
    arguments = DPOConfig(
        output_dir=str(output), beta=setup.beta, loss_type=["sigmoid"], max_length=64,
        precompute_ref_log_probs=setup.precompute, per_device_train_batch_size=STEP, num_train_epochs=1,
        learning_rate=setup.lr, lr_scheduler_type=schedule, warmup_steps=setup.warmup, optim="adamw_torch",
        weight_decay=setup.weight_decay, max_grad_norm=setup.max_grad_norm,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    policy = LlamaForCausalLM.from_pretrained(folders["policy"], dtype=torch.float32)
    reference = (
        LlamaForCausalLM.from_pretrained(folders["reference"], dtype=torch.float32) if setup.own_reference else None
    )
    rows = Dataset.from_list(make_rows(setup.conversational))
    return DPOTrainer(
        model=policy, ref_model=reference, args=arguments, train_dataset=rows,
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["policy"]),
    )  # fmt: skip


def our_config(setup: Setup, folders: dict[str, str], folder: Path) -> Config:
    """The same settings in ours."""
    return Config.model_validate(
        {
            "method": "dpo", "beta": setup.beta, "dtype": "float32", "device": "cpu",
            "output_dir": folder / "run",
            "model": {"path": folders["policy"], "reference": folders["reference"] if setup.own_reference else None},
            "data": {"max_length": 64, "max_prompt_length": 32},
            "batch": {"groups": STEP, "max_tokens": setup.max_tokens, "shuffle": False},
            "optim": {
                "lr": setup.lr, "schedule": setup.schedule, "warmup": setup.warmup, "weight_decay": setup.weight_decay,
                "max_grad_norm": setup.max_grad_norm,
            },
            "cache": {"dir": folder / "cache"},
        }
    )  # fmt: skip


SETUPS = {
    "the policy as reference": Setup(),
    "precomputed": Setup(precompute=True, schedule="linear", conversational=True),
    "another reference": Setup(own_reference=True, weight_decay=0.1, schedule="cosine", warmup=0.4),
    "another reference, precomputed": Setup(
        own_reference=True, precompute=True, beta=0.5, max_grad_norm=0.05, max_tokens=60, conversational=True
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "the policy as reference",
        pytest.param("precomputed", marks=pytest.mark.slow),
        pytest.param("another reference", marks=pytest.mark.slow),
        "another reference, precomputed",
    ],
)
def test_five_steps_end_in_the_same_weights_with_the_same_metrics(
    name: str, folders: dict[str, str], tmp_path: Path
) -> None:
    setup = SETUPS[name]
    before = safetensors.torch.load_file(Path(folders["policy"]) / "model.safetensors")
    trl = trl_trainer(setup, folders, tmp_path / "trl")
    trl.train()
    lines: list[dict[str, Any]] = []
    result = train(our_config(setup, folders, tmp_path), rows=make_rows(setup.conversational), on_log=lines.append)
    ours = safetensors.torch.load_file(result.model_dir / "model.safetensors")

    logged = [line for line in trl.state.log_history if "rewards/margins" in line]
    assert len(lines) == len(logged) == result.steps == ROWS // STEP
    for nth, (own, theirs) in enumerate(zip(lines, logged, strict=True)):
        for metric in METRICS:
            # TRL's log-probs of a response are fp32 sums: their last bit is worth 4e-6 nats, times beta.
            assert own[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=2e-6), f"step {nth}: {metric}"
    theirs = {key: value.detach() for key, value in trl.model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        moved, apart = (value - before[key]).norm(), (ours[key] - value).norm()
        # By norm: where a gradient cancels to almost nothing, AdamW turns its last bits into a step of any sign.
        assert apart <= 1e-5 * value.norm(), f"{key}: {apart:.3g} apart, of {value.norm():.3g}"
        assert apart <= 5e-4 * moved, f"{key}: {apart:.3g} apart after a way of {moved:.3g}"


@pytest.fixture
def one_step(folders: dict[str, str], tmp_path: Path) -> Callable[[Setup], tuple[dict[str, Any], dict[str, Any]]]:
    """Ids, loss and gradients of the first step, ours and TRL's."""

    def run(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
        trl = trl_trainer(setup, folders, tmp_path / "trl")
        trl.model.train()
        inputs = next(iter(trl.get_train_dataloader()))
        loss = trl.compute_loss(trl.model, trl._prepare_inputs(inputs))
        loss.backward()
        their_ids = [
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        theirs = {"ids": their_ids, "loss": loss.item(), "gradients": gradients_of(trl.model)}

        config = our_config(setup, folders, tmp_path)
        tokenizer = load_tokenizer(folders["policy"])
        rows = make_rows(setup.conversational)
        groups = load_groups(None, config.data, tokenizer, rows=rows, wants_explored=False).groups[:STEP]
        policy = Policy.from_pretrained(folders["policy"])
        reference = Policy.from_pretrained(folders["reference" if setup.own_reference else "policy"])
        (batch,) = pack(groups)
        with torch.no_grad():
            logps = reference.sequence_logps(batch)
        our_loss, _ = policy.loss(batch, logps, beta=setup.beta)
        our_loss.backward()
        our_ids = [(*group.prompt, *group.chosen) for group in groups] + [
            (*group.prompt, *group.rejected) for group in groups
        ]
        return {"ids": our_ids, "loss": our_loss.item(), "gradients": gradients_of(policy.model)}, theirs

    return run


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """By parameter; each must have one."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_ids_loss_and_the_gradients_of_all_parameters_are_equal(conversational: bool, one_step: Any) -> None:
    ours, theirs = one_step(Setup(own_reference=True, conversational=conversational))
    assert ours["ids"] == theirs["ids"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert abs(ours["loss"] - 0.693147) > 1e-3  # else a wrong sign would not show
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, value in theirs["gradients"].items():
        error = (ours["gradients"][name] - value).norm()
        assert error <= 1e-5 * value.norm(), f"{name}: {error:.3g} of {value.norm():.3g}"
