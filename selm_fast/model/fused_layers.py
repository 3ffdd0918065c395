"""Norms and gated feed-forward layers of an unmodified transformers model, served by this package's kernels on a CPU.

A module keeps its class, its parameters and their names; its `forward`, as an attribute of the instance, hides that of
its class. On CUDA torch.compile fuses the same operations, and nothing is changed.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from selm_fast.ops import extension
from selm_fast.ops.gated_mlp import Activation, gated_mlp
from selm_fast.ops.rms_norm import rms_norm

log = logging.getLogger(__name__)

Forward = Callable[[Any, Tensor], Tensor]

# Offset, and whether the normalised row is rounded before it is multiplied, which shows in 16 bits only.
NORMS = ((0.0, True), (1.0, False), (0.0, False))  # Llama, Gemma, OLMo 2
ACTIVATIONS: dict[str, Activation] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}

# Largest error of an output or gradient beside its largest number. Two right ways to compute them differ by a few
# roundings, 2^-24 in fp32 and 2^-9 in bf16 each; another activation, eps or offset shows above 1e-4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Share of a norm's outputs in 16 bits that may differ at all: rounding twice instead of once changes a quarter of them.
UNEQUAL = 0.01
ROWS, WIDTH, HIDDEN = 67, 40, 72  # of a test


def fuse(model: nn.Module) -> None:
    """Replace `forward` of the norms and gated feed-forward layers that these kernels reproduce.

    Every class of module is tested first, small and with random weights, against its own `forward`; one that differs
    is left alone, with a warning. Does nothing off the CPU or without the extension.
    """
    if not extension.available() or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    found: dict[tuple[Any, ...], Forward | None] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue  # somebody else's, or ours already
        key = _kind(module)
        if key is None:
            continue
        if key not in found:
            found[key] = _tested(module)
        forward = found[key]
        if forward is not None:
            # A bound method: copy.deepcopy binds it to the copy.
            module.forward = MethodType(forward, module)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """The model as it was before `fuse`, for a comparison."""
    fused = [(module, module.forward) for module in model.modules() if _is_fused(module)]
    for module, _ in fused:
        del module.forward
    try:
        yield
    finally:
        for module, forward in fused:
            module.forward = forward


def _is_fused(module: nn.Module) -> bool:
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return getattr(function, "__module__", None) == __name__


def _kind(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module of a known structure has in common with those that one test speaks for; None for all others."""
    name = type(module).__name__
    parameters = dict(module.named_parameters(recurse=False))
    children = dict(module.named_children())
    if dict(module.named_buffers()) or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    if name.endswith("RMSNorm") and parameters.keys() == {"weight"} and not children:
        return (type(module), _eps(module)) if parameters["weight"].dim() == 1 and _eps(module) is not None else None
    if name.endswith("MLP") and not parameters:
        linears = {key: child.bias is not None for key, child in children.items() if type(child) is nn.Linear}
        others = [child for key, child in children.items() if key not in linears]
        if linears.keys() in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}) and (
            len(others) == 1 and type(others[0]).__name__ in ACTIVATIONS
        ):
            return type(module), type(others[0]), *linears.items()
    return None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _served(x: Tensor, weight: Tensor) -> bool:
    """Asked at each call: weights are cast after loading, and models moved."""
    return x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")


def _norm(offset: float, rounds_first: bool) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _served(x, self.weight):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        eps = _eps(self)
        assert eps is not None
        return rms_norm(x, self.weight, eps, offset=offset, rounds_first=rounds_first)

    return forward


def _mlp(activation: Activation) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not _served(x, down.weight):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        biases = gate.bias, up.bias, down.bias
        return gated_mlp(x, gate.weight, up.weight, down.weight, biases=biases, activation=activation)

    return forward


def _joint_mlp(activation: Activation) -> Forward:
    """Of gate and up in one matrix (Phi-3)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        both, down = self.gate_up_proj, self.down_proj
        if not _served(x, down.weight):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        gate, up = both.weight.chunk(2)
        gate_bias, up_bias = (None, None) if both.bias is None else both.bias.chunk(2)
        return gated_mlp(x, gate, up, down.weight, biases=(gate_bias, up_bias, down.bias), activation=activation)

    return forward


def _candidates(module: nn.Module) -> list[Forward]:
    """What may serve a module of a known structure."""
    children = dict(module.named_children())
    if not children:
        return [_norm(*settings) for settings in NORMS]
    (activation,) = (ACTIVATIONS[type(child).__name__] for child in children.values() if type(child) is not nn.Linear)
    return [_joint_mlp(activation) if "gate_up_proj" in children else _mlp(activation)]


def _tested(module: nn.Module) -> Forward | None:
    """The candidate that does what the module's own `forward` does, in each dtype that it may compute in."""
    name, weight = type(module).__name__, next(module.parameters())
    dtypes = dict.fromkeys((torch.float32, torch.bfloat16, weight.dtype))
    try:
        for forward in _candidates(module):
            if all(_agrees(module, forward, dtype) for dtype in dtypes):
                return forward
    except Exception as cause:  # whatever the forward of an unknown class may raise
        log.warning("%s is left as it is, without this package's kernels: its test failed with %r", name, cause)
        return None
    log.warning("%s is left as it is: this package's kernels do not compute what it does", name)
    return None


def _agrees(module: nn.Module, forward: Forward, dtype: torch.dtype) -> bool:
    """Outputs and gradients of `forward` against those of the module's class, small and with random weights."""
    own, fused = (_results(_small(module, dtype), function) for function in (type(module).forward, forward))
    close = all(
        (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()  # False for a NaN
        for a, b in zip((t.float() for t in fused), (t.float() for t in own), strict=True)
    )
    rounded_alike = dtype == torch.float32 or bool(dict(module.named_children()))
    return close and (rounded_alike or (own[0] != fused[0]).float().mean().item() <= UNEQUAL)


def _small(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with few, random weights: its class, settings and activation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

    small = copy.copy(module)
    small._parameters = {name: random(WIDTH) for name in module._parameters}
    small._modules = dict(module._modules)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            joint = 2 if name == "gate_up_proj" else 1
            outputs, inputs = (WIDTH, HIDDEN) if name == "down_proj" else (joint * HIDDEN, WIDTH)
            linear = nn.Linear(inputs, outputs, bias=child.bias is not None, device="meta")
            linear.weight = random(outputs, inputs)
            if linear.bias is not None:
                linear.bias = random(outputs)
            small._modules[name] = linear
    return small


def _results(module: nn.Module, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Output and the gradients by the input and every weight, of rows that eps matters to and rows that it does not."""
    generator = torch.Generator().manual_seed(1)
    weights = list(module.parameters())
    scales = torch.logspace(-3, 1, ROWS).unsqueeze(1)
    x = (scales * torch.randn(1, ROWS, WIDTH, generator=generator)).to(weights[0].dtype).requires_grad_()
    with torch.enable_grad():
        out = forward(module, x)
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [x, *weights], grad)]
