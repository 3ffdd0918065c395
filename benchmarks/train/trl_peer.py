"""TRL's DPOTrainer, and SELM as a subclass of it, as a user of TRL would write it."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from benchmarks.train.contestant import Gate, Job
from benchmarks.train.workload import Row


def run(job: Job, gate: Gate, *, method: str, cached: bool, checkpointing: bool) -> None:
    """Train with TRL. cached: `precompute_ref_log_probs`.  checkpointing: its default is on."""
    workload, settings = job.workload, job.workload.settings
    on_cpu = workload.device == "cpu"
    arguments = DPOConfig(
        output_dir=str(job.scratch), beta=settings.beta, loss_type=["sigmoid"], max_length=settings.max_length,
        precompute_ref_log_probs=cached, per_device_train_batch_size=settings.groups, num_train_epochs=1,
        learning_rate=settings.lr, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch_fused",
        weight_decay=0.0, max_grad_norm=settings.max_grad_norm, train_sampling_strategy="sequential",
        bf16=workload.dtype == "bf16", gradient_checkpointing=checkpointing, use_cpu=on_cpu, logging_steps=1,
        save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=not on_cpu, seed=settings.seed, remove_unused_columns=False,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    reference = None
    if job.reference is not None:
        reference = AutoModelForCausalLM.from_pretrained(job.reference, dtype=torch.float32)
    kinds: dict[str, Any] = {"selm": SelmTrainer, "dpo": GivenIds}
    trainer = kinds[method](
        model=policy, ref_model=reference, args=arguments, train_dataset=dataset(job.rows, method),
        processing_class=AutoTokenizer.from_pretrained(workload.tokenizer), callbacks=[AtTheGate(gate)], gate=gate,
        **({"alpha": settings.alpha} if method == "selm" else {}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def dataset(rows: Any, method: str) -> Dataset:
    """Rows as the trainer has them after its own tokenisation."""

    def columns(row: Row) -> dict[str, list[int]]:
        found = {"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
        return found | {"explored_ids": row.explored} if method == "selm" else found

    return Dataset.from_list([columns(row) for row in rows])


class AtTheGate(TrainerCallback):
    """Reports after every step, which is logged when all of it is done."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is set up."""
        self.gate.ready()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Loss and gradient norm of a step; the last line, of the whole run, has neither."""
        if "grad_norm" in logs:
            self.gate.step(float(logs["loss"]), float(logs["grad_norm"]))


class GivenIds(DPOTrainer):
    """DPOTrainer on rows of token ids; its reference pass is timed."""

    def __init__(self, *, gate: Gate, **settings: Any) -> None:
        self.gate = gate
        super().__init__(**settings)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any, **settings: Any) -> Any:
        with self.gate.reference_pass():
            return super()._precompute_ref_logps(*arguments, **settings)


class ThreeResponses(DataCollatorForPreference):
    """Chosen, then rejected, then explored sequences, padded to the longest of them all."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of ids -> input_ids, attention_mask, completion_mask (3B, L)."""
        ids, completion = [], []
        for role in ("chosen_ids", "rejected_ids", "explored_ids"):
            for example in examples:
                ids.append(torch.tensor((example["prompt_ids"] + example[role])[: self.max_length]))
                mask = [0] * len(example["prompt_ids"]) + [1] * len(example[role])
                completion.append(torch.tensor(mask[: self.max_length]))
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id, padding_side="right"),
            "attention_mask": pad([torch.ones_like(one) for one in ids], padding_value=0, padding_side="right"),
            "completion_mask": pad(completion, padding_value=0, padding_side="right"),
        }
        if "ref_logps" in examples[0]:
            batch["ref_logps"] = torch.tensor([example["ref_logps"] for example in examples])  # (B, 3)
        return batch


class SelmTrainer(GivenIds):
    """SELM: DPO, plus alpha * beta * (log-ratio of the explored response) (arXiv 2405.19332, Eq. 4.2)."""

    def __init__(self, *, alpha: float, processing_class: Any, args: DPOConfig, **settings: Any) -> None:
        self.alpha = alpha
        collator = ThreeResponses(pad_token_id=processing_class.pad_token_id, max_length=args.max_length)
        super().__init__(processing_class=processing_class, args=args, data_collator=collator, **settings)

    def sequence_logps(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Summed log-prob of every response: (3B,), by the trainer's own fused head."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, use_cache=False,
            fused_lm_head=True,
        )  # fmt: skip
        return outputs.log_probs[:, -(labels.shape[1] - 1) :].sum(1)

    def reference_logps(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """As `sequence_logps`, without a gradient."""
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self.accelerator.autocast():
            return self.sequence_logps(model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        with self.gate.reference_pass():
            model, found = self.ref_model or self.model, []
            for start in range(0, len(dataset), batch_size):
                rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
                inputs = self._prepare_inputs(self.data_collator(rows))
                found.append(self.reference_logps(model, inputs).view(3, -1).T)
            return dataset.add_column("ref_logps", torch.cat(found).tolist())

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        logps = self.sequence_logps(model, inputs).view(3, -1)
        if self.precompute_ref_logps:
            reference = inputs["ref_logps"].T
        else:
            reference = self.reference_logps(self.ref_model, inputs).view(3, -1)
        chosen, rejected, explored = logps - reference
        losses = -logsigmoid(self.beta * (chosen - rejected)) + self.alpha * self.beta * explored
        self.record(chosen.detach(), rejected.detach(), explored.detach())
        return losses.mean()

    def record(self, chosen: torch.Tensor, rejected: torch.Tensor, explored: torch.Tensor) -> None:
        """The rewards, for the log."""
        found = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/explored": explored}
        for name, ratio in found.items():
            self._metrics["train"][name].append(self.beta * self.accelerator.gather(ratio).mean().item())
        accuracy = (self.accelerator.gather(chosen) > self.accelerator.gather(rejected)).float().mean()
        self._metrics["train"]["rewards/accuracies"].append(accuracy.item())
