"""Back ends and dtypes, with the marks that say where each can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def back_ends(*shapes: tuple[int, int, int]) -> list[Any]:
    """(backend, dtype), with shapes where given; Triton in 16 bits needs a GPU.

    Large vocabularies and wide rows take long in Triton's interpreter, and the first in fp16 on most CPUs; of the
    largest, one is in CI.
    """
    params = []
    on_gpu = torch.cuda.is_available()
    for backend in ("torch", "cpp", "triton"):
        for dtype in DTYPES:
            marks = [pytest.mark.gpu] if backend == "triton" and dtype != torch.float32 else []
            for shape in shapes or [None]:
                large = shape is not None and shape[2] > 10_000
                largest = large and shape[2] > 100_000 and (backend, dtype) != ("cpp", torch.bfloat16)
                wide = shape is not None and shape[0] * shape[1] > 10_000 and backend == "triton"
                slow = not on_gpu and (wide or largest or (large and (backend == "triton" or dtype == torch.float16)))
                values = (backend, dtype) if shape is None else (backend, dtype, shape)
                name = "-".join([backend, str(dtype).removeprefix("torch."), *map(str, shape or ())])
                params.append(pytest.param(*values, marks=[*marks, *([pytest.mark.slow] if slow else [])], id=name))
    return params


def _with_modes(*, dtypes: bool) -> Any:
    """Every mode of the head with every back end; the interpreter's `recompute` runs the kernels that `keep` runs."""
    params = []
    for mode in ("keep", "recompute"):
        for param in back_ends():
            backend, dtype = param.values
            if not dtypes and dtype != torch.float32:
                continue
            slow = mode == "recompute" and backend == "triton" and not torch.cuda.is_available()
            marks = [*param.marks, *([pytest.mark.slow] if slow else [])]
            values = (mode, backend, dtype) if dtypes else (mode, backend)
            params.append(pytest.param(*values, marks=marks, id=f"{param.id if dtypes else backend}-{mode}"))
    return pytest.mark.parametrize("mode, backend, dtype" if dtypes else "mode, backend", params, indirect=["backend"])


BACK_ENDS = pytest.mark.parametrize(("backend", "dtype"), back_ends(), indirect=["backend"])
MODES_BACK_ENDS_DTYPES = _with_modes(dtypes=True)
MODES_BACK_ENDS = _with_modes(dtypes=False)
