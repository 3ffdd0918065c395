"""The training loop: one epoch plan after another, one optimiser step after another, exactly where it was left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from selm_fast.config import Config
from selm_fast.data.packing import Plan
from selm_fast.errors import RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.training import checkpoint
from selm_fast.training.evaluate import evaluate
from selm_fast.training.masters import Masters
from selm_fast.training.metrics import MetricsLog, peak_memory_gib, step_means
from selm_fast.training.progress import Display, Phase
from selm_fast.training.reference_cache import ReferenceLogps
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.schedule import learning_rate
from selm_fast.training.signals import StopFlag


@dataclass(slots=True)
class Position:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0
    evaluated: int = -1  # the last step that was evaluated
    num_tokens: int = 0  # packed tokens trained on
    bad_steps: int = 0  # steps not applied, in all
    bad_in_a_row: int = 0
    metrics_bytes: int = 0

    def to_json(self) -> dict[str, int]:
        """As a checkpoint's state."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Trainer:
    """Everything one run needs, and its position.

    plans: one an epoch; the reference values were made for the first.
    """

    config: Config
    folder: RunFolder
    policy: Policy
    masters: Masters
    optimizer: torch.optim.Optimizer
    plans: list[Plan]
    reference: ReferenceLogps
    eval_plan: Plan | None
    eval_reference: ReferenceLogps | None
    display: Display
    stop: StopFlag
    on_log: Callable[[dict[str, Any]], None]
    position: Position = field(default_factory=Position)
    metrics: MetricsLog = field(init=False)
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _logged_at: float = 0.0
    training_seconds: float = 0.0  # of the steps alone: no evaluation, no checkpoint

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of each epoch."""
        return len(self.plans[0].steps)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.steps_per_epoch * len(self.plans)

    @property
    def loss_settings(self) -> dict[str, float]:
        """What `preference_loss` is given beside log-probs."""
        config = self.config
        return {
            "beta": config.beta,
            "exploration_weight": config.exploration_weight,
            "label_smoothing": config.label_smoothing,
        }

    def resume(self) -> None:
        """Go to the newest sound checkpoint, if there is one."""
        found = checkpoint.load_latest(self.folder.checkpoints)
        checkpoint.clear_after(self.folder.checkpoints, found)
        if found is not None:
            checkpoint.restore(found, self.masters, self.optimizer)
            self.position = Position(**found.state)
            self.display.say(f"resuming after step {found.step} of {self.total_steps}")

    def run(self) -> None:
        """Train to the end, evaluating and saving on the way.

        Raises Stopped after a signal and RunFailed after too many bad steps; both leave a checkpoint to go on from.
        """
        step, length = self.position.step, self.position.metrics_bytes
        self.metrics = MetricsLog(self.folder.path, tensorboard=self.config.log.tensorboard, step=step, length=length)
        self._logged_at = time.perf_counter()
        try:
            with self.display.phase("training", self.total_steps, "steps", done=step, lines=False) as phase:
                self._run(phase)
        finally:
            self.metrics.close()

    def _run(self, phase: Phase) -> None:
        position, total = self.position, self.total_steps
        while True:
            if self._evaluation_due() and not self._evaluate():
                self._save_and_stop()
            if position.step == total:
                self._flush(phase)
                return
            began = time.perf_counter()
            if not self._train_step():
                self._save_and_stop()
            self.training_seconds += time.perf_counter() - began
            position.step += 1
            phase.advance()
            if position.step % self.config.log.every == 0 or position.step == total:
                self._flush(phase)
            if position.bad_in_a_row >= self.config.max_bad_steps:
                self._save()
                raise RunFailed(
                    f"{position.bad_in_a_row} steps in a row had a loss or gradient that is not finite and were not "
                    "applied; their rows are "
                    f"in {self.folder.path / 'bad_steps.jsonl'}. Lower optim.lr, or look at those rows"
                )
            if self.stop.requested:
                self._save_and_stop()
            if position.step % self.config.checkpoint.every == 0 or position.step == total:
                self._save()

    def _train_step(self) -> bool:
        """One optimiser step; False, with nothing changed, after a signal between two micro-batches."""
        epoch, step = divmod(self.position.step, self.steps_per_epoch)
        plan = self.plans[epoch]
        num_groups = plan.num_groups(step)
        first = sum(map(len, plan.steps[:step]))
        device = self.policy.head.weight.device
        losses, parts, row_ids, num_tokens = [], [], list[int](), 0
        for nth, batch in enumerate(plan.batches(step)):
            reference = self.reference.of(batch, first + nth if epoch == 0 else None)
            loss, metrics = self.policy(
                batch.to(device), reference.to(device), num_groups=num_groups, **self.loss_settings
            )
            loss.backward()
            losses.append(loss.detach())
            parts.append(metrics)
            row_ids += batch.row_ids
            num_tokens += batch.tokens.shape[0]
            if self.stop.requested and nth + 1 < len(plan.steps[step]):
                self.optimizer.zero_grad()
                return False
        grad_norm = torch.nn.utils.clip_grad_norm_(self.masters.masters.values(), self.config.optim.max_grad_norm)
        rate = self._learning_rate()
        if self._finite(torch.stack(losses).sum(), grad_norm, row_ids):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.masters.publish()
        self.optimizer.zero_grad()
        self.position.num_tokens += num_tokens
        self._pending.append(
            {
                "step": self.position.step + 1,
                "epoch": (self.position.step + 1) / self.steps_per_epoch,
                **step_means(parts),
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "num_tokens": self.position.num_tokens,
                "bad_steps": self.position.bad_steps,
                "step_tokens": num_tokens,
                "step_groups": num_groups,
            }
        )
        return True

    def _learning_rate(self) -> float:
        optim = self.config.optim
        return learning_rate(
            self.position.step, peak=optim.lr, total=self.total_steps, warmup=optim.warmup, schedule=optim.schedule
        )

    def _finite(self, loss: torch.Tensor, grad_norm: torch.Tensor, row_ids: list[int]) -> bool:
        if math.isfinite(loss.item()) and math.isfinite(grad_norm.item()):
            self.position.bad_in_a_row = 0
            return True
        self.position.bad_steps += 1
        self.position.bad_in_a_row += 1
        step = self.position.step + 1
        line = {"step": step, "row_ids": row_ids, "loss": str(loss.item()), "grad_norm": str(grad_norm.item())}
        with (self.folder.path / "bad_steps.jsonl").open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        self.display.say(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}: not applied; rows in bad_steps.jsonl"
        )
        return False

    def _flush(self, phase: Phase | None = None) -> None:
        """Bring pending metrics to the host and write them: the one place that waits for the device."""
        if not self._pending:
            return
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        speeds = {
            "tokens_per_second": sum(line.pop("step_tokens") for line in self._pending) / seconds,
            "groups_per_second": sum(line.pop("step_groups") for line in self._pending) / seconds,
            "memory_gib": peak_memory_gib(self.policy.head.weight.device),
        }
        for line in self._pending:
            host = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in line.items()}
            self.metrics.write(host | speeds)
            self.on_log(host | speeds)
        self._pending = []
        eta = f"  {phase.seconds_left():.0f} s left" if phase else ""
        self.display.say(_summary(host | speeds, self.total_steps) + eta)

    def _evaluation_due(self) -> bool:
        step, every = self.position.step, self.config.eval_every
        due = step in (0, self.total_steps) or (every is not None and step % every == 0)
        return self.eval_plan is not None and due and self.position.evaluated != step

    def _evaluate(self) -> bool:
        self._flush()
        assert self.eval_plan is not None
        assert self.eval_reference is not None
        with self.display.phase("evaluation", len(self.eval_plan.groups), "groups") as phase:
            found = evaluate(
                self.policy,
                self.eval_plan,
                self.eval_reference,
                stop=self.stop,
                on_batch=phase.advance,
                **self.loss_settings,
            )
        if found is None:
            return False
        line = {"step": self.position.step, **found}
        self.metrics.write(line)
        self.on_log(line)
        self.position.evaluated = self.position.step
        self.display.say(
            f"evaluation at step {self.position.step}: loss {found['eval_loss']:.4f}, reward accuracy "
            f"{found['eval_rewards/accuracies']:.3f}, margin {found['eval_rewards/margins']:+.4f}"
        )
        self._logged_at = time.perf_counter()
        return True

    def _save(self) -> None:
        self._flush()
        self.position.metrics_bytes = self.metrics.sync()
        state = self.position.to_json()
        step = state.pop("step")
        checkpoint.save(
            self.folder.checkpoints,
            step=step,
            masters=self.masters,
            optimizer=self.optimizer,
            state=state,
            keep=self.config.checkpoint.keep,
        )

    def _save_and_stop(self) -> None:
        if self.position.step > 0:
            self._save()
        raise Stopped(f"stopped after step {self.position.step} of {self.total_steps}; run the same command to go on")


def _summary(line: dict[str, Any], total: int) -> str:
    return (
        f"step {line['step']}/{total}  loss {line['loss']:.4f}  margin {line['rewards/margins']:+.4f}  "
        f"accuracy {line['rewards/accuracies']:.2f}  grad norm {line['grad_norm']:.3g}  lr "
        f"{line['learning_rate']:.2e}  "
        f"{line['groups_per_second']:.2f} groups/s"
    )
