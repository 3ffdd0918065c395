"""`Policy`: log-probs and loss of packed batches under an unmodified transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from selm_fast.batch import PackedBatch
from selm_fast.errors import Refused
from selm_fast.model import support
from selm_fast.model.attention import NAME, packed_kwargs
from selm_fast.model.fused_layers import fuse, unfused
from selm_fast.ops import attention_backend, fused_preference_loss, linear_logprob, sequence_sum


class Policy(nn.Module):
    """A causal language model that reads packed batches; its head runs fused, outside the body.

    model: a transformers causal language model. Its attention is switched to this package's; its weights are not
    touched.
    head_mode: "auto" | "keep" | "recompute", as in `selm_fast.ops.linear_logprob`.
    """

    def __init__(
        self, model: Any, *, head_mode: Literal["auto", "keep", "recompute"] = "auto", source: str = "model"
    ) -> None:
        super().__init__()
        support.check_model(model, source)
        model.set_attn_implementation(NAME)
        self.model = model
        self.head_mode: Literal["auto", "keep", "recompute"] = head_mode
        config = model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        head_mode: Literal["auto", "keep", "recompute"] = "auto",
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a folder or hub name; only safetensors are read.

        dtype: of the weights in memory.
        Raises Refused for what cannot share prefixes or is not served, for missing weights, and for a model whose
        packed log-probs differ from its own.
        """
        source = str(path)
        support.check_source(source, trust_remote_code=trust_remote_code)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            support.check_config(config.to_dict(), trust_remote_code=trust_remote_code, source=source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            model, info = loaded
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise (
                error if isinstance(error, Refused) else Refused(f"cannot load the model {source}: {error}")
            ) from error
        if info["missing_keys"]:
            raise Refused(
                f"{source} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}; the file is not of this model"
            )
        return cls._ready(model.to(device), head_mode, source)

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        head_mode: Literal["auto", "keep", "recompute"] = "auto",
    ) -> Self:
        """Random weights from a config.json; the same seed gives the same weights.

        Raises Refused for a file that is not a model's configuration or a model that is not served.
        """
        source = str(path)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise Refused(f"{source} is not the config.json of a transformers model: {error}") from error
        support.check_config(config.to_dict(), trust_remote_code=False, source=source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Not model.to(dtype): it would round the buffers too, rotary frequencies among them.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return cls._ready(model.to(device), head_mode, source)

    @classmethod
    def from_tensors(
        cls,
        folder: Path,
        tensors: Mapping[str, Tensor],
        *,
        device: str | torch.device = "cpu",
        head_mode: Literal["auto", "keep", "recompute"] = "auto",
        trust_remote_code: bool = False,
    ) -> Self:
        """The model that a folder's config.json describes with these weights, by parameter name; tied ones stand once.

        Raises Refused where the names or shapes are not the model's.
        """
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with no_init_weights():  # they are replaced, and drawing eight billion takes a minute
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model.tie_weights()  # a part of their initialisation
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise Refused(f"{folder}: the weights of this run are not those of its config.json; was it edited?")
        for name, parameter in model.named_parameters():
            parameter.data = tensors[name]
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return cls._ready(model.to(device), head_mode, str(folder))

    @classmethod
    def _ready(cls, model: Any, head_mode: Literal["auto", "keep", "recompute"], source: str) -> Self:
        from selm_fast.model.selfcheck import check_packed

        policy = cls(model, head_mode=head_mode, source=source)
        fuse(model)
        check_packed(policy, source)
        return policy.train()

    @property
    def body(self) -> nn.Module:
        """The model without its head: token ids to hidden states."""
        return self.model.get_decoder()  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Linear:
        """The language-model head; its weight may be the embedding's."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden state of every response row: (N, D)."""
        output = self.body(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            **packed_kwargs(batch),
        )
        return output.last_hidden_state[0].index_select(0, batch.response_rows)  # type: ignore[no-any-return]

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Log-prob (nats) of every target: (N,) fp32."""
        return self._token_logps(batch)

    def _token_logps(self, batch: PackedBatch) -> Tensor:
        return linear_logprob(self.hidden_states(batch), self.head.weight, batch.targets, **self._head_settings())

    def _head_settings(self) -> dict[str, Any]:
        return {
            "bias": self.head.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "mode": self.head_mode,
        }

    def sequence_logps(self, batch: PackedBatch) -> Tensor:
        """Log-prob (nats) of every distinct response given its prompt: (S,) fp64."""
        # Not `token_logps`: where FSDP holds the weights, a public method is a pass of its own and must not be nested.
        return sequence_sum(self._token_logps(batch), batch.cu_responses)

    def own_logps(self, prompt: list[int], response: list[int]) -> Tensor:
        """Log-prob (nats) of each response token by the model's own forward, head and eager attention: (n,) fp64."""
        self.model.set_attn_implementation("eager")
        try:
            inputs = torch.tensor([prompt + response], device=self.head.weight.device)
            with unfused(self.model):
                logits = self.model(input_ids=inputs, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        finally:
            self.model.set_attn_implementation(NAME)
        targets = inputs[0, len(prompt) :].unsqueeze(1)
        return logits.log_softmax(-1).gather(1, targets).squeeze(1)  # type: ignore[no-any-return]

    def loss(self, batch: PackedBatch, reference_logps: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`preference_loss` of a batch; reference_logps (S,) fp64; settings as there."""
        return fused_preference_loss(
            self.hidden_states(batch),
            self.head.weight,
            batch.targets,
            batch.cu_responses,
            batch.pairs,
            reference_logps,
            **self._head_settings(),
            **settings,
        )

    forward = loss

    def attention_backend(self, dtype: torch.dtype) -> str:
        """The back ends that serve this model's layers in a dtype, on its device: with a window, and without."""
        config = self.model.config
        heads = config.num_attention_heads
        names = [
            attention_backend(
                self.head.weight.device,
                dtype,
                heads=heads,
                key_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
                window=window,
                softcap=getattr(config, "attn_logit_softcapping", None),
            )
            for window in dict.fromkeys((None, getattr(config, "sliding_window", None)))
        ]
        return ", ".join(dict.fromkeys(names))

    def layers(self) -> nn.ModuleList:
        """The decoder layers. Raises Refused where the body keeps them elsewhere than in `.layers`."""
        layers = getattr(self.body, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise Refused(
                f"{self.model.config.model_type} keeps its decoder layers in no list named layers: set "
                "model.activation_checkpointing to none and model.compile to false"
            )
        return layers

    def checkpoint_activations(self, kind: Literal["selective", "full"] = "full") -> None:
        """Recompute each decoder layer in the backward pass: all of it, or all but its matmuls and its attention."""
        for layer in self.layers():
            layer.forward = _checkpointed(layer.forward, selective=kind == "selective")

    def compile_layers(self) -> None:
        """torch.compile each decoder layer, for any number of tokens."""
        for layer in self.layers():
            # By default what is rounded to 16 bits depends on what is kept for a backward pass, and the reference pass,
            # which keeps nothing, would have other bits. FSDP's hooks, which are around `forward`, stay uncompiled.
            layer.forward = torch.compile(layer.forward, dynamic=True, options={"emulate_precision_casts": True})


# What selective checkpointing keeps the results of. gated_mlp is three matmuls.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.selm_fast.shared_prefix_attention.default,
    torch.ops.selm_fast.gated_mlp.default,
)


def _kept_or_not(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_kept_or_not)


def _checkpointed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """`forward` under checkpointing, as a function of ours: torch.compile would not look into a functools.partial.

    It lies inside of FSDP's hooks, so that what they cast is not cast once more, or forgotten, when it is recomputed
    (as in torch 2.11 and 2.12, pytorch issue 159359).
    """
    contexts: dict[str, Any] = {"context_fn": _selective} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        # No layer draws random numbers (dropout is refused), so none need be replayed.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    return run
