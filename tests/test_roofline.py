"""The FLOP and byte model: by hand, beside torch's own counts, and against the published table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from benchmarks import scaling_model
from selm_fast.data.packing import pack
from selm_fast.roofline import (
    GroupLengths,
    Settings,
    Shape,
    Work,
    bound,
    flops,
    traffic,
    useful_flops,
)
from tests.step_cases import TINY, policy, some_groups, work_of

LLAMA = Shape.from_config(scaling_model.LLAMA_3_8B)
ROOT = Path(__file__).resolve().parents[1]


def test_the_published_table_comes_out() -> None:
    """Tokens a group, TFLOP a group and speed-up, to the digits that are printed there."""
    found = list(scaling_model.rows())
    first = found[0][2]
    assert [(round(tokens), round(needed / 1e12, 1), round(first / needed, 2)) for _, tokens, needed, _ in found] == [
        (2578, 194.1, 1.0),
        (1701, 127.3, 1.52),
        (1701, 125.6, 1.55),
        (1257, 94.5, 2.05),
        (1027, 76.9, 2.52),
        (1027, 63.1, 3.07),
    ]
    assert round(found[4][3], -2) == 13_200  # tokens/s of a GPU at 790 TFLOP/s, full checkpointing


def test_the_lengths_behind_it_are_what_is_said_of_them() -> None:
    groups = scaling_model.groups()
    responses = [length for group in groups for length in group.responses + group.repeated]
    assert len(groups) == 24
    assert sum(bool(group.repeated) for group in groups) == 16
    assert sum(group.prompt for group in groups) / 24 == 223
    assert round(sum(responses) / len(responses)) == 345
    assert len(responses) == 72
    assert all(set(group.repeated) <= set(group.responses) for group in groups)


def test_the_page_holds_the_table() -> None:
    assert scaling_model.table() in (ROOT / "docs/performance.md").read_text("utf-8")


def test_llama_3_8b() -> None:
    assert LLAMA.body == 6_979_321_856
    assert LLAMA.head == 525_336_576
    assert LLAMA.weights == 8_030_261_248
    assert LLAMA.pair_flops == 524_288


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen3Config])
def test_parameters_are_those_of_transformers(config: Any, tied: bool) -> None:
    made = config(**TINY | {"head_dim": 24, "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    shape = Shape.from_config(made.to_dict())
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    body = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() > 1 and name not in tables)
    assert shape.body == body
    assert shape.head == sizes["model.embed_tokens.weight"]
    norms = 2 * 24 * shape.layers if config is Qwen3Config else 0  # of queries and keys
    assert shape.weights + norms == sum(sizes.values())


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="lacks num_hidden_layers, vocab_size; expected that of a decoder"):
        Shape.from_config({**TINY, "vocab_size": None, "num_hidden_layers": 0})


lengths = st.integers(1, 12)
many_lengths = st.lists(
    st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=7
)


@given(many_lengths, st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_layouts_by_counting(drawn: list[tuple[int, list[int], bool]], batch: int) -> None:
    groups = [
        GroupLengths(prompt, tuple(responses), (responses[0],) if repeats else ())
        for prompt, responses, repeats in drawn
    ]
    everything = [(group, length) for group in groups for length in group.responses + group.repeated]
    widths = []
    for start in range(0, len(groups), batch):
        part = groups[start : start + batch]
        longest = max(group.prompt + length for group in part for length in group.responses)
        widths += [longest for group in part for _ in group.responses + group.repeated]
    unshared = [group.prompt - 1 + length for group, length in everything]

    padded = Work.of(groups, "padded", batch=batch)
    assert (padded.tokens, padded.head_rows, padded.keys) == (sum(widths),) * 3
    assert padded.pairs == sum(triangle(width) for width in widths)
    packed, response_head = Work.of(groups, "packed"), Work.of(groups, "response_head")
    assert (packed.tokens, packed.head_rows, packed.keys) == (sum(unshared),) * 3
    assert packed.pairs == sum(triangle(width) for width in unshared)
    assert response_head == replace(packed, head_rows=sum(length for _, length in everything))

    shared, aliases = Work.of(groups, "shared_prefix"), Work.of(groups)
    assert shared.tokens == sum(group.prompt - 1 + sum(group.responses + group.repeated) for group in groups)
    assert (shared.head_rows, shared.keys) == (response_head.head_rows, packed.keys)
    # Each response after the first saves the queries of prompt[:-1], and nothing else.
    saved = [(len(group.responses + group.repeated) - 1) * triangle(group.prompt - 1) for group in groups]
    assert packed.pairs - shared.pairs == sum(saved)
    assert aliases == Work.of([replace(group, repeated=()) for group in groups], "shared_prefix")
    assert {work.groups for work in (padded, packed, response_head, shared, aliases)} == {len(groups)}


def triangle(count: int) -> int:
    return sum(range(count + 1))


def test_aliases_are_the_packer_s_layout() -> None:
    groups = some_groups(7)
    (batch,) = pack(groups)
    counted = Work.of([GroupLengths.of(g.prompt, (g.chosen, g.rejected, g.explored)) for g in groups])
    assert counted == work_of([batch])
    assert counted.tokens == batch.tokens.shape[0]
    assert counted.keys == batch.kv_index.shape[0]
    ends = [(batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist())]
    masks = [
        torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).sum().item()
        for qs, ks in ends
        for q0, q1, k0, k1 in zip(qs, qs[1:], ks, ks[1:], strict=False)
    ]
    assert counted.pairs == sum(masks)
    assert GroupLengths.of([1], ([2], [3, 3], None)) == GroupLengths(1, (1, 2))
    assert GroupLengths.of([1], ([2], [3, 3], [2])) == GroupLengths(1, (1, 2), (1,))


def test_means_give_what_equal_groups_give() -> None:
    assert Work.of_means(5, 9, 7, 3) == Work.of([GroupLengths(9, (7, 7, 7))] * 5)
    assert Work.of_means(6, 9, 7, 2.5) == Work.of([GroupLengths(9, (7, 7, 7)), GroupLengths(9, (7, 7), (7,))] * 3)


@pytest.mark.parametrize("again, r", [("none", 0.0), ("selective", 0.05), ("full", 1.0)])
@pytest.mark.parametrize("mode, matmuls", [("keep", 3), ("recompute", 4)])
def test_flops_are_the_formula(again: Any, r: float, mode: Any, matmuls: int) -> None:
    work = Work(tokens=1000, head_rows=700, pairs=90_000, keys=1500, groups=2)
    needed = flops(LLAMA, work, Settings(checkpointing=again, head=mode, reference=True))
    body, scores, vocab = 2 * 6_979_321_856 * 1000, 524_288 * 90_000, 2 * 128_256 * 4096 * 700
    assert needed.reference == pytest.approx(body + scores + vocab, rel=1e-15)
    training = body * (3 + r) + scores * (3.5 + r) + vocab * matmuls
    assert needed.total - needed.reference == pytest.approx(training, rel=1e-14)
    assert needed.body.recompute == r * body
    alone = flops(LLAMA, work, Settings(checkpointing=again, head=mode))
    assert alone.total == pytest.approx(training, rel=1e-14)
    assert alone.reference == 0


def test_useful_flops_count_nothing_twice() -> None:
    work = Work(tokens=1000, head_rows=700, pairs=90_000, keys=1500, groups=2)
    once = 2 * LLAMA.body * 1000 + 524_288 * 90_000 + 2 * LLAMA.head * 700
    assert useful_flops(LLAMA, work) == 3 * once
    assert useful_flops(LLAMA, work, reference=True) == 4 * once
    assert useful_flops(LLAMA, work) < flops(LLAMA, work, Settings()).total


@pytest.mark.parametrize("again", ["none", "full"])
def test_body_flops_are_what_torch_counts(again: Any) -> None:
    made = policy()
    if again == "full":
        made.checkpoint_activations()
    (batch,) = pack(some_groups(3))
    with FlopCounterMode(display=False) as counter:
        made.hidden_states(batch).sum().backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    shape = Shape.from_config(made.model.config.to_dict())
    needed = flops(shape, work_of([batch]), Settings(checkpointing=again)).body
    # torch stops computing again at the last tensor that the backward pass wants: before a layer's last matmul.
    left_out = 2 * batch.tokens.shape[0] * shape.layers * shape.intermediate * shape.hidden if again == "full" else 0
    assert counts["aten.mm"] == needed.total - left_out


def test_bytes_moved_by_hand() -> None:
    shape = Shape.from_config(TINY | {"num_hidden_layers": 1})
    body, vocab = shape.body, shape.head
    work = Work(tokens=100, head_rows=60, pairs=0, keys=130, groups=4)
    ends = 4 * 64 + 2 * (64 + 32) + 3 * 112  # inputs and outputs of the seven matmuls, elements
    gathered = 2 * (100 * 64 + 130 * 32)

    moved = traffic(shape, work, Settings(compute_bytes=4))
    assert moved.body == 4 * (body * 3 + 3 * 100 * ends)
    assert moved.attention == 4 * 3 * gathered
    assert moved.head == 4 * (vocab * 3 + 3 * 60 * 64)
    assert moved.logits == 4 * 2 * 60 * 300
    assert moved.optimizer == 4 * 10 * shape.weights

    moved = traffic(
        shape,
        work,
        Settings(compute_bytes=2, checkpointing="full", head="recompute", reference=True, micro_batches=2),
    )
    gradient = 2 + 2 + (4 + 8) / 2  # written, read, put down the first time, added to what is there the second
    assert moved.body == 2 * body * (4 * 2 + gradient) + 5 * 2 * 100 * ends
    assert moved.attention == 5 * 2 * gathered
    assert moved.head == 2 * vocab * (4 * 2 + gradient) + 5 * 2 * 60 * 64
    assert moved.logits == 0
    assert moved.optimizer == (4 * 10 + 6) * shape.weights
    assert moved.total == moved.body + moved.attention + moved.head + moved.optimizer
    adding = traffic(shape, work, Settings(compute_bytes=4, micro_batches=2)).body
    assert adding == 2 * body * 4 * (3 + 3 / 2) + 4 * 3 * 100 * ends


def test_each_part_takes_the_longer_of_computing_and_moving() -> None:
    work = Work.of([GroupLengths(223, (345, 345))] * 64)
    needed, moved = flops(LLAMA, work, Settings()), traffic(LLAMA, work, Settings())
    fast = bound(needed, moved, peak=1e30, bandwidth=1e12)
    assert fast == {
        "body": moved.body / 1e12,
        "attention": moved.attention / 1e12,
        "head": (moved.head + moved.logits) / 1e12,
        "optimizer": moved.optimizer / 1e12,
    }
    slow = bound(needed, moved, peak=1e9, bandwidth=1e12)
    expected = {name: getattr(needed, name).total / 1e9 for name in ("body", "attention", "head")}
    assert slow == expected | {"optimizer": moved.optimizer / 1e12}
    h200 = bound(needed, moved, peak=790e12, bandwidth=4.3e12)
    assert h200["body"] == needed.body.total / 790e12  # matmuls of 57,000 tokens are no matter of bandwidth


def all_settings() -> Iterator[Settings]:
    for again, mode, reference in product(("none", "selective", "full"), ("keep", "recompute"), (False, True)):
        yield Settings(checkpointing=again, head=mode, reference=reference)


@pytest.mark.parametrize("how", list(all_settings()), ids=str)
def test_every_saving_saves(how: Settings) -> None:
    groups = scaling_model.groups()
    layouts = ("padded", "packed", "response_head", "shared_prefix", "aliases")
    totals = [flops(LLAMA, Work.of(groups, layout, batch=8), how).total for layout in layouts]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 5
    assert useful_flops(LLAMA, Work.of(groups), reference=how.reference) < totals[-1]


def test_it_is_arithmetic_alone() -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic"}
    code = f"import sys, selm_fast.memory, selm_fast.roofline; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
