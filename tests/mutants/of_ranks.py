"""Mutants of training in several processes: who has which rows, what is summed, what all agree on."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, mutants_of

SAME = "tests/training/test_ranks.py"
EXACT = SAME + " -k 'exact or in_bf16_too or unrounded'"
ONE = SAME + " -k trains_as_one"
CACHE = "tests/training/test_ranks_cache.py"
WORLD = "tests/training/test_world.py"
WEIGHTS = "tests/training/test_sharded_weights.py"
PLANS = "tests/data/test_packing.py"

RANKS: list[Mutant] = [
    *mutants_of(
        "selm_fast/model/sharding.py",
        SAME,
        ("gradients are averaged", "module.set_gradient_divide_factor(1.0)", "pass"),
        ("what comes in is cast", "cast_forward_inputs=False,", "cast_forward_inputs=True,"),
        ("gradients are reduced in bf16", "reduce_dtype=torch.float32", "reduce_dtype=torch.bfloat16"),
    ),
    *mutants_of(
        "selm_fast/model/sharding.py",
        WEIGHTS,
        ("rows are cut evenly", "chunk = -(-rows // mesh.size())", "chunk = max(1, rows // mesh.size())"),
        ("every shard begins at the top", "    return start\n", "    return 0\n"),
    ),
    *mutants_of(
        "selm_fast/training/masters.py",
        WEIGHTS,
        ("rows are taken for elements", "first=first_row(master) * columns", "first=first_row(master)"),
    ),
    *mutants_of(
        "selm_fast/training/optimizer.py",
        ONE,
        ("each clips by its own part", "return world.sum(torch.where(loss.isfinite(), square, torch.nan)).sqrt().float()", "return torch.where(loss.isfinite(), square, torch.nan).sqrt().float()"),
    ),
    *mutants_of(
        "selm_fast/training/digest.py",
        WEIGHTS,
        ("places are those of the shard", "first = first_row(weight) *", "first = 0 *"),
        ("the digest of a part", "        world.sum(sums)\n", "        pass\n"),
    ),
    *mutants_of(
        "selm_fast/data/packing.py",
        SAME,
        ("what stands in is a group", "sequence_keys=(), row_ids=(), pairs=pairs)", "sequence_keys=(), row_ids=())"),
        ("nothing stands in", "yield self._pack(members) if members else _dummy(self.groups)", "if members:\n                yield self._pack(members)"),
    ),
    *mutants_of(
        "selm_fast/data/packing.py",
        PLANS,
        ("unequally many packs", "balance(costs, max_tokens, multiple_of=ranks)", "balance(costs, max_tokens)"),
        ("neighbours as they come", "if ranks > 1:", "if False:"),
    ),
    *mutants_of(
        "selm_fast/training/loop.py",
        SAME,
        ("the wrong pack's reference values", "first + nth * world.size if epoch == 0", "first + nth if epoch == 0"),
    ),
    *mutants_of(
        "selm_fast/training/world.py",
        WORLD,
        ("each decides for itself", "dist.ReduceOp.MAX", "dist.ReduceOp.MIN"),
        ("padding is gathered too", "return [part[: int(length)] for", "return [part for"),
        ("nobody says that he noticed", 'self.store.set(f"noticed/{self.rank}", phase)', "pass"),
    ),
    *mutants_of(
        "selm_fast/training/reference_cache.py",
        CACHE,
        ("a pass of one rank", "for first in range(0, len(shards), ranks):\n            by_rank", "for first in range(0, len(shards)):\n            by_rank"),
        ("one stops alone", 'stopped = world.any(stop.requested, "reference pass")', "stopped = stop.requested"),
    ),
    *mutants_of(
        "selm_fast/training/run_train.py",
        WEIGHTS,
        ("two models at a time", "            gc.collect()", "            # gc.collect()"),
    ),
]  # fmt: skip
