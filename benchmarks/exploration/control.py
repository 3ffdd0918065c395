"""A policy whose exploration term is another than the trainer's: turned round, or an exact expectation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.exploration.environment import Environment, Floats
from benchmarks.exploration.methods import Method
from benchmarks.exploration.tiny_llama import all_logps
from selm_fast.batch import PackedBatch
from selm_fast.model import Policy


class ControlPolicy(Policy):
    """The trainer's policy; the loss of the methods "wrong sign" and "exact" differs in its exploration term.

    wrong sign: c ratio(y_e) is subtracted.
    exact: in its place stands c E[ratio(y)] over all y of the previous iterate, as in SELM's derivation (arXiv
    2405.19332, section 3), of which the authors' one greedy response is no estimate. Where the policy is the previous
    iterate, its gradient is 0: the expectation of a score function.
    """

    def __init__(self, model: Any, method: Method, environment: Environment, previous: Floats) -> None:
        """previous: (P, R) log-probs of the previous iterate; `row_ids` of a batch are rows of it."""
        super().__init__(model)
        self.method = method
        self.environment = environment
        self.previous = torch.from_numpy(previous)

    def loss(
        self, batch: PackedBatch, reference_logps: Tensor, *, exploration_weight: float = 0.0, **settings: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Policy.loss`."""
        if self.method.explored != "expectation":
            weight = self.method.sign * exploration_weight
            return super().loss(batch, reference_logps, exploration_weight=weight, **settings)
        loss, metrics = super().loss(batch, reference_logps, exploration_weight=0.0, **settings)
        if exploration_weight == 0:
            return loss, metrics
        return loss + exploration_weight * self.expectation(batch) / settings["num_groups"], metrics

    forward = loss

    def expectation(self, batch: PackedBatch) -> Tensor:
        """Sum over the groups of a batch of E[ratio(y)], () fp64."""
        rows = list(batch.row_ids)
        previous = self.previous[rows]
        logps = all_logps(self.model, self.environment.prompts[rows], self.environment.settings)
        return (previous.exp() * (logps - previous)).sum()
