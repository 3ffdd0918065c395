"""Scores and ranks are those of llm-blender 0.0.2 (extra: blender), one prompt a batch."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers.utils.hub

from benchmarks.blender import Blender
from tests.pairrm.conftest import load
from tests.pairrm.texts import rows

# Not importorskip: without the shim the package cannot be imported.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_blender") is None, reason="needs the extra: blender")
TOLERANCE = 1e-6  # scores are of the size of 0.1, and sums over 64 numbers in another order differ by some 1e-7


def blender(folder: Path) -> Blender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of dataclasses_json, about settings that are not given
        return Blender(str(folder))


def difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(ours - theirs) for ours, theirs in pairs)


def test_scores_and_ranks_of_two_hundred_odd_rows(folder: Path) -> None:
    reference = blender(folder)
    prompts, candidates = rows(200, seed=1, most=40)
    expected = reference.scores(prompts, candidates, batch_size=1)
    found = load(folder).score(prompts, candidates)
    assert difference(found, expected) <= TOLERANCE
    assert reference.ranks(found) == reference.ranks(expected)
    assert max(abs(score) for scores in expected for score in scores) > 1e5 * TOLERANCE


def test_texts_that_are_cut_where_pairrm_cuts_them(hf_folder: Path) -> None:
    prompts, _ = rows(1, seed=3, most=4)
    words = "like the sound of it " * 900
    prompts = [*prompts, words]
    candidates = [[words[:9000], "so"], [words, "so " + words]]
    expected = blender(hf_folder).scores(prompts, candidates, batch_size=1)
    assert difference(load(hf_folder).score(prompts, candidates), expected) <= TOLERANCE


def test_in_its_larger_batches_its_scores_depend_on_the_batch(folder: Path) -> None:
    """It lets a candidate have what the longest prompt of the batch leaves over."""
    reference = blender(folder)
    prompts, candidates = rows(8, seed=5, most=40, width=2)
    alone = reference.scores(prompts, candidates, batch_size=1)
    assert difference(reference.scores(prompts, candidates, batch_size=8), alone) > 1e3 * TOLERANCE


def test_the_shim_leaves_nothing_behind(folder: Path) -> None:
    handlers, warning = list(logging.getLogger().handlers), logging.warning
    blender(folder).scores(["a"], [["b", "c"]], batch_size=1)
    from llm_blender.pair_ranker import collator, model_util

    assert collator.encode_texts.__module__ == collator.__name__
    assert model_util.build_pretrained_model.__module__ == model_util.__name__
    assert not hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE")
    assert "vllm" not in sys.modules
    assert logging.getLogger().handlers == handlers and logging.warning is warning
