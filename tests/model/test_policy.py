"""Loading a policy, the refusal to attend without a layout, and the check of a model against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from selm_fast.data.packing import pack
from selm_fast.errors import Refused
from selm_fast.model import Policy
from selm_fast.model.attention import attention, packed_kwargs
from selm_fast.model.fused_layers import unfused
from selm_fast.model.selfcheck import check_packed
from selm_fast.ops import shared_prefix_attention
from tests.helpers_models import FAMILIES, some_groups, tiny_config, tiny_model


def save(model: Any, folder: Path) -> Path:
    """Write a model as a Hugging Face folder."""
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_and_says_the_same(family: str, tmp_path: Path) -> None:
    """from_pretrained, with its check of the packed path against the model's own logits."""
    model = tiny_model(family)
    (batch,) = pack(some_groups(4))
    expected = Policy(model).token_logps(batch)
    policy = Policy.from_pretrained(save(model, tmp_path / "model"))
    with unfused(policy.model):
        assert torch.equal(policy.token_logps(batch), expected)
    assert policy.training
    assert policy.model.config._attn_implementation == "selm_shared_prefix"


def test_a_model_may_be_loaded_in_bf16(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(save(tiny_model(), tmp_path / "model"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in policy.buffers()} == {torch.float32}


def test_tied_weights_stay_tied_and_the_head_is_the_embedding(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(save(tiny_model("llama tied"), tmp_path / "model"))
    assert policy.head.weight is policy.body.embed_tokens.weight
    assert "lm_head.weight" not in dict(policy.model.named_parameters())


@pytest.mark.parametrize(
    ("family", "softcap", "scale"), [("gemma2", 3.0, 1.0), ("granite", None, 1 / 3), ("cohere", None, 0.3)]
)
def test_the_heads_settings_are_read_from_the_config(family: str, softcap: float | None, scale: float) -> None:
    policy = Policy(tiny_model(family))
    assert policy.softcap == softcap
    assert policy.logit_scale == pytest.approx(scale)


def test_from_config_gives_the_same_weights_for_the_same_seed(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (Policy.from_config(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)  # the program's own random numbers go on undisturbed
    torch.manual_seed(99)
    later = Policy.from_config(tmp_path, seed=3)
    names = [name for name, value in first.named_parameters() if value.dim() == 2]
    weights = [dict(policy.named_parameters()) for policy in (first, again, later, other)]
    for name in names:
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name], weights[2][name])
        assert not torch.equal(weights[0][name], weights[3][name])


def test_from_config_in_bf16_rounds_the_weights_of_fp32_and_leaves_rotary_frequencies_alone(tmp_path: Path) -> None:
    """Frequencies rounded to bf16 turn a position of 500 by whole radians, and no check at 14 tokens sees it."""
    tiny_config().save_pretrained(tmp_path)
    high, low = (Policy.from_config(tmp_path, seed=3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, value), (_, rounded) in zip(high.named_parameters(), low.named_parameters(), strict=True):
        assert torch.equal(value.bfloat16(), rounded), name
    for (name, value), (_, kept) in zip(high.named_buffers(), low.named_buffers(), strict=True):
        assert torch.equal(value, kept), name
        assert kept.dtype == torch.float32, name


def test_from_config_refuses_what_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(Refused, match="is not the config.json of a transformers model"):
        Policy.from_config(tmp_path, seed=0)


def own_tensors(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds: every parameter once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_made_from_its_tensors_says_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    (batch,) = pack(some_groups(4))
    expected = Policy(model).token_logps(batch)
    model.config.save_pretrained(tmp_path)  # no weights there, and none are looked for
    tensors = own_tensors(model)
    policy = Policy.from_tensors(tmp_path, tensors)
    with unfused(policy.model):
        assert torch.equal(policy.token_logps(batch), expected)
    assert policy.training
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
        assert parameter.requires_grad
    for (name, value), (_, kept) in zip(model.named_buffers(), policy.model.named_buffers(), strict=True):
        assert torch.equal(value, kept), name


def test_tied_tensors_stand_once_and_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("llama tied")
    model.config.save_pretrained(tmp_path)
    tensors = own_tensors(model)
    assert "lm_head.weight" not in tensors
    policy = Policy.from_tensors(tmp_path, tensors)
    assert policy.head.weight is policy.body.embed_tokens.weight


def test_tensors_bring_the_generation_settings_of_their_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    policy = Policy.from_tensors(tmp_path, own_tensors(model))
    assert policy.model.generation_config.eos_token_id == [2, 9]


@pytest.mark.parametrize("change", ["missing", "more", "another shape", "another name"])
def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path, change: str) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tensors = own_tensors(model)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors[name]
    if change == "more":
        tensors["model.layers.2.mlp.up_proj.weight"] = weight
    elif change == "another shape":
        tensors[name] = weight.T.contiguous()
    else:
        del tensors[name]
        if change == "another name":
            tensors["model.layers.1.mlp.other.weight"] = weight
    with pytest.raises(Refused, match="the weights of this run are not those of its config.json"):
        Policy.from_tensors(tmp_path, tensors)


def test_tensors_that_say_nothing_are_refused(tmp_path: Path) -> None:
    """The packed path is checked for them too."""
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tensors = own_tensors(model)
    tensors["lm_head.weight"][0, 0] = torch.nan
    with pytest.raises(Refused, match="differ from the model's own by nan"):
        Policy.from_tensors(tmp_path, tensors)


def test_attention_without_a_layout_is_an_error() -> None:
    """A padding mask would otherwise be dropped in silence."""
    policy = Policy(tiny_model())
    with pytest.raises(ValueError, match="got no packed metadata"):
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_attention_refuses_what_branches_cannot_share() -> None:
    (batch,) = pack(some_groups(2))
    layout = packed_kwargs(batch)
    rows = batch.tokens.shape[0]
    q, k, v = torch.randn(1, 4, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    module = torch.nn.Module()
    attention(module, q, k, v, None, **layout)
    with pytest.raises(ValueError, match="got an attention_mask"):
        attention(module, q, k, v, torch.zeros(1, 1, rows, rows), **layout)
    with pytest.raises(ValueError, match=r"no dropout 0\.1"):
        attention(module, q, k, v, None, dropout=0.1, **layout)
    with pytest.raises(ValueError, match="no attention sinks"):
        attention(module, q, k, v, None, s_aux=torch.zeros(4), **layout)
    with pytest.raises(ValueError, match="got a batch of 2"):
        attention(module, q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), None, **layout)


def test_attention_passes_every_setting_on() -> None:
    (batch,) = pack(some_groups(3))
    layout = packed_kwargs(batch)
    plain = {name.removeprefix("selm_"): value for name, value in layout.items()}
    rows = batch.tokens.shape[0]
    q, k, v = torch.randn(1, 4, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    heads_last = [t[0].transpose(0, 1) for t in (q, k, v)]
    for given, expected in (
        ({}, {"scale": 8**-0.5}),
        ({"scaling": 0.2}, {"scale": 0.2}),
        ({"scaling": 0.2, "sliding_window": 3}, {"scale": 0.2, "window": 3}),
        ({"scaling": 0.2, "softcap": 1.5}, {"scale": 0.2, "softcap": 1.5}),
    ):
        out, weights = attention(torch.nn.Module(), q, k, v, None, is_causal=True, **given, **layout)
        assert weights is None
        assert torch.equal(out[0], shared_prefix_attention(*heads_last, **plain, **expected))


def test_generate_works_once_the_attention_is_switched_back() -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = tiny_model().eval().generate(prompt, **settings)
    policy = Policy(tiny_model()).eval()
    policy.token_logps(pack(some_groups(2))[0])
    policy.model.set_attn_implementation("sdpa")
    assert torch.equal(policy.model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_accepts_every_family_and_leaves_the_policy_as_it_was(family: str) -> None:
    policy = Policy(tiny_model(family))
    check_packed(policy, "m")
    assert policy.model.config._attn_implementation == "selm_shared_prefix"
    assert all(parameter.grad is None for parameter in policy.parameters())


def _scaled(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 1.1


def _shifted(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + torch.linspace(0, 1, out.shape[-1])


@pytest.mark.parametrize("hook", [_scaled, _shifted])
def test_the_check_refuses_a_head_that_does_what_we_do_not_know(hook: Any) -> None:
    """The model's own logits are changed behind its head; the fused head reads the weight and misses it."""
    policy = Policy(tiny_model())
    policy.head.register_forward_hook(hook)
    with pytest.raises(Refused, match=r"m \(llama\): log-probs through packed batches differ .* not served"):
        check_packed(policy, "m")


def test_the_check_refuses_logits_that_are_scaled_after_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model()
    save(model, tmp_path / "model")
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits / 3
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(Refused, match="not served"):
        Policy.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("setting", ["softcap", "logit_scale"])
def test_the_check_refuses_a_head_setting_that_is_dropped(setting: str) -> None:
    policy = Policy(tiny_model("gemma2" if setting == "softcap" else "cohere"))
    setattr(policy, setting, {"softcap": None, "logit_scale": 1.0}[setting])
    with pytest.raises(Refused, match="not served"):
        check_packed(policy, "m")


def test_the_check_refuses_a_mask_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 5 read as 4."""
    policy = Policy(tiny_model("mistral"))

    def narrower(*args: Any, window: int, **kwargs: Any) -> Tensor:
        return shared_prefix_attention(*args, window=window - 1, **kwargs)

    monkeypatch.setattr("selm_fast.model.attention.shared_prefix_attention", narrower)
    with pytest.raises(Refused, match="not served"):
        check_packed(policy, "m")


def test_the_check_refuses_nan() -> None:
    policy = Policy(tiny_model())
    with torch.no_grad():
        policy.head.weight[0, 0] = torch.nan
    with pytest.raises(Refused, match="differ from the model's own by nan"):
        check_packed(policy, "m")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        Policy.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(Refused, match="cannot load the model"):
        Policy.from_pretrained(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Refused, match="cannot load the model"):
        Policy.from_pretrained(folder)


def test_layers_in_another_place_are_refused_where_they_are_needed() -> None:
    policy = Policy(tiny_model())
    policy.model.get_decoder = lambda: torch.nn.Linear(1, 1)
    with pytest.raises(Refused, match="no list named layers"):
        policy.checkpoint_activations()
    with pytest.raises(Refused, match="no list named layers"):
        policy.compile_layers()


@pytest.mark.parametrize("method", ["token_logps", "loss"])
@pytest.mark.parametrize("head_mode", ["keep", "recompute"])
def test_the_head_runs_in_the_mode_that_is_asked_for(
    head_mode: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    module = __import__("selm_fast.model.policy", fromlist=["policy"])
    name = {"token_logps": "linear_logprob", "loss": "fused_preference_loss"}[method]
    original = getattr(module, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["mode"])
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    batch = pack(some_groups(2))[0]
    policy = Policy(tiny_model(), head_mode=head_mode)
    if method == "loss":
        policy.loss(batch, torch.zeros(len(batch.sequence_keys), dtype=torch.float64), beta=0.1)
    else:
        policy.token_logps(batch)
    assert seen == [head_mode]


def test_the_loss_is_one_node_above_the_hidden_states() -> None:
    batch = pack(some_groups(2))[0]
    policy = Policy(tiny_model())
    loss, _ = policy.loss(batch, torch.zeros(len(batch.sequence_keys), dtype=torch.float64), beta=0.1)
    assert "fused_preference_loss" in loss.grad_fn.name()
    following = [node.name() for node, _ in loss.grad_fn.next_functions if node is not None]
    assert sorted(following) == ["IndexSelectBackward0", "torch::autograd::AccumulateGrad"]
