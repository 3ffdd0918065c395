"""The field: every contestant, from the plainest to this package's best."""

from __future__ import annotations

import importlib.util

from benchmarks.train.contestant import Contestant

PLAIN, TRL_DPO, TRL_SELM = "plain torch SELM", "TRL DPO", "TRL SELM"
CACHED_DPO, CACHED_SELM = "TRL DPO, cached", "TRL SELM, cached, kept"
OURS, OURS_DPO, COMPILED = "selm_fast", "selm_fast DPO", "selm_fast, compiled"
GEMMS, LINEAR_GEMMS = "bare GEMMs", "bare GEMMs without attention"
PROFILED = (OURS, TRL_SELM)  # take a step more, under a profiler
SPRINTERS = (OURS, GEMMS)  # so short, and so alike, that their ratio needs more rounds
SPRINT = 6  # times as many
YARDSTICK = {"selm": PLAIN, "dpo": TRL_DPO}  # what the losses of a method are held against
RUNGS = ("head on response rows only", "shared prefix", "aliases", "cached reference", "fused kernels")


def contestants() -> list[Contestant]:
    """All that take part, in the order of the table."""
    return [
        Contestant(
            name=PLAIN, what="padded, three sequences, policy and reference each step, whole logits",
            module="benchmarks.train.padded", function="run", method="selm", ours=False,
        ),
        _trl(TRL_SELM, "subclass of DPOTrainer, its default settings", "selm"),
        _trl(
            CACHED_SELM, "the same, cached reference, no checkpointing", "selm", cached=True, checkpointing=False
        ),
        _trl(TRL_DPO, "its default settings: reference each step, checkpointing", "dpo"),
        _trl(CACHED_DPO, "cached reference", "dpo", cached=True),
        _trl(
            "TRL DPO, cached, kept", "cached reference, no checkpointing", "dpo", cached=True, checkpointing=False
        ),
        _trl(
            "TRL DPO, cached, kept, sorted", "the same, sorted by length", "dpo", cached=True, checkpointing=False,
            sorted_by_length=True,
        ),
        *ladder(),
        _own(OURS, "`train` with its defaults", "selm"),
        _own(COMPILED, "the same with model.compile", "selm", compiled=True),
        _own(OURS_DPO, "`train` with method dpo", "dpo"),
    ]  # fmt: skip


def ladder() -> list[Contestant]:
    """This package's features switched on one by one, in a bare loop."""
    return [
        Contestant(
            name="packing" if count == 0 else f"+ {RUNGS[count - 1]}", what="bare loop of this package's parts",
            module="benchmarks.train.ladder", function="run", method="selm", ours=True,
            options={"rungs": RUNGS[:count]},
        )
        for count in range(len(RUNGS) + 1)
    ]  # fmt: skip


def yardsticks() -> list[Contestant]:
    """No trainers: the products that a step of `selm_fast` cannot do without."""
    return [
        Contestant(
            name=name, what="torch.mm on the rows that selm_fast packs", module="benchmarks.train.gemms",
            function="run", method="selm", ours=False, options={"method": "selm", "attention": attention},
        )
        for name, attention in ((GEMMS, True), (LINEAR_GEMMS, False))
    ]  # fmt: skip


def missing(contestant: Contestant) -> str | None:
    """Why a contestant cannot take part here, or None."""
    wants = {"benchmarks.train.trl_peer": ("trl", "datasets"), "benchmarks.train.own": ("pydantic", "rich")}
    absent = [name for name in wants.get(contestant.module, ()) if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _trl(
    name: str, what: str, method: str, *, cached: bool = False, checkpointing: bool = True,
    sorted_by_length: bool = False,
) -> Contestant:  # fmt: skip
    return Contestant(
        name=name, what=what, module="benchmarks.train.trl_peer", function="run", method=method, ours=False,
        options={"method": method, "cached": cached, "checkpointing": checkpointing},
        sorted_by_length=sorted_by_length,
    )  # fmt: skip


def _own(name: str, what: str, method: str, *, compiled: bool = False) -> Contestant:
    return Contestant(
        name=name, what=what, module="benchmarks.train.own", function="run", method=method, ours=True,
        options={"method": method, "compiled": compiled}, warm_up=2 if compiled else 1, keeps_freed=True,
    )  # fmt: skip
