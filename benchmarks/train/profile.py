"""Where a step's time goes, by kind of work."""

from __future__ import annotations

from typing import Any

import torch

# By the name of an operator (on CUDA: of a kernel); the first that matches.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention", "flash", "fmha", "softmax_warp")),
    (
        "matmuls",
        ("::mm", "addmm", "bmm", "baddbmm", "matmul", "gemm", "cutlass", "selm_fast_cpp::mm", "nvjet", "linear"),
    ),
    (
        "rows of the head",
        ("fold", "selm_fast_cpp::softmax", "log_softmax", "chunkedlogprob", "target_logit", "logsumexp", "gather"),
    ),
    ("norms and activations", ("rms_norm", "silu", "gated", "gelu", "mean", "rsqrt", "pow")),
    ("optimiser", ("adam", "lerp", "addcdiv", "addcmul", "foreach", "vector_norm", "sqrt")),
)
OTHER = "all else"


def start(device: str) -> Any:
    """A profiler, running."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.__enter__()
    return profiler


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel."""
    lowered = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lowered for part in parts)), OTHER)


def breakdown(profiler: Any, device: str) -> dict[str, float]:
    """Seconds by kind of work, of the host's operators or of the device's kernels; largest first."""
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != (device == "cuda"):
            continue
        time_us = event.self_device_time_total if on_device else event.self_cpu_time_total
        kind = kind_of(event.key)
        seconds[kind] = seconds.get(kind, 0.0) + time_us / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
