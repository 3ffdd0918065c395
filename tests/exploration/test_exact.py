"""Exact sums against the trainer's own log-probs, and the exploration terms against their formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.exploration import environment as env
from benchmarks.exploration.control import ControlPolicy
from benchmarks.exploration.environment import Environment
from benchmarks.exploration.experiment import Outcome, model_of
from benchmarks.exploration.methods import METHODS, ask, every_pair, greedy, ids_of
from benchmarks.exploration.tiny_llama import distribution, make_base
from selm_fast.data.packing import TokenGroup, pack
from selm_fast.model.attention import NAME

from .conftest import SEED


def trainers_logps(policy: ControlPolicy, environment: Environment) -> Tensor:
    """(P, R) fp64 by packed batches and the fused head: what training and the reference cache see."""
    rows = []
    for prompt in environment.prompts.tolist():
        (batch,) = pack(every_pair(prompt, environment))
        rows.append(policy.sequence_logps(batch))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def policies(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> dict[str, ControlPolicy]:
    weights = {"base": base_weights, "selm": trained["selm"].weights}
    blank = np.zeros(environment.rewards.shape)
    return {
        name: ControlPolicy(model_of(environment, found), METHODS["selm"], environment, blank)
        for name, found in weights.items()
    }


@torch.no_grad()
def test_the_whole_distribution_is_that_of_the_trainers_log_probs(
    environment: Environment, policies: Mapping[str, ControlPolicy]
) -> None:
    for policy in policies.values():
        exact = distribution(policy.model, environment)
        np.testing.assert_allclose(np.exp(exact).sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(trainers_logps(policy, environment).numpy(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exact_figures_agree_with_samples_and_the_trainers_log_probs(
    environment: Environment, policies: Mapping[str, ControlPolicy], trained: Mapping[str, Outcome]
) -> None:
    """E[r], KL and entropy of the trained policy, by sampling from it and asking the trainer for log-probs."""
    draws, generator = 200, torch.Generator().manual_seed(1)
    settings = environment.settings
    rewards, kls, surprises = [], [], []
    for row in range(settings.train_prompts):
        prompt = environment.prompts[row].tolist()
        # Sampled token by token from the model, by nothing that the exact sums use.
        ids = torch.tensor([prompt] * draws)
        policies["selm"].model.set_attn_implementation("sdpa")
        for _ in range(settings.response_tokens):
            odds = policies["selm"].model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)
            ids = torch.cat((ids, torch.multinomial(odds, 1, generator=generator)), 1)
        policies["selm"].model.set_attn_implementation(NAME)
        responses = ids[:, len(prompt) :].tolist()
        numbers = [int(np.ravel_multi_index(tuple(r), [settings.vocabulary] * 2)) for r in responses]
        (batch,) = pack([TokenGroup(prompt, a, b) for a, b in zip(responses[::2], responses[1::2], strict=True)])
        of_group = [batch.pairs.chosen, batch.pairs.rejected]
        logps, base = (policies[name].sequence_logps(batch) for name in ("selm", "base"))
        sequences = torch.stack(of_group, 1).flatten()
        rewards += environment.rewards[row, numbers].tolist()
        kls += (logps - base)[sequences].tolist()
        surprises += (-logps)[sequences].tolist()
    best = environment.rewards[environment.train].max(1).mean()
    outcome = trained["selm"].train
    for samples, exact in (
        (np.array(rewards) / best, "reward"),
        (np.array(kls), "kl"),
        (np.array(surprises), "entropy"),
    ):
        error = abs(samples.mean() - outcome[exact][-1])
        assert error < 4 * samples.std() / math.sqrt(len(samples)), exact
        assert outcome[exact][-1] != outcome[exact][0]  # there is something to be wrong about


def test_the_base_model_is_fitted_to_the_prior(environment: Environment) -> None:
    """More steps bring it closer; a uniform distribution is as far as the prior's entropy is below that of all."""
    far = np.log(16) - env.entropy(environment.prior).mean()
    apart = [
        env.divergence(environment.prior, distribution(make_base(environment, SEED, steps=steps), environment)).mean()
        for steps in (40, 160)
    ]
    assert apart[0] < 0.7 * far
    assert apart[1] < 0.15 * far


def test_greedy_is_what_greedy_decoding_gives(environment: Environment, policies: Mapping[str, ControlPolicy]) -> None:
    model = policies["selm"].model
    numbers = greedy(distribution(model, environment), environment)
    model.set_attn_implementation("sdpa")
    try:
        prompts = torch.from_numpy(environment.prompts)
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=2, pad_token_id=0
        )
    finally:
        model.set_attn_implementation(NAME)
    assert out[:, 3:].tolist() == [ids_of(environment, int(number)) for number in numbers]


def gradient(policy: ControlPolicy, loss: Tensor) -> Tensor:
    for parameter in policy.parameters():
        parameter.grad = None
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def term(policy: ControlPolicy, environment: Environment, previous: env.Floats) -> tuple[Tensor, Tensor]:
    """What an exploration weight of 1 adds to the loss of some training prompts, and to its gradient."""
    asked = ask(policy.method, environment, previous, previous, seed=SEED, iteration=0, with_explored=True)
    (batch,) = pack(asked.groups[3:])  # not the first rows: those of a batch are any
    with torch.no_grad():
        reference = policy.sequence_logps(batch)
    settings = {"beta": 0.1, "num_groups": batch.num_groups}
    found = []
    for weight in (1.0, 0.0):
        loss, _ = policy.loss(batch, reference, exploration_weight=weight, **settings)
        found.append((loss.detach(), gradient(policy, loss)))
    return found[0][0] - found[1][0], found[0][1] - found[1][1]


def test_the_exact_expectations_gradient_is_0_at_the_reference_and_the_greedy_responses_is_not(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> None:
    model = model_of(environment, base_weights)
    previous = distribution(model, environment)
    of = {name: ControlPolicy(model, METHODS[name], environment, previous) for name in METHODS}
    value, exact = term(of["selm exact"], environment, previous)
    assert value.abs() < 1e-6
    assert exact.abs().max() < 1e-6
    _, pushed = term(of["selm"], environment, previous)
    _, sampled = term(of["selm sampled"], environment, previous)
    assert pushed.abs().max() > 1e-2
    assert sampled.abs().max() > 1e-2
    # Elsewhere it is not 0: it is the gradient of E_previous[log pi], which pulls away from the previous iterate.
    moved = ControlPolicy(model_of(environment, trained["selm"].weights), METHODS["selm exact"], environment, previous)
    value, away = term(moved, environment, previous)
    exactly = (np.exp(previous) * (distribution(moved.model, environment) - previous)).sum(1)
    rows = ask(moved.method, environment, previous, previous, seed=SEED, iteration=0, with_explored=True).groups[3:]
    assert value.item() == pytest.approx(exactly[[group.row_id for group in rows]].mean(), abs=1e-6)
    assert value < -1e-3
    assert away.abs().max() > 1e-3


def test_the_wrong_sign_adds_what_selm_takes_away(
    environment: Environment, base_weights: Mapping[str, Tensor], trained: Mapping[str, Outcome]
) -> None:
    model = model_of(environment, trained["selm"].weights)
    previous = distribution(model_of(environment, base_weights), environment)
    _, right = term(ControlPolicy(model, METHODS["selm"], environment, previous), environment, previous)
    _, wrong = term(ControlPolicy(model, METHODS["selm wrong sign"], environment, previous), environment, previous)
    torch.testing.assert_close(wrong, -right, rtol=1e-4, atol=1e-6)
    assert right.abs().max() > 1e-2
