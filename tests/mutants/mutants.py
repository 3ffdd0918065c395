"""All mutants, those that need a compiler last."""

from __future__ import annotations

from tests.mutants.of_adamw import ADAMW
from tests.mutants.of_attention import ATTENTION
from tests.mutants.of_attention_cpp import ATTENTION_CPP, ATTENTION_CSRC
from tests.mutants.of_csrc import CSRC
from tests.mutants.of_exploration import EXPLORATION
from tests.mutants.of_head import HEAD
from tests.mutants.of_layers import LAYERS, LAYERS_CSRC
from tests.mutants.of_pairrm import PAIRRM
from tests.mutants.of_ranks import RANKS
from tests.mutants.of_triton import TRITON

MUTANTS = [
    *TRITON,
    *ADAMW,
    *HEAD,
    *ATTENTION,
    *ATTENTION_CPP,
    *LAYERS,
    *RANKS,
    *PAIRRM,
    *EXPLORATION,
    *CSRC,
    *ATTENTION_CSRC,
    *LAYERS_CSRC,
]
