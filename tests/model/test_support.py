"""What is refused before any weight is read, and with which reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from selm_fast.errors import Refused
from selm_fast.model import Policy, support
from tests.helpers_models import BASE, tiny_config, tiny_model

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def from_config(config: Any, folder: Path) -> Policy:
    """The policy of a configuration, through its file."""
    config.save_pretrained(folder)
    return Policy.from_config(folder, seed=0)


def saved_with(folder: Path, **changed: Any) -> Path:
    """A sound model folder whose config.json says something else as well."""
    tiny_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with pytest.raises(Refused, match=rf"\(gpt2\) has {name} = 0\.1: with dropout on"):
        from_config(transformers.GPT2Config(**GPT2, **{**off, name: 0.1}), tmp_path)


def test_gpt2_without_dropout_is_served(tmp_path: Path) -> None:
    """Its summary_first_dropout of 0.1 belongs to another head than the language model's."""
    config = transformers.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert config.summary_first_dropout == 0.1
    from_config(config, tmp_path)


@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout", "layerdrop"])
def test_other_names_of_dropout_are_refused_too(name: str) -> None:
    support.check_config(
        {"model_type": "llama", name: 0.0, "classifier_dropout": 0.1}, trust_remote_code=False, source="m"
    )
    with pytest.raises(Refused, match=f"m .llama. has {name} = 0.05.* set {name} to 0"):
        support.check_config({"model_type": "llama", name: 0.05}, trust_remote_code=False, source="m")


def test_state_space_models_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(Refused, match=r"\(mamba\) carries recurrent state"):
        from_config(config, tmp_path)


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "mamba", "chunked_attention"])
def test_layers_that_cannot_share_a_prompt_are_refused(kind: str) -> None:
    config = {"model_type": "qwen3_next", "layer_types": ["full_attention", "sliding_attention"]}
    support.check_config(config, trust_remote_code=False, source="m")
    with pytest.raises(Refused, match=rf"m \(qwen3_next\) has {kind} layers"):
        support.check_config({**config, "layer_types": ["full_attention", kind]}, trust_remote_code=False, source="m")


def test_a_hybrid_model_is_refused_by_its_own_config(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has linear_attention layers"):
        from_config(transformers.Qwen3NextConfig(**BASE), tmp_path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"\(t5\) is an encoder-decoder"):
        from_config(transformers.T5Config(dropout_rate=0.0), tmp_path)


@pytest.mark.parametrize("part", ["vision_config", "audio_config", "speech_config"])
def test_models_that_see_or_hear_are_refused(part: str, tmp_path: Path) -> None:
    folder = saved_with(tmp_path / "model", **{part: {"hidden_size": 8}})
    with pytest.raises(Refused, match=f"has a {part}: vision and audio models are not served"):
        Policy.from_pretrained(folder)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = saved_with(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Refused, match="has quantised weights"):
        Policy.from_pretrained(folder)


def test_attention_of_a_models_own_is_refused(tmp_path: Path) -> None:
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=1, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    )
    with pytest.raises(Refused, match=r"\(bloom\) does not take its attention from transformers' attention interface"):
        from_config(config, tmp_path)


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **{**BASE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, rope_parameters=rope
    )
    with pytest.raises(Refused, match=r"\(gpt_oss\) cannot read packed batches: .*attention sinks"):
        from_config(config, tmp_path)


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Identity()
    with pytest.raises(Refused, match="has no linear language-model head"):
        Policy(model)


def test_a_lora_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Refused, match="is a LoRA adapter; LoRA is not served: merge it"):
        Policy.from_pretrained(tmp_path)


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not exist"):
        Policy.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"has no config\.json"):
        Policy.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"has no \*\.safetensors weights$"):
        Policy.from_pretrained(tmp_path)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_hazard_28_pickled_weights_are_refused_and_never_opened(name: str, tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    tiny_config().save_pretrained(folder)
    (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    for trust in (False, True):  # trust in code says nothing of weights
        with pytest.raises(Refused, match=f"{name}, and pickled weights run code on load: convert them to safetensors"):
            Policy.from_pretrained(folder, trust_remote_code=trust)
    assert not trace.exists()


def test_hazard_28_safetensors_are_read_and_a_pickle_beside_them_is_not(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    tiny_model().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trace)))
    Policy.from_pretrained(folder)
    assert not trace.exists()


def remote_code(folder: Path, trace: Path, *, kind: str) -> Path:
    """A model folder that brings Python code of its own, which leaves a file behind where it runs."""
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nfrom transformers import LlamaConfig as MyConfig\n"
    saved_with(
        folder, model_type=kind, auto_map={"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    )
    (folder / "code.py").write_text(code)
    return folder


def test_hazard_28_remote_code_is_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = remote_code(tmp_path / "model", trace, kind="my_model")
    with pytest.raises(
        Refused, match=r"\(my_model\) brings its own Python code .auto_map.; set model.trust_remote_code"
    ):
        Policy.from_pretrained(folder)
    with pytest.raises(Refused):
        Policy.from_config(folder, seed=0)
    assert not trace.exists()


def test_hazard_28_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    Policy.from_pretrained(remote_code(tmp_path / "model", trace, kind="llama"))
    assert not trace.exists()
