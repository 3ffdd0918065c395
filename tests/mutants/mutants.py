"""All mutants, those that need a compiler last."""

from __future__ import annotations

from tests.mutants.of_attention import ATTENTION
from tests.mutants.of_csrc import CSRC
from tests.mutants.of_head import HEAD
from tests.mutants.of_triton import TRITON

MUTANTS = [*TRITON, *HEAD, *ATTENTION, *CSRC]
