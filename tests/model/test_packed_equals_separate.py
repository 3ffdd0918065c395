"""Invariants 1, 2, 4 and 5: packed batches say what separate sequences say, in any company and any cut."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack
from selm_fast.model import Policy
from selm_fast.ops import Pairs
from tests.helpers_models import (
    FAMILIES,
    assert_same_gradients,
    own_token_logps,
    some_groups,
    take_gradients,
    tiny_model,
)

LOSS = {"beta": 0.5, "exploration_weight": 0.05, "label_smoothing": 0.1}


def round_weights(model: Any) -> Any:
    """Weights to bf16, as training does it: parameters alone, rotary frequencies stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def random_upstream(logps: Tensor) -> Tensor:
    """A gradient for every token, of both signs."""
    return torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_all_gradients_are_those_of_separate_forwards(family: str) -> None:
    """Invariant 1, against the model's own eager attention."""
    model, groups = tiny_model(family), some_groups(10)
    policy, (batch,) = Policy(model), pack(groups)
    packed = policy.token_logps(batch)
    upstream = random_upstream(packed)
    packed.backward(upstream)
    gradients = take_gradients(model)
    own = torch.cat(own_token_logps(model, groups))
    own.backward(upstream)
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=2e-6)
    assert_same_gradients(gradients, take_gradients(model), relative=1e-5)


@pytest.mark.parametrize(
    ("family", "setting", "off"),
    [
        ("mistral", "sliding_window", None),
        ("qwen2", "use_sliding_window", False),
        ("phi3", "sliding_window", None),
        ("gemma2", "sliding_window", 1000),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "query_pre_attn_scalar", 8),
        ("gemma3", "sliding_window", 1000),
        ("granite", "attention_multiplier", 1.0),
        ("granite", "logits_scaling", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_the_models_above_would_show_a_setting_that_is_ignored(family: str, setting: str, off: Any) -> None:
    """The settings that make families differ change the log-probs of these models and groups by far more than 1e-5."""
    groups = some_groups(10)
    values = []
    for changed in ({}, {setting: off}):
        model = tiny_model(family, **changed)
        Policy(model)
        with torch.no_grad():
            values.append(torch.cat(own_token_logps(model, groups)))
    assert (values[0] - values[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_sequence_does_not_feel_its_neighbours(family: str) -> None:
    """Invariant 2: whatever stands before and after it, and whichever responses share its prompt."""
    policy = Policy(tiny_model(family))
    group = some_groups(1, seed=3)[0]
    with torch.no_grad():
        alone = dict(zip(pack([group])[0].sequence_keys, policy.sequence_logps(pack([group])[0]).tolist(), strict=True))
        for others in range(1, 5):
            batch = pack([*some_groups(others, seed=others), group, *some_groups(3, seed=9)])[0]
            among = dict(zip(batch.sequence_keys, policy.sequence_logps(batch).tolist(), strict=True))
            for key, value in alone.items():
                assert among[key] == pytest.approx(value, rel=1e-5)
        for pair in ((group.rejected, group.chosen), (group.explored, group.rejected)):
            batch = pack([TokenGroup(group.prompt, *pair)])[0]
            for key, value in zip(batch.sequence_keys, policy.sequence_logps(batch).tolist(), strict=True):
                assert value == pytest.approx(alone[key], rel=1e-5)


class Duplicated(TokenGroup):
    """A group whose explored response is encoded once more although it equals another one."""

    def responses(self) -> list[list[int]]:
        """Chosen, rejected, explored, equal or not."""
        return [self.chosen, self.rejected, self.explored]


@pytest.mark.parametrize("alias", ["chosen", "rejected"])
def test_an_alias_equals_a_duplicated_sequence(alias: str) -> None:
    """Invariant 2, for the loss and all gradients."""
    policy = Policy(tiny_model())
    prompt, chosen, rejected = [5, 6, 7], [11, 12, 13, 14], [21, 22]
    explored = {"chosen": chosen, "rejected": rejected}[alias]
    (aliased,) = pack([TokenGroup(prompt, chosen, rejected, list(explored))])
    (twice,) = pack([Duplicated(prompt, chosen, rejected, list(explored))])
    pairs = Pairs(chosen=torch.tensor([0]), rejected=torch.tensor([1]), explored=torch.tensor([2]))
    twice = dataclasses.replace(twice, pairs=pairs)
    assert (len(aliased.sequence_keys), len(twice.sequence_keys)) == (2, 3)
    index = ["chosen", "rejected"].index(alias)
    reference = torch.tensor([-20.0, -11.0, 0.0], dtype=torch.float64)
    reference[2] = reference[index]
    results = []
    for batch in (aliased, twice):
        loss, _ = policy.loss(batch, reference[: len(batch.sequence_keys)], **LOSS)
        loss.backward()
        results.append((loss.item(), take_gradients(policy.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same_gradients(results[0][1], results[1][1], relative=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_cut_into_micro_batches_does_not_change_loss_or_gradients(family: str) -> None:
    """Invariant 5."""
    policy, groups = Policy(tiny_model(family)), some_groups(15)
    with torch.no_grad():
        (everything,) = pack(groups)
        noise = torch.randn(
            len(everything.sequence_keys), generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        values = (policy.sequence_logps(everything) + 3 * noise).tolist()
    reference = dict(zip(everything.sequence_keys, values, strict=True))
    results = []
    for max_tokens in (None, 200, 60):
        batches = pack(groups, max_tokens=max_tokens)
        total = 0.0
        for batch in batches:
            targets = torch.tensor([reference[key] for key in batch.sequence_keys], dtype=torch.float64)
            loss, _ = policy.loss(batch, targets, num_groups=len(groups), **LOSS)
            loss.backward()
            total += loss.item()
        results.append((len(batches), total, take_gradients(policy.model)))
    assert [count for count, _, _ in results] == sorted({count for count, _, _ in results})
    for _, total, gradients in results[1:]:
        assert total == pytest.approx(results[0][1], rel=1e-5)
        assert_same_gradients(gradients, results[0][2], relative=1e-5)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "cohere"))]
)
def test_bf16_errors_are_at_most_twice_those_of_separate_bf16_forwards(family: str) -> None:
    """Against fp64 on the same weights: tokens' log-probs, sequences' and all gradients together, root mean square."""
    groups = some_groups(20)
    low = round_weights(tiny_model(family))
    high = copy.deepcopy(low)
    for parameter in high.parameters():
        parameter.data = parameter.data.double()
    policy, (batch,) = Policy(low), pack(groups)
    Policy(high)  # switches its attention, so that helpers may switch it back

    exact = torch.cat(own_token_logps(high, groups))
    upstream = random_upstream(exact)
    exact.backward(upstream.double())
    exact_gradients = take_gradients(high)
    errors = []
    for logps in (policy.token_logps(batch), torch.cat(own_token_logps(low, groups))):
        logps.backward(upstream)
        gradients = take_gradients(low)
        off = (logps.double() - exact).detach()
        sequences = torch.segment_reduce(off, "sum", offsets=batch.cu_responses.long())
        squares = sum(
            (gradients[name].double() - value).square().sum().item() for name, value in exact_gradients.items()
        )
        errors.append((off.square().mean().sqrt().item(), sequences.square().mean().sqrt().item(), math.sqrt(squares)))
    for ours, separate in zip(*errors, strict=True):
        assert 0 < ours <= 2 * separate


@pytest.mark.parametrize("head_mode", ["keep", "recompute"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_step_zero_is_ln_2_to_the_bit(family: str, dtype: str, checkpointing: bool, head_mode: str) -> None:
    """Invariant 4, within a process: the reference pass and the training step give the same bits."""
    model = tiny_model(family)
    policy = Policy(round_weights(model) if dtype == "bf16" else model, head_mode=head_mode).train()
    if checkpointing:
        policy.checkpoint_activations()
    for batch in pack(some_groups(12), max_tokens=150):
        with torch.no_grad():
            reference = policy.sequence_logps(batch)
        loss, metrics = policy.loss(batch, reference, **LOSS)
        assert loss.item() == math.log(2)
        assert (metrics["rewards/chosen"] == 0).all()
        assert (metrics["rewards/margins"] == 0).all()
        loss.backward()
        take_gradients(model)


@pytest.mark.parametrize("family", ["llama tied", "gemma2"])
def test_activation_checkpointing_gives_the_same_bits(family: str) -> None:
    groups, results = some_groups(8), []
    for checkpointing in (False, True):
        policy = Policy(tiny_model(family)).train()
        if checkpointing:
            policy.checkpoint_activations()
        (batch,) = pack(groups)
        reference = torch.linspace(-40, -10, len(batch.sequence_keys), dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(_Count.pack, lambda tensor: tensor):
            _Count.bytes = 0
            loss, _ = policy.loss(batch, reference, **LOSS)
        loss.backward()
        results.append((loss.item(), take_gradients(policy.model), _Count.bytes))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(results[1][1][name], value), name
    assert results[1][2] < results[0][2] / 2  # and it does save activations


class _Count:
    """Bytes that autograd saves."""

    bytes = 0

    @classmethod
    def pack(cls, tensor: Tensor) -> Tensor:
        cls.bytes += tensor.nbytes
        return tensor


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_layers_give_the_same(family: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        policy = Policy(tiny_model(family)).train()
        if checkpointing:
            policy.checkpoint_activations()
        if compiled:
            policy.compile_layers()
        for seed in (0, 1):  # two lengths: dynamic shapes
            (batch,) = pack(some_groups(6 + seed, seed=seed))
            loss, _ = policy.loss(
                batch, torch.linspace(-40, -10, len(batch.sequence_keys), dtype=torch.float64), **LOSS
            )
            loss.backward()
            results.append((loss.item(), take_gradients(policy.model)))
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
    for (loss, gradients), (compiled_loss, compiled_gradients) in zip(results[:2], results[2:], strict=True):
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(compiled_gradients, gradients, relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_zero_is_ln_2_to_the_bit_with_compiled_layers(dtype: str, checkpointing: bool) -> None:
    """Invariant 4: the graph without gradients and the one with them give the same bits."""
    torch._dynamo.reset()
    model = tiny_model()
    policy = Policy(round_weights(model) if dtype == "bf16" else model).train()
    if checkpointing:
        policy.checkpoint_activations()
    policy.compile_layers()
    for batch in pack(some_groups(12), max_tokens=150):
        with torch.no_grad():
            reference = policy.sequence_logps(batch)
        loss, metrics = policy.loss(batch, reference, **LOSS)
        assert loss.item() == math.log(2)
        assert (metrics["rewards/margins"] == 0).all()
