"""SELM in plain torch, in the manner of the authors' code: padded forwards of three sequences, whole logits, twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.train.contestant import Gate, Job
from benchmarks.train.workload import Row


def run(job: Job, gate: Gate) -> None:
    """Train; the reference model stays in memory and is run in every step."""
    settings, device = job.workload.settings, job.workload.device
    policy = AutoModelForCausalLM.from_pretrained(job.workload.model, dtype=torch.float32).to(device).train()
    source = job.reference or job.workload.model
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=job.workload.dtype == "bf16")
    gate.ready()
    for start in range(0, len(job.rows), settings.groups):
        ids, responses = collate(job.rows[start : start + settings.groups], device)
        with autocast:
            logps = sequence_logps(policy, ids, responses)
            with torch.no_grad():
                known = sequence_logps(reference, ids, responses)
        chosen, rejected, explored = (logps - known).chunk(3)
        losses = -logsigmoid(settings.beta * (chosen - rejected)) + settings.alpha * settings.beta * explored
        loss = losses.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.item(), norm.item())


def collate(rows: list[Row], device: str) -> tuple[Tensor, Tensor]:
    """-> ids (3B, L), padded with 0 on the right, and which of them are of a response: (3B, L) bool."""
    ids, responses = [], []
    for role in ("chosen", "rejected", "explored"):
        for row in rows:
            response: list[int] = getattr(row, role)
            ids.append(torch.tensor(row.prompt + response))
            responses.append(torch.tensor([False] * len(row.prompt) + [True] * len(response)))
    return pad_sequence(ids, batch_first=True).to(device), pad_sequence(responses, batch_first=True).to(device)


def sequence_logps(model: torch.nn.Module, ids: Tensor, responses: Tensor) -> Tensor:
    """Summed log-prob of every response: (3B,). Right padding needs no mask: no token sees what comes after it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (logps * responses[:, 1:]).sum(1)
