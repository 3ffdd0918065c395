"""The reference cache: computed once, used only where it fits, never used where it is damaged."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import selm_fast
from selm_fast import ops
from selm_fast.config import Config
from selm_fast.data.packing import Plan, plan_epoch
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.errors import Refused, RunFailed, Stopped
from selm_fast.model import Policy
from selm_fast.training import cache_identity as identity_module
from selm_fast.training import reference_cache, storage
from selm_fast.training.cache_identity import cache_identity
from selm_fast.training.digest import weights_digest
from selm_fast.training.masters import Masters
from selm_fast.training.reference_cache import OTHER_PLAN_TOLERANCE, ReferenceCache, ReferenceLogps
from selm_fast.training.signals import StopFlag

from .harness import (
    ALONE,
    TEMPLATE,
    WORDS,
    MakeConfig,
    assert_same_run,
    groups_of,
    make_rows,
    own_logp,
    own_model,
    run,
    same_bits,
    write_model,
    write_tokenizer,
)

ROWS = make_rows(12, seed=21, duplicates=3)
Keys = list[tuple[bytes, ...]]


# Through whole runs.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_run_makes_no_reference_forward(
    make_config: MakeConfig, eval_file: str, reference_forwards: Keys, dtype: str
) -> None:
    config = make_config("one", dtype=dtype, data__eval=eval_file)
    run(config, ROWS)
    packs = len(reference_forwards)
    assert packs >= 6
    second = make_config("two", dtype=dtype, data__eval=eval_file)
    run(second, ROWS)
    assert len(reference_forwards) == packs
    assert_same_run(config.output_dir, second.output_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__lr": 3e-4, "optim__schedule": "linear", "optim__warmup": 0.5, "optim__weight_decay": 0.1},
        {"beta": 0.7, "label_smoothing": 0.1, "alpha": 0.3},
        {"method": "xpo"},
        {"epochs": 2, "log__every": 2, "checkpoint__every": 1, "eval_every": 1},
        {"head_mode": "recompute", "model__activation_checkpointing": "full"},
        {"seed": 7, "batch__shuffle": False},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_cannot_change_a_value_keeps_the_cache(
    make_config: MakeConfig, reference_forwards: Keys, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    shuffle = {"batch__shuffle": False} if "seed" in changes else {}  # with no shuffle, a seed changes nothing
    run(make_config("one", **shuffle), ROWS)
    reference_forwards.clear()
    trace = run(make_config("two", **changes), ROWS)
    assert not reference_forwards
    assert not caplog.records
    assert trace.steps[0]["loss"] == math.log(2)


@pytest.mark.parametrize(
    "changes", [{"batch__groups": 3}, {"batch__max_tokens": 200}, {"batch__shuffle": False}, {"seed": 3}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_plan_uses_the_values_with_a_warning(
    make_config: MakeConfig,
    reference_forwards: Keys,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    changes: dict[str, Any],
) -> None:
    run(make_config("one", dtype=dtype), ROWS)
    reference_forwards.clear()
    trace = run(make_config("two", dtype=dtype, **changes), ROWS)
    assert not reference_forwards
    assert "made under another plan" in caplog.text
    first = trace.steps[0]
    tolerance = OTHER_PLAN_TOLERANCE[dtype]
    assert f"{tolerance:g}" in caplog.text
    logp = max(abs(first["logps/chosen"]), abs(first["logps/rejected"]))
    assert abs(first["rewards/chosen"]) <= 0.1 * tolerance * logp * 2
    assert first["loss"] == pytest.approx(math.log(2), abs=0.1 * tolerance * logp * 2)


def test_the_exploration_term_being_dropped_is_another_plan(make_config: MakeConfig, reference_forwards: Keys) -> None:
    """DPO needs a part of the sequences that SELM needs: no forward. The other way about, all are computed."""
    run(make_config("selm"), ROWS)
    reference_forwards.clear()
    run(make_config("dpo", method="dpo", alpha=0.0), ROWS)
    assert not reference_forwards
    run(make_config("dpo-first", method="dpo", alpha=0.0, cache__dir=make_config().cache.dir / "x"), ROWS)
    reference_forwards.clear()
    trace = run(make_config("selm-second", cache__dir=make_config().cache.dir / "x"), ROWS)
    assert reference_forwards
    assert trace.steps[0]["loss"] == math.log(2)


def test_other_rows_are_computed(make_config: MakeConfig, reference_forwards: Keys) -> None:
    run(make_config("one"), ROWS)
    reference_forwards.clear()
    trace = run(make_config("two"), ROWS[:-4] + make_rows(1, seed=5))
    assert reference_forwards
    assert trace.steps[0]["loss"] == math.log(2)


def test_hazard_13_a_required_cache_that_is_not_there_is_refused(
    make_config: MakeConfig, reference_forwards: Keys
) -> None:
    config = make_config("one", cache__require=True)
    with pytest.raises(Refused, match="cache.require is set and .* there is no other cache beside it"):
        run(config, ROWS)
    assert not reference_forwards
    run(make_config("two"), ROWS)
    reference_forwards.clear()
    run(config, ROWS)
    assert not reference_forwards


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"data__max_length": 60}, "max_length: 64 there, 60 here"),
        ({"data__max_prompt_length": 30}, "max_prompt_length: 40 there, 30 here"),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 here"),
    ],
    ids=["max_length", "max_prompt_length", "dtype"],
)
def test_hazard_13_a_required_cache_of_other_settings_is_refused_with_the_difference(
    make_config: MakeConfig, reference_forwards: Keys, changes: dict[str, Any], difference: str
) -> None:
    run(make_config("one"), ROWS)
    reference_forwards.clear()
    config = make_config("two", cache__require=True, **changes)
    with pytest.raises(Refused, match=difference):
        run(config, ROWS)
    assert not reference_forwards
    assert not (config.output_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["weights", "tokenizer", "template"])
def test_hazard_13_another_model_tokenizer_or_template(
    make_config: MakeConfig, reference_forwards: Keys, tmp_path: Path, what: str
) -> None:
    model = write_model(tmp_path / "changed", seed=1 if what == "weights" else 0)
    if what == "tokenizer":
        write_tokenizer(model, words=[*WORDS[:9], "never", "ever"])
    if what == "template":
        write_tokenizer(model, TEMPLATE.replace("<|{{", "<|user|><|{{"))
    run(make_config("one"), ROWS)
    with pytest.raises(Refused, match="weights: .* there" if what == "weights" else "tokenizer: .* there"):
        run(make_config("two", model__path=str(model), cache__require=True), ROWS)
    reference_forwards.clear()
    trace = run(make_config("two", model__path=str(model)), ROWS)
    assert reference_forwards
    assert trace.steps[0]["loss"] == math.log(2)


# The digest.


@pytest.fixture
def digest_of(make_config: MakeConfig) -> Callable[..., str]:
    """The name of the cache that a run with these settings uses."""

    def digest(**changes: Any) -> str:
        config = make_config(**changes)
        policy = Policy.from_pretrained(str(config.model.path))
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        masters = Masters(policy.model, dtype, dither_seed=config.seed if config.grid_dither else None).masters
        weights = weights_digest(masters, dtype)
        identity = cache_identity(config, policy, weights, load_tokenizer(str(config.tokenizer_source)), dtype)
        assert json.loads(storage.to_json(identity)) == identity  # it is compared after a round trip
        return ReferenceCache(config.cache.dir, identity).path.name

    return digest


def test_digest_is_that_of_the_same_settings_only(digest_of: Callable[..., str], tmp_path: Path) -> None:
    """Every setting that could change a value changes the name, and no two of them give the same one."""
    digests = {"as it is": digest_of()}
    for name, value in {
        "data__max_length": 63, "data__max_prompt_length": 39, "dtype": "bfloat16", "model__compile": True,
    }.items():  # fmt: skip
        digests[name] = digest_of(**{name: value})
    digests["masters moved in fp32"] = digest_of(grid_dither=True)
    digests["another seed moves them elsewhere"] = digest_of(grid_dither=True, seed=43)
    digests["weights"] = digest_of(model__path=str(write_model(tmp_path / "weights", seed=9)))
    digests["architecture"] = digest_of(model__path=str(write_model(tmp_path / "architecture", rms_norm_eps=1e-3)))
    changed = write_model(tmp_path / "tokenizer")
    write_tokenizer(changed, words=WORDS[:5])
    digests["tokenizer"] = digest_of(model__path=str(changed))
    changed = write_model(tmp_path / "template")
    write_tokenizer(changed, TEMPLATE + " ")
    digests["template"] = digest_of(model__path=str(changed))
    torch.set_num_threads(2)
    digests["threads"] = digest_of()
    torch.set_num_threads(1)
    # Not what `import transformers` finds here: transformers.processing_utils puts a second one in its place.
    for module in (selm_fast, torch, identity_module.transformers):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "__version__", "99.0.0")
            digests[f"version of {module.__name__}"] = digest_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "backends", lambda kind, attention: {"linear_logprob": "another"})
        digests["back end"] = digest_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "attention_backend", lambda self, dtype: "another")
        digests["attention"] = digest_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.extension, "library", lambda: "_C-another.so")
        digests["extension"] = digest_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
        digests["processor"] = digest_of()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    digests["precision of matmuls"] = digest_of()
    torch.set_float32_matmul_precision(before)
    assert len(set(digests.values())) == len(digests), digests


def test_digest_does_not_move_for_nothing(digest_of: Callable[..., str], tmp_path: Path) -> None:
    expected = digest_of()
    same_model = write_model(tmp_path / "a copy elsewhere")
    for changes in (
        {}, {"optim__lr": 1.0}, {"beta": 9.0}, {"alpha": 1.0}, {"method": "xpo"}, {"epochs": 3}, {"seed": 1},
        {"batch__groups": 2}, {"batch__max_tokens": 999}, {"batch__shuffle": False}, {"log__every": 5},
        {"checkpoint__keep": 9}, {"eval_every": 1}, {"data__max_skipped": 0.5}, {"head_mode": "keep"},
        {"model__activation_checkpointing": "full"}, {"model__path": str(same_model)}, {"name": "elsewhere"},
    ):  # fmt: skip
        assert digest_of(**changes) == expected, changes
    # In bf16 the dither moves the masters alone.
    assert digest_of(dtype="bfloat16") == digest_of(dtype="bfloat16", grid_dither=True, seed=5)


# Damage.


class Small:
    """A cache of one plan in several shards, filled without a run."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.policy = Policy.from_pretrained(str(config.model.path))
        groups = groups_of(config, ROWS)
        self.plan = plan_epoch(groups, groups_per_step=4, max_tokens=120, seed=0)
        self.other_plan = plan_epoch(groups, groups_per_step=6, max_tokens=200, seed=1)
        self.cache = ReferenceCache(folder, {"model": "tiny", "dtype": "float32"})
        self.forwards = 0
        sequence_logps = self.policy.sequence_logps

        def counted(batch: Any) -> Tensor:
            self.forwards += 1
            return sequence_logps(batch)

        self.policy.sequence_logps = counted  # type: ignore[method-assign]

    def fill(self, plan: Plan | None = None, stop: StopFlag | None = None) -> ReferenceLogps:
        return self.cache.fill(plan or self.plan, self.policy, world=ALONE, stop=stop or StopFlag())

    @property
    def manifest(self) -> Path:
        return self.cache.path / "manifest.json"

    @property
    def shards(self) -> list[Path]:
        return sorted(self.cache.path.glob("shard-*"))

    def packs(self, plan: Plan | None = None) -> int:
        return sum(map(len, (plan or self.plan).steps))

    def rewrite(self, shard: Path, tensors: dict[str, Tensor]) -> None:
        """Put other tensors into a shard, hashes and all, as a program that writes nonsense would."""
        data = safetensors.torch.save(tensors)
        shard.write_bytes(data)
        manifest = json.loads(self.manifest.read_bytes())
        del manifest["sha256"]
        for entry in manifest["passes"].values():
            for known in entry["shards"]:
                if known["file"] == shard.name:
                    known["sha256"] = hashlib.sha256(data).hexdigest()
        own = hashlib.sha256(storage.to_json(manifest)).hexdigest()
        self.manifest.write_bytes(storage.to_json(manifest | {"sha256": own}))


@pytest.fixture
def small(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(reference_cache, "SHARD_SEQUENCES", 8)
    return Small(make_config(), tmp_path / "small")


def assert_rebuilt(small: Small, expected: ReferenceLogps, caplog: pytest.LogCaptureFixture) -> None:
    """The damage is warned of and not used; what is rebuilt is as before, and is found again."""
    assert small.cache.find(small.plan) is None
    assert "rebuilding" in caplog.text
    assert_equal_values(small.fill(), expected)
    caplog.clear()
    found = small.cache.find(small.plan)
    assert found is not None
    assert_equal_values(found, expected)
    assert not caplog.records


def assert_equal_values(found: ReferenceLogps, expected: ReferenceLogps) -> None:
    assert found.by_key == expected.by_key
    assert found.packs is not None
    assert expected.packs is not None
    assert len(found.packs) == len(expected.packs)
    assert all(same_bits(one, other) for one, other in zip(found.packs, expected.packs, strict=True))


def test_values_are_the_models_own_log_probs(small: Small, make_config: MakeConfig) -> None:
    values = small.fill()
    model = own_model(str(make_config().model.path), torch.float64)
    index = 0
    for step in range(len(small.plan.steps)):
        for batch in small.plan.batches(step):
            groups = [small.plan.groups[i] for i in batch.row_ids]
            with torch.no_grad():
                own = [own_logp(model, group.prompt, y).item() for group in groups for y in group.responses()]
            assert values.of(batch, index).tolist() == pytest.approx(own, rel=1e-5)
            assert values.of(batch).tolist() == pytest.approx(own, rel=1e-5)
            index += 1
    assert index == small.packs()


def test_found_values_are_those_computed(small: Small) -> None:
    computed = small.fill()
    assert small.forwards == small.packs()
    found = small.cache.find(small.plan)
    assert found is not None
    assert_equal_values(found, computed)
    assert len(small.shards) >= 3


def test_nothing_is_found_in_an_empty_folder(small: Small) -> None:
    assert small.cache.find(small.plan) is None
    assert not small.cache.path.exists()


def test_a_stopped_pass_goes_on_by_shard(small: Small) -> None:
    """Stopped after each pack in turn: nothing is computed twice."""
    stop = StopFlag()
    stop.requested = True
    for done in range(1, small.packs() + 1):
        with pytest.raises(Stopped, match=f"{done} of {small.packs()} packs are saved"):
            small.fill(stop=stop)
        assert small.forwards == done
        assert small.cache.find(small.plan) is None
    values = small.fill()
    assert small.forwards == small.packs()
    fresh = ReferenceCache(small.cache.folder / "fresh", small.cache.identity)
    assert_equal_values(values, fresh.fill(small.plan, small.policy, world=ALONE, stop=StopFlag()))


def test_a_killed_pass_loses_less_than_a_shard(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence_logps = small.policy.sequence_logps

    def dies(batch: Any) -> Tensor:
        if small.forwards == small.packs() - 1:
            raise KeyboardInterrupt
        return sequence_logps(batch)

    small.policy.sequence_logps = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        small.fill()
    small.policy.sequence_logps = sequence_logps  # type: ignore[method-assign]
    assert len(small.shards) >= 2
    saved = sum(len(safetensors.torch.load(path.read_bytes())["pack_sizes"]) for path in small.shards)
    assert 0 < saved < small.packs()
    small.forwards = 0
    small.fill()
    assert small.forwards == small.packs() - saved


def test_a_stopped_pass_is_gone_on_with_even_where_another_plan_could_serve(
    small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    """The resumed run must end as the uninterrupted one, to the bit: other values will not do."""
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(Stopped):
        small.fill(stop=stop)
    small.fill(small.other_plan)
    assert small.cache.find(small.plan) is None
    small.forwards = 0
    small.fill()
    assert small.forwards == small.packs() - 1
    assert not caplog.records


def test_two_plans_live_side_by_side(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    first, second = small.fill(), small.fill(small.other_plan)
    for plan, values in ((small.plan, first), (small.other_plan, second)):
        found = small.cache.find(plan)
        assert found is not None
        assert_equal_values(found, values)
    assert not caplog.records


def test_another_plan_finds_the_values_by_key(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    computed = small.fill()
    found = small.cache.find(small.other_plan)
    assert found is not None
    assert found.packs is None
    assert "another plan" in caplog.text
    batch = next(iter(small.other_plan.batches(0)))
    assert found.of(batch, 0).tolist() == [computed.by_key[key] for key in batch.sequence_keys]
    with torch.no_grad():
        own = small.policy.sequence_logps(batch)
    assert ((found.of(batch) - own).abs() <= OTHER_PLAN_TOLERANCE["float32"] * own.abs()).all()


def test_another_plan_is_not_served_by_a_part_of_its_sequences(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    part = Plan(small.plan.groups, small.plan.steps[:-1])
    small.fill(part)
    assert small.cache.find(small.plan) is None
    assert not caplog.records


def test_hazard_14_bit_flips_anywhere_in_a_shard(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    expected = small.fill()
    rng = random.Random(0)
    for shard in small.shards:
        data = shard.read_bytes()
        for offset in [0, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(25))]:
            flipped = bytearray(data)
            flipped[offset] ^= 1 << rng.randrange(8)
            shard.write_bytes(flipped)
            caplog.clear()
            assert small.cache.find(small.plan) is None, (shard.name, offset)
            assert "truncated or changed" in caplog.text
            assert small.cache.find(small.other_plan) is None, (shard.name, offset)  # nor for another plan
        assert_rebuilt(small, expected, caplog)


def test_hazard_14_bit_flips_anywhere_in_the_manifest(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """A flip is found, or it lies in the white space and changes nothing; nothing else happens."""
    expected = small.fill()
    data = small.manifest.read_bytes()
    meaning = json.loads(data)
    rng = random.Random(0)
    found_out = 0
    for offset in [0, len(data) - 2, *(rng.randrange(len(data)) for _ in range(150))]:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << rng.randrange(8)
        small.manifest.write_bytes(flipped)
        try:
            harmless = json.loads(flipped) == meaning
        except ValueError:
            harmless = False
        caplog.clear()
        for plan in (small.plan, small.other_plan):
            found = small.cache.find(plan)
            assert (found is not None) == harmless, (offset, bytes(flipped))
        if harmless:
            continue
        found_out += 1
        assert "rebuilding" in caplog.text
    assert found_out > 100
    small.manifest.write_bytes(data[: len(data) // 2])
    assert_rebuilt(small, expected, caplog)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b'"text"', b"{}", b'{"sha256": 1}', b"\xff\xfe"], ids=repr
)
def test_hazard_14_a_manifest_that_is_something_else(
    small: Small, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    expected = small.fill()
    small.manifest.write_bytes(content)
    assert_rebuilt(small, expected, caplog)


def test_hazard_14_truncated_and_missing_shards(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    expected = small.fill()
    for shard in small.shards:
        data = shard.read_bytes()
        for length in (0, 1, 7, 8, len(data) // 2, len(data) - 1):
            shard.write_bytes(data[:length])
            caplog.clear()
            assert small.cache.find(small.plan) is None
            assert "truncated or changed" in caplog.text
        assert_rebuilt(small, expected, caplog)
        shard.unlink()
        caplog.clear()
        assert_rebuilt(small, expected, caplog)


def test_hazard_14_shards_before_the_damaged_one_are_kept(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    expected = small.fill()
    sizes = [len(safetensors.torch.load(path.read_bytes())["pack_sizes"]) for path in small.shards]
    small.shards[1].unlink()
    small.forwards = 0
    assert_rebuilt(small, expected, caplog)
    assert small.forwards == sum(sizes[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-9, 3.0])
def test_hazard_14_values_that_are_no_log_probs(small: Small, caplog: pytest.LogCaptureFixture, value: float) -> None:
    expected = small.fill()
    shard = small.shards[1]
    tensors = safetensors.torch.load(shard.read_bytes())
    tensors["logps"][-1] = value
    small.rewrite(shard, tensors)
    assert small.cache.find(small.other_plan) is None
    assert_rebuilt(small, expected, caplog)


@pytest.mark.parametrize("damage", ["last sequence gone", "keys swapped", "sizes wrong", "no sizes", "other key"])
def test_hazard_14_shards_that_are_well_written_and_wrong(
    small: Small, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = small.fill()
    shard = small.shards[1]
    tensors = safetensors.torch.load(shard.read_bytes())
    if damage == "last sequence gone":
        tensors = {
            "keys": tensors["keys"][:-1].clone(),
            "logps": tensors["logps"][:-1].clone(),
            "pack_sizes": tensors["pack_sizes"],
        }
        tensors["pack_sizes"][-1] -= 1
    elif damage == "keys swapped":
        tensors["keys"] = tensors["keys"].flip(0).contiguous()
    elif damage == "sizes wrong":
        tensors["pack_sizes"][0] += 1
    elif damage == "no sizes":
        del tensors["pack_sizes"]
    else:
        tensors["keys"][0, 0] ^= 1
    small.rewrite(shard, tensors)
    assert_rebuilt(small, expected, caplog)


def test_hazard_14_a_damaged_cache_is_no_cache_where_it_is_required(
    make_config: MakeConfig, reference_forwards: Keys
) -> None:
    config = make_config("one")
    run(config, ROWS)
    shard = next(config.cache.dir.glob("*/shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    reference_forwards.clear()
    with pytest.raises(Refused, match="does not hold every reference log-prob"):
        run(make_config("two", cache__require=True), ROWS)
    assert not reference_forwards


def test_hazard_14_a_damaged_cache_changes_no_run(
    make_config: MakeConfig, reference_forwards: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("one")
    run(config, ROWS)
    shard = next(config.cache.dir.glob("*/shard-*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    reference_forwards.clear()
    second = make_config("two")
    run(second, ROWS)
    assert reference_forwards
    assert "rebuilding" in caplog.text
    assert_same_run(config.output_dir, second.output_dir)


def test_hazard_14_links_are_not_followed(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    expected = small.fill()
    shard = small.shards[0]
    elsewhere = shard.rename(small.cache.folder / "elsewhere")
    shard.symlink_to(elsewhere)
    assert_rebuilt(small, expected, caplog)
    assert not shard.is_symlink()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_a_reference_that_gives_no_log_probs_ends_the_run(small: Small, value: float) -> None:
    sequence_logps = small.policy.sequence_logps

    def broken(batch: Any) -> Tensor:
        values = sequence_logps(batch)
        values[0] = value
        return values

    small.policy.sequence_logps = broken  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"the reference model gives rows \[.*\] a log-prob of"):
        small.fill()
    assert small.cache.find(small.plan) is None
