"""The contestants: this package's op and its peers behind one signature, a few lines each.

A peer that is not installed, or does not run on the device, is left out, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from selm_fast.ops import linear_logprob

NO_GRAD, BACKWARD = "no-grad", "forward + backward"
Mode = Literal["keep", "recompute"]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """One contestant."""

    name: str
    forward: Forward  # hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,), or their sum () for all tokens
    matmuls: int  # GEMMs of N x D x V in forward and backward together; a forward alone has one
    per_token: bool = True  # does each token have an upstream gradient of its own?
    ours: bool = False
    kinds: tuple[str, ...] = (NO_GRAD, BACKWARD)


class NotHere(Exception):
    """Why a peer cannot take part."""


def ours() -> Iterator[Entrant]:
    """`linear_logprob` by mode; without gradients the mode makes no difference."""
    yield Entrant(name="selm_fast", forward=linear_logprob, matmuls=1, ours=True, kinds=(NO_GRAD,))
    modes: tuple[tuple[Mode, int], ...] = (("keep", 3), ("recompute", 4))
    for mode, matmuls in modes:
        forward = partial(linear_logprob, mode=mode)
        yield Entrant(name=f"selm_fast {mode}", forward=forward, matmuls=matmuls, ours=True, kinds=(BACKWARD,))


def eager_forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As trainers compute it: logits in the inputs' dtype, log_softmax in fp32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def torch_eager() -> Entrant:
    """Torch without any fusion: the yardstick of every error."""
    return Entrant(name="torch eager", forward=eager_forward, matmuls=3)


def torch_chunked() -> Entrant:
    """torch.nn.functional.linear_cross_entropy with its chunks; without `options` it is the eager computation."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise NotHere(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    settings = options()

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll: Tensor = function(hidden, weight, targets, reduction="none", options=settings)
        return -nll

    return Entrant(name="torch linear_cross_entropy", forward=forward, matmuls=4)


def trl() -> Entrant:
    """The head of TRL's trainers, with their chunk size."""
    function = _import("trl.kernels").ChunkedLogProbFunction
    chunk_size: int = _import("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logps: Tensor = function.apply(hidden, weight, None, targets, 1.0, chunk_size, None, 1.0, ("log_probs",))[0]
        return logps

    return Entrant(name="TRL chunked head", forward=forward, matmuls=4)


def liger() -> Entrant:
    """Liger, whose backward computes the logits again where each token has its own upstream gradient."""
    module = _import("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return Entrant(name="Liger", forward=lambda hidden, weight, targets: -loss(weight, hidden, targets), matmuls=4)


def cut_cross_entropy() -> Entrant:
    """Cut cross-entropy as it comes: gradients of improbable tokens are left out."""
    function = _import("cut_cross_entropy").linear_cross_entropy
    return Entrant(name="cut-cross-entropy", forward=lambda *inputs: -function(*inputs, reduction="none"), matmuls=4)


def cut_cross_entropy_exact() -> Entrant:
    """Cut cross-entropy with every gradient."""
    function = _import("cut_cross_entropy").linear_cross_entropy
    return Entrant(
        name="cut-cross-entropy, unfiltered",
        forward=lambda *inputs: -function(*inputs, reduction="none", filter_eps=None),
        matmuls=4,
    )


def quack() -> Entrant:
    """QuACK with a loss a token: its cross-entropy kernel behind a whole matrix of logits."""
    function = _import("quack.linear_cross_entropy").linear_cross_entropy_func
    return Entrant(
        name="QuACK",
        forward=lambda hidden, weight, targets: -function(hidden, weight, None, targets, reduction="none"),
        matmuls=3,
    )


def quack_chunked() -> Entrant:
    """QuACK's fastest: gradients are made in the forward pass, so every token has the same upstream gradient."""
    function = _import("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return Entrant(
        name="QuACK chunked",
        forward=lambda hidden, weight, targets: -function(hidden, weight, targets, reduction="sum"),
        matmuls=3,
        per_token=False,
    )


PEERS: dict[str, Callable[[], Entrant]] = {
    "torch linear_cross_entropy": torch_chunked,
    "TRL chunked head": trl,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "cut-cross-entropy, unfiltered": cut_cross_entropy_exact,
    "QuACK": quack,
    "QuACK chunked": quack_chunked,
}


def gather(only: str | None = None) -> tuple[list[Entrant], dict[str, str]]:
    """Torch eager, then ours, then the peers that are installed (or the one named), and why others are missing."""
    entrants, missing = [torch_eager(), *ours()], {}
    for name, make in PEERS.items():
        if only not in (None, name):
            continue
        try:
            entrants.append(make())
        except NotHere as reason:
            missing[name] = str(reason)
        except AttributeError as error:
            missing[name] = f"another version of it is installed: {error}"
    return entrants, missing


def _import(module: str) -> Any:
    """A module of a peer; whatever its import raises (a missing driver, another version) keeps it out, and only it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise NotHere("not installed") from None
        raise NotHere(f"its import failed: {error}") from None
    except Exception as error:
        raise NotHere(f"its import failed: {type(error).__name__}: {error}") from None
