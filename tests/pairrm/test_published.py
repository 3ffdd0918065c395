"""The published example, with the real weights: set SELM_FAST_PAIRRM to a folder with them or to llm-blender/PairRM."""

from __future__ import annotations

import os

import pytest
import torch

from selm_fast.pairrm.ranker import PairRM

SOURCE = os.environ.get("SELM_FAST_PAIRRM")


@pytest.mark.skipif(SOURCE is None, reason="SELM_FAST_PAIRRM names no PairRM")
def test_the_published_comparison() -> None:
    """Logits of the first candidates against the second ones (llm-blender/PairRM-hf, its README), in fp32."""
    ranker = PairRM.from_pretrained(str(SOURCE), device=torch.device("cpu"), dtype=torch.float32, max_tokens=2048)
    prompts = ["hello!", "I love you!"]
    pairs = [("hi!", "f**k off!"), ("I hate you!", "I love you, too!")]
    assert ranker.compare(prompts, pairs) == pytest.approx([1.9003, -1.2547], abs=1e-3)
