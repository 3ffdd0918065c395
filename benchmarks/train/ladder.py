"""selm_fast with its features left out, one after the other: what each of them brings.

All rungs compute the same loss with the same optimiser in one bare loop; what the full loop adds (metrics, files) is
seen where the last of them stands beside `train` itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import eager_forward
from benchmarks.train.contestant import Gate, Job
from benchmarks.train.workload import Row, Settings
from selm_fast.batch import PackedBatch
from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import balance, pack
from selm_fast.model import Policy
from selm_fast.model.attention import packed_kwargs
from selm_fast.model.fused_layers import unfused
from selm_fast.ops import Pairs, attention_choice, linear_logprob, preference_loss, sequence_sum
from selm_fast.training.masters import Masters

RESPONSE_HEAD, SHARED_PREFIX, ALIASES, CACHE, KERNELS = RUNGS = (
    "head on response rows only", "shared prefix", "aliases", "cached reference", "fused kernels",
)  # fmt: skip


def run(job: Job, gate: Gate, *, rungs: Sequence[str]) -> None:
    """Train with packing, and with these of the RUNGS."""
    with ExitStack() as stack:
        train(job, gate, rungs, stack)


def train(job: Job, gate: Gate, rungs: Sequence[str], stack: ExitStack) -> None:
    """The bare loop. stack: what is to be undone in the end."""
    workload, settings = job.workload, job.workload.settings
    policy = load(job, workload.model, rungs, stack)
    masters = Masters(policy.model, workload.compute)
    steps = [job.rows[i : i + settings.groups] for i in range(0, len(job.rows), settings.groups)]
    reference = load(job, job.reference or workload.model, rungs, stack)
    Masters(reference.model, workload.compute)
    cache: list[Tensor] = []
    if CACHE in rungs:
        with gate.reference_pass(), torch.no_grad():
            for step in steps:
                cache += [sequence_logps(reference, batch, rungs) for batch in packs(step, settings, rungs)]
        del reference
    cached = iter(cache)
    optimizer = torch.optim.AdamW(masters.masters.values(), lr=settings.lr, weight_decay=0.0, fused=True)
    gate.ready()
    for step in steps:
        losses = []
        for batch in packs(step, settings, rungs):
            batch = batch.to(torch.device(workload.device))
            if CACHE in rungs:
                known = next(cached)
            else:
                with torch.no_grad():
                    known = sequence_logps(reference, batch, rungs)
            loss = loss_of(policy, batch, known, len(step), settings, rungs)
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(masters.masters.values(), settings.max_grad_norm)
        optimizer.step()
        masters.publish()
        optimizer.zero_grad()
        gate.step(torch.stack(losses).sum().item(), norm.item())


def load(job: Job, path: Path, rungs: Sequence[str], stack: ExitStack) -> Policy:
    """A policy in fp32; without KERNELS its attention is torch's, and its layers are all transformers' own."""
    if KERNELS not in rungs:
        attention_choice.BACKENDS.pop("cpp", None)
        attention_choice.choose.cache_clear()
    policy = Policy.from_pretrained(path, device=job.workload.device)
    if KERNELS not in rungs:
        stack.enter_context(unfused(policy.model))
    return policy


def loss_of(
    policy: Policy, batch: PackedBatch, reference: Tensor, groups: int, settings: Settings, rungs: Sequence[str]
) -> Tensor:
    """The loss of a pack; () fp64."""
    weights = {"beta": settings.beta, "exploration_weight": settings.alpha * settings.beta, "num_groups": groups}
    if KERNELS in rungs:
        return policy.loss(batch, reference, **weights)[0]
    return preference_loss(sequence_logps(policy, batch, rungs), reference, batch.pairs, **weights)[0]


def sequence_logps(policy: Policy, batch: PackedBatch, rungs: Sequence[str]) -> Tensor:
    """Summed log-probs: (S,) fp64."""
    batch = batch.to(policy.head.weight.device)
    output = policy.body(
        input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, **packed_kwargs(batch)
    )
    hidden, targets = output.last_hidden_state[0], batch.targets
    if RESPONSE_HEAD in rungs:
        hidden = hidden[batch.response_rows]
    else:
        # Every row has a target here, as in a trainer that masks after the head; its own token is as good as any.
        targets = batch.tokens.index_copy(0, batch.response_rows, targets)
    logps = (linear_logprob if KERNELS in rungs else eager_forward)(hidden, policy.head.weight, targets)
    return sequence_sum(logps if RESPONSE_HEAD in rungs else logps[batch.response_rows], batch.cu_responses)


def packs(rows: Sequence[Row], settings: Settings, rungs: Sequence[str]) -> Iterable[PackedBatch]:
    """The micro-batches of a step."""
    groups = [TokenGroup(row.prompt, row.chosen, row.rejected, row.explored) for row in rows]
    if ALIASES in rungs:
        return pack(groups, max_tokens=settings.max_tokens)
    encoded = 1 if SHARED_PREFIX in rungs else 3
    costs = [len(row.prompt) * encoded + len(row.chosen) + len(row.rejected) + len(row.explored) for row in rows]
    bins = balance(costs, max(settings.max_tokens, max(costs)))
    return [pack_apart([groups[i] for i in members], SHARED_PREFIX in rungs) for members in bins]


def pack_apart(groups: Sequence[TokenGroup], shared_prefix: bool) -> PackedBatch:
    """Groups with three sequences each, whichever of them are equal: a pack without aliases, or without sharing."""
    tokens, positions, keys, rows, targets = (list[int]() for _ in range(5))
    queries, key_ends, ends = [0], [0], [0]
    for group in groups:
        first = len(tokens)
        for nth, response in enumerate((group.chosen, group.rejected, group.explored)):
            assert response is not None
            shares = shared_prefix and nth > 0
            shown = len(group.prompt) - 1 if shares else 0  # tokens of the prompt that another branch has encoded
            start = len(tokens)
            tokens += [*group.prompt[shown:], *response[:-1]]
            positions += range(shown, len(group.prompt) + len(response) - 1)
            keys += (*range(first, first + shown), *range(start, len(tokens)))
            rows += range(len(tokens) - len(response), len(tokens))
            targets += response
            queries.append(len(tokens))
            key_ends.append(len(keys))
            ends.append(len(targets))
    sequences = torch.arange(3 * len(groups)).view(-1, 3)
    chosen, rejected, explored = sequences.unbind(1)
    return PackedBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        cu_seqlens_q=torch.tensor(queries, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(key_ends, dtype=torch.int32),
        kv_index=torch.tensor(keys),
        max_seqlen_q=max(b - a for a, b in pairwise(queries)),
        max_seqlen_k=max(b - a for a, b in pairwise(key_ends)),
        response_rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        cu_responses=torch.tensor(ends, dtype=torch.int32),
        sequence_keys=tuple(b"" for _ in range(3 * len(groups))),
        row_ids=tuple(range(len(groups))),
        pairs=Pairs(chosen=chosen, rejected=rejected, explored=explored),
    )
