"""A model whose norms and feed-forward layers are fused says what it said, in whatever way it is used."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from selm_fast.data.packing import pack
from selm_fast.model import Policy, fused_layers, selfcheck
from selm_fast.model.attention import NAME
from selm_fast.model.fused_layers import fuse, unfused
from selm_fast.ops import extension
from selm_fast.training.masters import Masters
from tests.helpers_models import FAMILIES, assert_same_gradients, some_groups, take_gradients, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.status())
LAYERS = ("RMSNorm", "LayerNorm", "MLP")
NOT_SERVED = {"phi": {"LayerNorm", "PhiMLP"}, "cohere": {"CohereLayerNorm"}}


def fused_policy(family: str = "llama", **changed: Any) -> Policy:
    """A policy that was fused as loading does it."""
    policy = Policy(tiny_model(family, **changed))
    fuse(policy.model)
    return policy


def is_fused(module: nn.Module) -> bool:
    """Is its class's `forward` hidden?"""
    return "forward" in module.__dict__


def left_alone(model: nn.Module) -> set[str]:
    """Classes of norms and feed-forward layers that are not fused."""
    return {type(m).__name__ for m in model.modules() if type(m).__name__.endswith(LAYERS) and not is_fused(m)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same(family: str) -> None:
    """Log-probs and all gradients; the classes that are served; the names of the weights."""
    policy = Policy(tiny_model(family))
    names = list(policy.state_dict())
    fuse(policy.model)
    assert left_alone(policy.model) == NOT_SERVED.get(family, set())
    assert list(policy.state_dict()) == names
    (batch,) = pack(some_groups(5))
    logps = policy.token_logps(batch)
    logps.sum().backward()
    gradients = take_gradients(policy)
    with unfused(policy.model):
        assert not any(is_fused(m) for m in policy.model.modules())
        own = policy.token_logps(batch)
        own.sum().backward()
    assert left_alone(policy.model) == NOT_SERVED.get(family, set())
    torch.testing.assert_close(logps, own, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, take_gradients(policy), relative=1e-5)


def test_loading_fuses_and_does_not_disturb_random_numbers(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    policy = Policy.from_config(tmp_path, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not left_alone(policy.model)


def test_the_check_of_a_loaded_model_compares_with_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that passed its test and is wrong in the model is refused."""
    policy = fused_policy()
    monkeypatch.setattr(fused_layers, "rms_norm", lambda x, weight, eps, **_: x * weight)
    with pytest.raises(selfcheck.Refused, match="differ from the model's own"):
        selfcheck.check_packed(policy, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_and_without_gradients_and_checkpointing(dtype: torch.dtype) -> None:
    policy = fused_policy()
    Masters(policy.model, dtype)
    (batch,) = pack(some_groups(5))
    logps = policy.token_logps(batch)
    with torch.no_grad():
        assert torch.equal(policy.token_logps(batch), logps)
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(logps.sum(), parameters)
    policy.checkpoint_activations()
    logps_again = policy.token_logps(batch)
    gradients_again = torch.autograd.grad(logps_again.sum(), parameters)
    assert torch.equal(logps_again, logps)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_weights_cast_after_loading(family: str) -> None:
    """In bf16 the rounding is that of each module's own forward: one row through one layer has nearly the same bits."""
    policy = fused_policy(family)
    masters = Masters(policy.model, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator).bfloat16()
    norm = policy.body.norm
    assert is_fused(norm)
    with torch.no_grad():
        assert (norm(x) != type(norm).forward(norm, x)).float().mean() < 1e-3
    (batch,) = pack(some_groups(5))
    logps = policy.token_logps(batch)
    logps.sum().backward()
    gradients = {name: master.grad for name, master in masters.masters.items()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    with unfused(policy.model):
        own = policy.token_logps(batch)
    assert (logps - own).abs().max() < 0.05  # 2^-9 of logits, and of a state through two layers
    assert (logps - own).abs().mean() < 0.01


@pytest.mark.parametrize(
    "family", ["llama", "phi3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "qwen3"))]
)
def test_dynamo_traces_through_it_in_one_piece(family: str) -> None:
    """With the gradients of the traced graph, at two sizes."""
    policy = fused_policy(family)
    batches = [pack(some_groups(count))[0] for count in (5, 3)]
    expected = []
    for batch in batches:
        policy.token_logps(batch).sum().backward()
        expected.append(take_gradients(policy))
    ops: list[str] = []

    def listing(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    for layer in policy.layers():
        for module in (layer.mlp, layer.input_layernorm):
            module.compile(backend=listing, dynamic=True, fullgraph=True)
        layer.post_attention_layernorm.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    for batch, right in zip(batches, expected, strict=True):
        policy.token_logps(batch).sum().backward()
        assert_same_gradients(take_gradients(policy), right, relative=1e-5)
    assert sorted({op.removesuffix(".default") for op in ops if op.startswith("selm_fast")}) == [
        "selm_fast.gated_mlp",
        "selm_fast.rms_norm",
    ]
    torch._dynamo.reset()


def test_generation_says_the_same() -> None:
    policy = fused_policy()
    model = policy.model.eval()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False, "use_cache": True}
    got = model.generate(ids, **settings)
    with unfused(model):
        assert torch.equal(model.generate(ids, **settings), got)
    model.set_attn_implementation(NAME)


def test_a_copy_reads_its_own_weights_and_a_pickle_is_the_plain_module() -> None:
    norm = fused_policy().body.norm
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 32)
    before = norm(x)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert is_fused(twin) and torch.equal(norm(x), before) and torch.equal(twin(x), 2 * before)
    plain = pickle.loads(pickle.dumps(norm))
    torch.testing.assert_close(plain(x), before)
    with torch.no_grad():
        plain.weight.mul_(2)
    torch.testing.assert_close(plain(x), 2 * before)
    assert torch.equal(norm(x), before)


@pytest.mark.parametrize("mixed", ["autocast", "fp32 weights under bf16"])
def test_other_dtypes_than_the_weights_go_the_old_way(mixed: str) -> None:
    layer = fused_policy().body.layers[0]
    x = torch.randn(6, 32)
    for module in (layer.mlp, layer.input_layernorm):
        if mixed == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(module(x), type(module).forward(module, x))
        elif module is not layer.mlp:  # whose matmuls refuse it by themselves
            assert torch.equal(module(x.bfloat16()), type(module).forward(module, x.bfloat16()))


class ScaledRMSNorm(LlamaRMSNorm):
    """Looks like any other."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.001


class LateRMSNorm(LlamaRMSNorm):
    """As OLMo 2 has it: multiplied before it is rounded."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        high = hidden_states.float()
        normalised = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normalised).to(hidden_states.dtype)


class DetachedRMSNorm(LlamaRMSNorm):
    """The same forward, and another gradient."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        high = hidden_states.float()
        inverse = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (high * inverse).to(hidden_states.dtype)


class ClippedMLP(LlamaMLP):
    """Differs for large arguments only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class FailingMLP(LlamaMLP):
    """Wants something that a test cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not without my cache")


class OtherRMSNorm(LlamaRMSNorm):
    """Takes more than rows."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states)


@pytest.mark.parametrize("kind", [ScaledRMSNorm, DetachedRMSNorm, ClippedMLP, FailingMLP])
def test_a_class_that_computes_something_else_is_left_alone(
    kind: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    module = kind(tiny_config() if issubclass(kind, LlamaMLP) else 32)
    with caplog.at_level(logging.WARNING):
        fuse(nn.Sequential(module, kind(tiny_config() if issubclass(kind, LlamaMLP) else 32)))
    assert not is_fused(module)
    assert [record.getMessage().split()[0] for record in caplog.records] == [kind.__name__]  # tested once


def test_modules_of_another_structure_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """In silence: nobody expects a kernel for them."""
    relu, extra = LlamaMLP(tiny_config()), LlamaMLP(tiny_config())
    relu.act_fn, extra.norm = ACT2FN["relu"], nn.LayerNorm(4)
    quantised = LlamaMLP(tiny_config())
    quantised.up_proj = type("Linear4bit", (nn.Linear,), {})(32, 48)
    buffered = LlamaRMSNorm(32)
    buffered.register_buffer("scale", torch.ones(1))
    hooked = LlamaRMSNorm(32)
    hooked.forward = lambda x: x
    modules = [relu, extra, quantised, buffered, OtherRMSNorm(32), nn.RMSNorm(32, elementwise_affine=False), nn.GELU()]
    fuse(nn.Sequential(*modules, hooked))
    assert not any(map(is_fused, modules))
    assert hooked.forward(3) == 3
    assert not caplog.records


def test_late_rounding_is_told_from_early_rounding_in_fp32_too() -> None:
    """Weights may be cast later: the test is made in bf16 whatever they are in now."""
    norm = LateRMSNorm(40)
    norm.weight.data = torch.randn(40)
    fuse(norm)
    norm.to(torch.bfloat16)
    x = torch.randn(200, 40).bfloat16()
    assert is_fused(norm)
    assert (norm(x) != type(norm).forward(norm, x)).float().mean() < 1e-3


def test_norms_of_two_eps_are_each_their_own() -> None:
    """eps is read at each call."""
    norms = nn.Sequential(LlamaRMSNorm(16, eps=1e-6), LlamaRMSNorm(16, eps=1.0))
    fuse(norms)
    x = torch.randn(5, 16)
    for norm in norms:
        assert is_fused(norm)
        torch.testing.assert_close(norm(x), type(norm).forward(norm, x))


def test_biases_are_served() -> None:
    mlp = LlamaMLP(tiny_config(mlp_bias=True))
    fuse(mlp)
    x = torch.randn(5, 32)
    assert is_fused(mlp)
    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))


def test_without_the_extension_or_off_the_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = LlamaRMSNorm(8).to("meta")
    fuse(elsewhere)
    monkeypatch.setattr(extension, "available", lambda: False)
    here = LlamaRMSNorm(8)
    fuse(here)
    assert not is_fused(elsewhere) and not is_fused(here)


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes of distinct tensors, weights left out: less than two thirds."""
    policy = fused_policy(intermediate_size=96)
    (batch,) = pack(some_groups(5))
    weights = {t.untyped_storage().data_ptr() for t in [*policy.parameters(), *policy.buffers()]}

    def kept() -> int:
        found: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden = policy.hidden_states(batch)
        assert hidden.requires_grad
        return sum(size for pointer, size in found.items() if pointer not in weights)

    fused = kept()
    with unfused(policy.model):
        assert fused < 2 / 3 * kept()
