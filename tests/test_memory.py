"""The memory model: by hand, beside what torch allocates in a step, and for models that people train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks import memory_table, scaling_model
from selm_fast.batch import PackedBatch
from selm_fast.data.packing import pack
from selm_fast.memory import FILE, HEAD_TILE, Model
from selm_fast.memory import peak as peak_of
from selm_fast.model import Policy
from selm_fast.model.fused_layers import fuse
from selm_fast.ops import extension, head
from selm_fast.roofline import GroupLengths, Settings, Shape, Work
from selm_fast.training import storage
from selm_fast.training.masters import Masters
from tests.step_cases import TINY, policy, reference_of, some_groups, work_of
from tests.training.ranks import in_ranks

LLAMA = Shape.from_config(scaling_model.LLAMA_3_8B)


def kept_bytes(layers: int, dtype: torch.dtype, again: str, fused: bool) -> tuple[int, int]:
    """What a forward pass leaves for the backward pass, weights aside, and the tokens of the batch."""
    made = policy(num_hidden_layers=layers)
    made.to(dtype)
    if fused:
        fuse(made.model)
    if again != "none":
        made.checkpoint_activations(again)
    (batch,) = pack(some_groups(3))
    weights = {weight.untyped_storage().data_ptr() for weight in made.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = made(batch, reference_of(batch), beta=0.1)
    assert loss.requires_grad
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
    return sum(sizes), batch.tokens.shape[0]


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("again", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_model_says_to_the_byte(dtype: torch.dtype, again: Any, fused: bool) -> None:
    if fused and not extension.available():
        pytest.skip("nothing is fused without the extension")
    (three, tokens), (two, _) = kept_bytes(3, dtype, again, fused), kept_bytes(2, dtype, again, fused)
    work = Work(tokens=tokens, head_rows=0, pairs=0, keys=0, groups=1)
    how = Settings(checkpointing=again, compute_bytes=dtype.itemsize)
    said = [
        Model(Shape.from_config(TINY | {"num_hidden_layers": layers}), fused=fused)
        .moments(work, how)["head"]
        .activations
        for layers in (3, 2)
    ]
    assert said[0] - said[1] == three - two


def peak_of_a_step(made: Policy, dtype: torch.dtype, batches: Sequence[PackedBatch]) -> int:
    """Peak bytes of torch's allocator in the second step: what stands before it and what comes on top."""
    masters = Masters(made.model, dtype)
    optimizer = torch.optim.AdamW(masters.masters.values(), lr=1e-6)

    def step() -> None:
        for batch in batches:
            made(batch, reference_of(batch), beta=0.1)[0].backward()
        torch.nn.utils.clip_grad_norm_(masters.masters.values(), 1.0)
        optimizer.step()
        masters.publish()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return peak_of_step(step, [*made.parameters(), *masters.masters.values(), *states])


def peak_of_step(step: Callable[[], None], tensors: Sequence[torch.Tensor]) -> int:
    """Peak bytes of torch's allocator while a step runs: of tensors that stand before it, and what comes on top."""
    standing = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events: Any = profile.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(standing.values())
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = {
    "activations": ({"num_hidden_layers": 8, "intermediate_size": 256}, "recompute", 12),
    "logits": ({"vocab_size": 8000}, "keep", 6),
    "weights": ({"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000}, "recompute", 2),
}
DTYPES = [torch.float32, torch.bfloat16]


def peak_to_model(case: str, dtype: torch.dtype, again: Any) -> float:
    """Measured by said. What is said leaves out copies that a loss, a norm and the optimiser make, and that not all
    parts peak at once."""
    changes, mode, count = CASES[case]
    made = policy(mode=mode, **changes)
    if again == "full":
        made.checkpoint_activations()
    batches = [pack(some_groups(count))[0] for _ in range(2)]
    peak = peak_of_a_step(made, dtype, batches)
    how = Settings(checkpointing=again, head=mode, compute_bytes=dtype.itemsize, micro_batches=2)
    shape = Shape.from_config(TINY | changes)
    tile = tile_of(changes, batches[0])
    return peak / peak_of(Model(shape, head_tile=tile).moments(work_of(batches), how))[1].total


def tile_of(changes: dict[str, Any], batch: PackedBatch) -> tuple[int, int]:
    vocab = (TINY | changes)["vocab_size"]
    return min(head.TILE_ROWS["cpu"], batch.targets.shape[0]), min(head.TILE_VOCAB["cpu"], vocab)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A rank's own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build with CUDA starts its tracing of GPUs, too")
@pytest.mark.parametrize("again", ["none", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_step_is_what_the_model_says(case: str, dtype: torch.dtype, again: Any) -> None:
    if dtype == torch.bfloat16 and not extension.mm_serves(dtype):
        pytest.skip("without the extension the head's matmuls have copies of their own")
    assert 0.9 < peak_to_model(case, dtype, again) < 1.05


def test_the_tile_is_the_head_s() -> None:
    assert (head.TILE_ROWS["cuda"], head.TILE_VOCAB["cuda"]) == HEAD_TILE


def test_alone_on_a_cpu_by_hand() -> None:
    work = Work.of([GroupLengths(223, (345, 345, 345))] * 16)
    whole = Model(LLAMA)
    kept = whole.moments(work, Settings(checkpointing="full", head="recompute"))
    for memory in kept.values():
        assert memory.weights + memory.masters + memory.moments == 14 * LLAMA.weights
        assert memory.gradients == 4 * LLAMA.weights
    assert kept["head"].head == 6 * LLAMA.head  # the newest gradient and its fp32 copy outweigh the tiles
    assert Model(LLAMA, moment_bytes=2).moments(work, Settings())["head"].moments == 4 * LLAMA.weights
    fp32 = whole.moments(work, Settings(compute_bytes=4))["head"]
    assert (fp32.weights, fp32.masters) == (0, 4 * LLAMA.weights)
    tiles = 2 * work.head_rows * 128_256 + 6 * (4096 * 6144 + work.head_rows * 4096) + 4 * 6144 * 4096
    assert whole.moments(work, Settings(head="keep"))["head"].head == 2 * LLAMA.head + tiles
    sizes = [
        whole.moments(work, Settings(checkpointing=again))["last layer"].activations
        for again in ("full", "selective", "none")
    ]
    everything = 2 * (4 * 4096 + 2 * 5120 + 4 * 14336) + 4 * (2 * 4096 + 2 + 32)
    outputs = 2 * (3 * 4096 + 2 * 5120 + 2 * 14336) + 4 * 32  # of matmuls and attention
    ends = work.tokens * (3 * 2 + 4) * 4096 + 2 * work.head_rows * 4096
    assert sizes == [work.tokens * 32 * one + ends for one in (2 * 4096, outputs, everything)]
    assert kept["last layer"].attention == 4 * 2 * work.keys * 8 * 128  # keys, values and their gradients
    again = [
        whole.moments(work, Settings(checkpointing=how))["last layer"].layer / work.tokens - 2 * 14336
        for how in ("none", "selective", "full")
    ]
    assert again == [0, everything - outputs, everything]
    halves = whole.moments(work, Settings(checkpointing="full", head="recompute", micro_batches=2))
    assert halves["head"].activations == kept["head"].activations / 2


def test_sharded_by_hand() -> None:
    """Of torch's source: what `fully_shard` holds of a layer and of the root, at every moment."""
    work, how = Work.of([GroupLengths(223, (345, 345))] * 16), Settings(checkpointing="full", head="recompute")
    root = 2 * 128_256 * 4096 + 4096
    layer = (LLAMA.weights - root) / 32
    assert layer == 218_112_000
    for ranks, gathered in ((1, 1), (8, 2 + 1 / 8)):
        found = Model(LLAMA, ranks, runtime=7).moments(work, how)
        for memory in found.values():
            assert memory.weights == 0
            assert memory.masters == memory.gradients == memory.moments / 2 == 4 * LLAMA.weights / ranks
            assert memory.runtime == 7
        assert found["last layer"].gathered == found["next layer"].gathered == 2 * (root + gathered * layer)
        prefetched = 2 * (root + (0 if ranks == 1 else gathered - 1) * layer)
        assert found["head"].gathered == found["reduction"].gathered == prefetched
        assert [memory.reduced for memory in found.values()] == [
            0, 0, 4 * layer, 4 * layer * (1 + 1 / ranks), root * (2 + 4 + 4 / ranks),
        ]  # fmt: skip
        activations = [memory.activations for memory in found.values()]
        assert activations[0] == activations[1] > activations[2] == activations[3]
        assert found["root"].activations == found["root"].gathered == 0
        assert found["last layer"].head == found["reduction"].head == 2 * LLAMA.head
        assert found["last layer"].layer == found["next layer"].layer > found["reduction"].layer == 2 * layer
    tied = Model(Shape.from_config(scaling_model.LLAMA_3_8B | {"tie_word_embeddings": True}), 1)
    assert tied.root == 128_256 * 4096 + 4096
    assert tied.layer == layer


def test_phases() -> None:
    work, how = Work.of([GroupLengths(223, (345, 345))] * 16), Settings(head="recompute")
    found = Model(LLAMA, 4).phases(work, how)
    assert list(found) == ["load", "reference pass", "step", "optimiser"]
    assert found["load"].masters == LLAMA.weights  # 4 bytes on each of 4
    assert found["load"].moments == found["reference pass"].gradients == found["reference pass"].moments == 0
    assert found["step"] == max(Model(LLAMA, 4).moments(work, how).values(), key=lambda memory: memory.total)
    assert found["optimiser"].total == 4 * LLAMA.weights
    assert found["step"].total > found["reference pass"].total
    assert peak_of(found) == ("step", found["step"])
    assert sum(found["step"].parts.values()) == found["step"].total


def test_the_page_holds_the_table() -> None:
    page = Path(__file__).resolve().parents[1] / "docs/memory.md"
    assert memory_table.table() in page.read_text("utf-8")


def test_the_host_s_memory() -> None:
    """Files of half a GiB, or of one tensor's part: twice each, on every rank; a small model's whole state."""
    assert Model(LLAMA, 8).host() == {"load": 8 * 4 * LLAMA.head, "checkpoint": 2 * 8 * 2**29}
    assert Model(LLAMA, 1).host()["checkpoint"] == 2 * 4 * LLAMA.head
    small = Shape.from_config(TINY)
    assert Model(small, 2).host()["checkpoint"] == 2 * 12 * small.weights
    assert Model(small, 2, moment_bytes=2).checkpoint_bytes() == 8 * small.weights
    assert FILE == storage.MAX_SHARD


@pytest.mark.parametrize("again", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_peak_of_a_sharded_step_is_what_the_model_says(ranks: int, again: Any, tmp_path: Path) -> None:
    """In fp32 over gloo: a CPU runs the code of torch that a GPU does, without its streams."""
    low, high = (0.9, 1.05) if ranks == 1 else (0.84, 1.12)
    for case in ("activations", "weights"):
        for ratio in in_ranks(ranks, lambda rank, case=case: sharded_to_model(case, ranks, again), tmp_path / case):
            assert low < ratio < high, (case, ratio)


def sharded_to_model(case: str, ranks: int, again: Any) -> float:
    """Measured by said, with FSDP as the trainer sets it up."""
    changes, mode, count = CASES[case]
    made = policy(mode=mode, **changes)
    if again == "full":
        made.checkpoint_activations()
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in made.layers():
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(made, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-6)
    batches = [pack(some_groups(count))[0] for _ in range(2)]

    def step() -> None:
        for batch in batches:
            made(batch, reference_of(batch), beta=0.1)[0].backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    # gloo frees its own copies in threads of its own, in some steps late.
    peak = min(peak_of_step(step, [local(tensor) for tensor in (*made.parameters(), *states)]) for _ in range(ranks))
    torch.distributed.destroy_process_group()
    how = Settings(checkpointing=again, head=mode, compute_bytes=4, micro_batches=2)
    model = Model(Shape.from_config(TINY | changes), ranks, head_tile=tile_of(changes, batches[0]))
    return peak / peak_of(model.moments(work_of(batches), how))[1].total
