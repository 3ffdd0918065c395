"""Scores depend on the prompt and its candidates alone, and every odd input has one."""

from __future__ import annotations

import math
import random
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from selm_fast.errors import Stopped
from selm_fast.pairrm.deberta import project_positions, states_at
from selm_fast.pairrm.encoder import PairEncoder
from selm_fast.pairrm.work import num_rows
from tests.pairrm.conftest import load
from tests.pairrm.texts import rows

TOLERANCE = 1e-6  # sums in another order where a batch is padded
PROMPTS, CANDIDATES = rows(24, seed=9, most=30)


def close(left: list[list[float]], right: list[list[float]], within: float = TOLERANCE) -> bool:
    pairs = [pair for both in zip(left, right, strict=True) for pair in zip(*both, strict=True)]
    return all(abs(one - other) <= within for one, other in pairs)


def test_scores_do_not_depend_on_batches_order_or_neighbours(hf_folder: Path) -> None:
    expected = load(hf_folder).score(PROMPTS, CANDIDATES)
    for max_tokens in (1, 300, 10**6):
        assert close(load(hf_folder, max_tokens=max_tokens).score(PROMPTS, CANDIDATES), expected)
    order = random.Random(1).sample(range(24), 24)
    ranker = load(hf_folder)
    shuffled = ranker.score([PROMPTS[index] for index in order], [CANDIDATES[index] for index in order])
    assert close(shuffled, [expected[index] for index in order])
    for index in (0, 5, 11):
        assert close(ranker.score([PROMPTS[index]], [CANDIDATES[index]]), [expected[index]])


def test_scores_are_the_mean_of_what_each_pair_says_in_both_orders(hf_folder: Path) -> None:
    ranker, texts = load(hf_folder), ["how did she look", "make it so", "no", "no"]
    won = [[ranker.compare(["what is it"], [(left, right)])[0] for right in texts] for left in texts]
    assert won[2][2] == won[3][2] == won[2][3] != 0.0
    (found,) = ranker.score(["what is it"], [texts])
    for i in range(4):
        assert found[i] == pytest.approx(sum(won[i][j] - won[j][i] for j in range(4)) / 4, abs=TOLERANCE)
    assert found[2] == found[3]
    assert abs(sum(found)) <= TOLERANCE and max(map(abs, found)) > 1e-3


def test_one_candidate_and_equal_candidates_score_zero_and_take_no_row(hf_folder: Path) -> None:
    told: list[int] = []
    assert load(hf_folder).score(["a", "b"], [["x"], ["y", "y", "y"]], on_rows=told.append) == [[0.0], [0.0] * 3]
    assert load(hf_folder).score([], []) == [] and told == []


def test_rows_are_told_batch_by_batch_and_what_is_raised_ends_it(hf_folder: Path) -> None:
    told: list[int] = []
    ranker = load(hf_folder, max_tokens=200)
    ranker.score(PROMPTS, CANDIDATES, on_rows=told.append)
    assert sum(told) == num_rows(CANDIDATES) and len(told) > 3
    told.clear()

    def enough(rows: int) -> None:
        told.append(rows)
        if len(told) == 2:
            raise Stopped("enough")

    with pytest.raises(Stopped, match="enough"):
        ranker.score(PROMPTS, CANDIDATES, on_rows=enough)
    assert len(told) == 2


@pytest.mark.parametrize(("dtype", "within"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)], ids=str)
def test_other_dtypes_are_near(dtype: torch.dtype, within: float, hf_folder: Path) -> None:
    expected = load(hf_folder).score(PROMPTS, CANDIDATES)
    assert close(load(hf_folder, dtype=dtype).score(PROMPTS, CANDIDATES), expected, within)


def test_fp32_is_that_near_to_fp64(hf_folder: Path) -> None:
    expected = load(hf_folder, dtype=torch.float64).score(PROMPTS, CANDIDATES)
    assert close(load(hf_folder).score(PROMPTS, CANDIDATES), expected)


@pytest.mark.parametrize("odd", ["", "\ud800", "\x00", "<|source|>", "[SEP]", " "], ids=ascii)
def test_odd_texts_have_scores(odd: str, hf_folder: Path) -> None:
    (scores,) = load(hf_folder).score([odd], [[odd, "how", odd + "so"]])
    assert all(map(math.isfinite, scores))


def test_a_text_of_a_million_characters_takes_seconds(hf_folder: Path) -> None:
    ranker, begin = load(hf_folder), time.process_time()
    found = ranker.compare(["how did she look " * 60], [("x" * 1_000_000, "so")])
    assert all(map(math.isfinite, found))
    assert time.process_time() - begin < 30  # in fact about one; in quadratic time it would be days


def test_nan_weights_are_nan_scores(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(hf_folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["head_layer.4.weight"][0, 3] = math.nan
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    first, second = load(folder).score(["a", "b"], [["x", "y"], ["y", "y"]])
    assert all(map(math.isnan, first)) and second == [0.0, 0.0]


@pytest.mark.parametrize("candidates", [[["a"], []], [["a"]]], ids=str)
def test_prompts_without_candidates_are_a_callers_mistake(candidates: list[list[str]], hf_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected one list for each prompt"):
        load(hf_folder).score(["p", "q"], candidates)


def test_a_batch_without_room_is_a_callers_mistake(hf_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 0; expected 1 or more"):
        load(hf_folder, max_tokens=0)


def test_states_are_those_of_transformers(hf_folder: Path) -> None:
    """At every place, with padding and without; 1200 tokens reach the furthest relative positions."""
    encoder: PairEncoder = load(hf_folder).encoder
    model = encoder.pretrained_model
    positions = project_positions(model)
    ids = torch.randint(4, 250, (2, 1200), generator=torch.Generator().manual_seed(0))
    for lengths in ([1200, 1200], [1200, 700]):
        mask = torch.arange(1200) < torch.tensor(lengths)[:, None]
        places = torch.arange(0, 700, 7).repeat(2, 1)
        with torch.inference_mode():
            found = states_at(model, positions, ids, torch.tensor(lengths), places)
            expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(found, expected[:, 0:700:7], atol=2e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_float16_scores_are_near_and_ranks_are_kept(hf_folder: Path) -> None:
    expected = load(hf_folder).score(PROMPTS, CANDIDATES)
    found = load(hf_folder, dtype=torch.float16, device="cuda").score(PROMPTS, CANDIDATES)
    assert close(found, expected, 0.01)
    for ours, theirs in zip(found, expected, strict=True):
        clear = [(i, j) for i in range(len(theirs)) for j in range(len(theirs)) if theirs[i] > theirs[j] + 0.02]
        assert all(ours[i] > ours[j] for i, j in clear)
