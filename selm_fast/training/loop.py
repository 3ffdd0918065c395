"""The training loop: one epoch plan after another, one optimiser step after another, exactly where it was left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from selm_fast.batch import sent
from selm_fast.config import Config
from selm_fast.data.packing import Plan
from selm_fast.errors import RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.training import checkpoint
from selm_fast.training.evaluate import evaluate
from selm_fast.training.masters import Masters, ShardedMasters
from selm_fast.training.metrics import MetricsLog, peak_memory_gib
from selm_fast.training.optimizer import AdamW, gradient_norm
from selm_fast.training.pending import Pending, StepRecord
from selm_fast.training.progress import Display, Phase
from selm_fast.training.reference_cache import ReferenceLogps
from selm_fast.training.run_folder import RunFolder
from selm_fast.training.schedule import learning_rate
from selm_fast.training.signals import StopFlag
from selm_fast.training.utilisation import Utilisation
from selm_fast.training.world import World


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
    """Everything one process of a run needs, and the run's position.

    plans: one an epoch; the reference values were made for the first.
    """

    config: Config
    world: World
    folder: RunFolder
    policy: Policy
    masters: Masters | ShardedMasters
    optimizer: AdamW
    plans: list[Plan]
    reference: ReferenceLogps
    eval_plan: Plan | None
    eval_reference: ReferenceLogps | None
    utilisation: Utilisation
    display: Display
    stop: StopFlag
    on_log: Callable[[dict[str, Any]], None]
    position: Position = field(default_factory=Position)
    metrics: MetricsLog | None = None  # of the first process
    training_seconds: float = 0.0  # of the steps alone: no evaluation, no checkpoint
    _pending: Pending = field(default_factory=Pending)
    _logged_at: float = 0.0
    _bad_steps_at_the_end: int = 0  # in a row, once there are too many; a good one after them does not take it back

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
        found = checkpoint.load_latest(
            self.folder.checkpoints,
            weights=self.masters.masters,
            optimizer=self.optimizer.tensors(),
            world=self.world,
        )
        if self.world.first:
            checkpoint.clear_after(self.folder.checkpoints, found)
        if found is not None:
            self.masters.publish()
            self.position = Position(**found.state)
            self.display.say(f"resuming after step {self.position.step} of {self.total_steps}")

    def run(self) -> None:
        """Train to the end, evaluating and saving on the way.

        Raises Stopped after a signal and RunFailed after too many bad steps; both leave a checkpoint to go on from.
        """
        step, length = self.position.step, self.position.metrics_bytes
        if self.world.first:
            self.metrics = MetricsLog(
                self.folder.path, tensorboard=self.config.log.tensorboard, step=step, length=length
            )
        self._logged_at = time.perf_counter()
        try:
            with self.display.phase("training", self.total_steps, "steps", done=step, lines=False) as phase:
                self._run(phase)
        finally:
            if self.metrics is not None:
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
            with self.world.watched("step"):
                done = self._train_step()
            if not done:
                self._save_and_stop()
            self.training_seconds += time.perf_counter() - began
            position.step += 1
            phase.advance()
            if position.step % self.config.log.every == 0 or position.step == total:
                self._flush(phase)
            if self._bad_steps_at_the_end:
                self._save()
                raise RunFailed(
                    f"{self._bad_steps_at_the_end} steps in a row had a loss or gradient that is not finite and were "
                    f"not applied; their rows are in {self.folder.path / 'bad_steps.jsonl'}. Lower optim.lr, or look "
                    "at those rows"
                )
            if self.world.any(self.stop.requested):
                self._save_and_stop()
            if position.step % self.config.checkpoint.every == 0 or position.step == total:
                self._save()

    def _train_step(self) -> bool:
        """One optimiser step; False, with nothing changed, after a signal between two micro-batches.

        Nothing in it waits for the device: what it came to is looked at when metrics are written.
        """
        world = self.world
        epoch, step = divmod(self.position.step, self.steps_per_epoch)
        plan = self.plans[epoch]
        num_groups, rounds = plan.num_groups(step), plan.num_rounds(step)
        first = plan.first_of(step) + world.rank
        loss_sum, parts = torch.zeros((), dtype=torch.float64, device=world.device), []
        for nth, batch in enumerate(plan.batches(step, world.rank)):
            reference = self.reference.of(batch, first + nth * world.size if epoch == 0 else None)
            loss, metrics = self.policy(
                batch.to(world.device), sent(reference, world.device), num_groups=num_groups, **self.loss_settings
            )
            loss.backward()
            loss_sum += loss.detach()
            parts.append(torch.stack(tuple(metrics.values())))
            if nth + 1 < rounds and world.any(self.stop.requested):
                self.optimizer.clear()
                return False
        norm = gradient_norm(self.masters.masters, loss_sum, world)
        rate = self._learning_rate()
        # As torch.nn.utils.clip_grad_norm_ does it.
        clip = (self.config.optim.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.apply(rate, grad_scale=clip, skip=~norm.isfinite())
        self.masters.publish()
        self.optimizer.clear()
        num_tokens = plan.num_tokens(step)
        self.position.num_tokens += num_tokens
        self._pending.add(
            StepRecord(
                step=self.position.step + 1,
                epoch=(self.position.step + 1) / self.steps_per_epoch,
                learning_rate=rate,
                num_tokens=self.position.num_tokens,
                step_tokens=num_tokens,
                step_groups=num_groups,
                useful_flops=self.utilisation.flops_of(plan, step),
                row_ids=plan.row_ids(step),
            ),
            torch.cat(parts, dim=1),
            norm,
        )
        return True

    def _learning_rate(self) -> float:
        optim = self.config.optim
        return learning_rate(
            self.position.step, peak=optim.lr, total=self.total_steps, warmup=optim.warmup, schedule=optim.schedule
        )

    def _flush(self, phase: Phase | None = None) -> None:
        """Bring pending metrics to the host and together, and write them: the one place that waits for the device."""
        if not self._pending.steps:
            return
        lines, memory = self._pending.take(self.world, peak_memory_gib(self.world.device))
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        speeds = {
            "tokens_per_second": sum(line.record.step_tokens for line in lines) / seconds,
            "groups_per_second": sum(line.record.step_groups for line in lines) / seconds,
            "mfu": self.utilisation.of(sum(line.record.useful_flops for line in lines), seconds),
            "memory_gib": memory,
        }
        for line in lines:
            if line.is_bad:
                self._tell_bad(line.record, line.metrics)
            else:
                self.position.bad_in_a_row = 0
            if self.metrics is not None:
                logged = line.logged(self.position.bad_steps) | speeds
                self.metrics.write(logged)
                self.on_log(logged)
        if self.metrics is not None:
            eta = f"  {phase.seconds_left():.0f} s left" if phase else ""
            self.display.say(_summary(logged, self.total_steps) + eta)

    def _tell_bad(self, record: StepRecord, metrics: dict[str, float]) -> None:
        """Count a step that was not applied, say so, and write down whose it was."""
        self.position.bad_steps += 1
        self.position.bad_in_a_row += 1
        if self.position.bad_in_a_row >= self.config.max_bad_steps:
            self._bad_steps_at_the_end = self.position.bad_in_a_row
        if not self.world.first:
            return
        loss, norm = metrics["loss"], metrics["grad_norm"]
        told = {"step": record.step, "row_ids": record.row_ids, "loss": str(loss), "grad_norm": str(norm)}
        with (self.folder.path / "bad_steps.jsonl").open("ab") as file:
            file.write(json.dumps(told).encode() + b"\n")
        self.display.say(f"step {record.step}: loss {loss}, gradient norm {norm}: not applied; rows in bad_steps.jsonl")

    def _evaluation_due(self) -> bool:
        step, every = self.position.step, self.config.eval_every
        due = step in (0, self.total_steps) or (every is not None and step % every == 0)
        return self.eval_plan is not None and due and self.position.evaluated != step

    def _evaluate(self) -> bool:
        self._flush()
        assert self.eval_plan is not None
        assert self.eval_reference is not None
        with (
            self.display.phase("evaluation", len(self.eval_plan.groups), "groups") as phase,
            self.world.watched("step"),
        ):
            found = evaluate(
                self.policy,
                self.eval_plan,
                self.eval_reference,
                world=self.world,
                stop=self.stop,
                on_batch=phase.advance,
                **self.loss_settings,
            )
        self.masters.publish()
        if found is None:
            return False
        line = {"step": self.position.step, **found}
        self.position.evaluated = self.position.step
        if self.metrics is not None:
            self.metrics.write(line)
            self.on_log(line)
        self.display.say(
            f"evaluation at step {self.position.step}: loss {found['eval_loss']:.4f}, reward accuracy "
            f"{found['eval_rewards/accuracies']:.3f}, margin {found['eval_rewards/margins']:+.4f}"
        )
        self._logged_at = time.perf_counter()
        return True

    def _save(self) -> None:
        self._flush()
        if self.metrics is not None:
            self.position.metrics_bytes = self.metrics.sync()
        state = self.position.to_json()
        step = state.pop("step")
        checkpoint.save(
            self.folder.checkpoints,
            step=step,
            weights=self.masters.masters,
            optimizer=self.optimizer.tensors(),
            state=state,
            keep=self.config.checkpoint.keep,
            world=self.world,
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
