"""`selm-fast estimate`: the memory and hours that training would take, from settings alone. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selm_fast.cli.recipe import read_recipe
from selm_fast.cli.schema import Setting
from selm_fast.cli.settings import load_config, load_run_config, split_arguments
from selm_fast.cli.shipped import find_recipe
from selm_fast.config import Config, RunConfig
from selm_fast.errors import Refused

if TYPE_CHECKING:
    from selm_fast.roofline import Shape, Work
    from selm_fast.training.room import Plan

GIB = 2**30
ASSUMED_GIB = 79.0  # of a GPU of 80 GB as torch sees it, where this machine has none
ASSUMED_TFLOPS = 790.0  # that a large bf16 matmul reaches on an H200


def _option(name: str, kind: str, bounds: str, description: str) -> Setting:
    return Setting(
        name=name, section="", kind=kind, is_path=False, choices=(), optional=False, bounds=(bounds,), default=None,
        description=description,
    )  # fmt: skip


OPTIONS = {
    option.name: option
    for option in (
        _option("nproc", "integer", "at least 1", "processes, one for each GPU (default: 1)"),
        _option("memory", "number", "greater than 0", "GiB of each GPU (default: this machine's, or 79)"),
        _option(
            "tflops", "number", "greater than 0",
            "1e12 FLOP/s of a large matmul on each GPU (default: measured on this machine's, or 790, an H200's)",
        ),
        _option("utilisation", "number", "greater than 0", "share of it that training reaches (default: 0.4)"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command line asks of `estimate`. memory: GiB.  None: found out or assumed."""

    config: Config
    nproc: int = 1
    memory: float | None = None
    tflops: float | None = None
    utilisation: float | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The groups that would be trained on. about: where their lengths are from.  count: 0 where it is not known."""

    group: Work
    about: str
    count: int


def estimate_arguments(arguments: Sequence[str]) -> Asked:
    """What `selm-fast estimate` was given: a recipe of `train` or `run`, settings, and its own options.

    Raises: Refused for what is not understood.
    """
    split = split_arguments(arguments, RunConfig, OPTIONS)
    path = None if split.recipe is None else find_recipe(split.recipe)
    flags = split.flags
    init = next((flag.partition("=")[2] for flag in flags if flag.startswith("--model.init=")), None)
    if init is not None and not any(flag.startswith("--model.tokenizer=") for flag in flags):
        flags = [*flags, f"--model.tokenizer={Path(init).parent}"]  # sizes are asked for, not ids
    own_of_run = set(RunConfig.model_fields) - set(Config.model_fields)
    config: Config
    if path is not None and own_of_run & set(read_recipe(path).values):
        config = load_run_config(path, flags).at(1)
    else:
        config = load_config(path, flags)
    values: dict[str, Any] = {name: OPTIONS[name].parse(text) for name, text in split.options.items()}
    for name, value in values.items():
        if not 0 < value < float("inf") or (name == "utilisation" and value > 1):
            expected = "a share, at most 1" if name == "utilisation" else OPTIONS[name].expected
            raise Refused(f"{name}: {value} was given, expected {expected} (command line)")
    return Asked(config, **values)


def estimate(asked: Asked) -> None:
    """Print memory by part and phase, whether it fits, and how long it takes.

    Raises: Refused where the model is not at hand, and where the plan does not fit; settings that would make it fit
    are named.
    """
    from selm_fast.training.room import Plan

    shape = _shape(asked.config)
    on_cpu = asked.config.device == "cpu"
    ranks = None if on_cpu and asked.nproc == 1 else asked.nproc
    rows = _rows(asked.config)
    plan = Plan(asked.config, shape, rows.group, ranks, "cpu" if on_cpu else "cuda")
    memory, origin = _memory(asked)
    place = f"{asked.nproc} {'process' if on_cpu else 'GPU'}{('es' if on_cpu else 's') * (asked.nproc != 1)}"
    print("Estimates, not measurements.")
    print(f"model: {shape.weights:,} parameters, {'bf16' if plan.compute_bytes == 2 else 'fp32'} compute")
    print(f"place: {place} of {memory:.1f} GiB each ({origin})")
    print(f"rows: {rows.about}")
    print(*_micro_batch(plan), "", *_table(plan), "", *_elsewhere(plan), *_speed(asked, plan, rows), sep="\n")
    _verdict(plan, memory, asked)


def _shape(config: Config) -> Shape:
    """The sizes of the model that would be trained, from its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from selm_fast.iteration.facts import on_disk
    from selm_fast.model.shape import shape_of

    if isinstance(config, RunConfig) and config.prepare is not None:
        raise Refused(
            "prepare makes this recipe's model: once it is there, estimate it as model.path without the recipe"
        )
    if config.model.path is None and config.model.init is None:
        raise Refused("model.path is not set: give the model, or model.init, a config.json")
    source = config.model.init or on_disk(str(config.model.assets))
    if source is None or not source.exists():
        raise Refused(
            f"{config.model.init or config.model.path} is not on this disk, and an estimate downloads nothing: "
            "give a folder with its config.json as model.path, or that file as model.init"
        )
    try:
        import torch

        found = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(found))
    except (OSError, ValueError) as error:
        raise Refused(f"{source} has no configuration of a causal language model: {error}") from error


def _rows(config: Config) -> Rows:
    """Lengths and number of the rows, where they are a file on this disk."""
    from selm_fast.data.sources import count_rows
    from selm_fast.iteration.facts import mean_lengths
    from selm_fast.training.room import EXPLORED, PROMPT, RESPONSE, assumed_group

    source = config.data.train
    if source is None or not Path(source).expanduser().is_file():
        group = assumed_group(config)
        why = "data.train is not set" if source is None else f"{source} is not a file on this disk"
        responses = f"{2 + EXPLORED:.2f}" if config.exploration_weight != 0 else "2"
        what = f"assumed to be like UltraFeedback's, for {why}: prompt {PROMPT:g}, response {RESPONSE:g} tokens"
        return Rows(group, f"{what}, {responses} responses, cut as data.max_length says", 0)
    tokenizer = config.tokenizer_source
    known = tokenizer is not None and any(
        (Path(tokenizer).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    count = count_rows(source)
    if count == 0:
        raise Refused(f"{source} has no rows")
    lengths = mean_lengths(source, count, tokenizer if known else None)
    group = assumed_group(config, lengths.prompt, lengths.response, lengths.responses)
    how = "" if known else ", taking 4 characters for a token, as no tokenizer is at hand"
    means = f"prompt {lengths.prompt:.0f}, response {lengths.response:.0f} tokens on average"
    return Rows(group, f"{count:,}, {means}{how}; {group.tokens:.0f} packed tokens a group", count)


def _memory(asked: Asked) -> tuple[float, str]:
    """GiB of each process's device, and where the number is from."""
    import torch

    from selm_fast.training.machine import memory_bytes

    if asked.memory is not None:
        return asked.memory, "as given"
    if asked.config.device == "cpu":
        return memory_bytes(torch.device("cpu")) / GIB / asked.nproc, "this machine's memory, shared"
    if torch.cuda.is_available():
        return memory_bytes(torch.device("cuda", 0)) / GIB, torch.cuda.get_device_name(0)
    return ASSUMED_GIB, "assumed, for this machine has no GPU; --memory says otherwise"


def _micro_batch(plan: Plan) -> Iterator[str]:
    work, settings = plan.micro_batch, plan.settings
    yield (
        f"micro-batch: {work.tokens:,.0f} tokens, {work.groups:.1f} groups; activation checkpointing "
        f"{settings.checkpointing}, head {settings.head}, moments {plan.config.optim.moments}"
    )


def _table(plan: Plan) -> Iterator[str]:
    """GiB of one device, by part and by phase."""
    phases = plan.phases
    yield "GiB of each".ljust(14) + "".join(phase.rjust(16) for phase in phases)
    for part in next(iter(phases.values())).parts:
        sizes = [memory.parts[part] for memory in phases.values()]
        if any(sizes):
            yield part.ljust(14) + "".join(f"{size / GIB:.2f}".rjust(16) for size in sizes)
    yield "total".ljust(14) + "".join(f"{memory.total / GIB:.2f}".rjust(16) for memory in phases.values())


def _elsewhere(plan: Plan) -> Iterator[str]:
    """What is taken beside the devices' memory."""
    if plan.device == "cuda":
        host = plan.model.host()
        takes = f"{host['load'] / GIB:.1f} GiB to load, {host['checkpoint'] / GIB:.1f} GiB to save a checkpoint"
        yield f"host memory, of all processes: {takes}, beside Python"
    export = plan.shape.weights * plan.compute_bytes
    yield f"disk: {plan.model.checkpoint_bytes() / GIB:.1f} GiB a checkpoint, {export / GIB:.1f} GiB the exported model"


def _speed(asked: Asked, plan: Plan, rows: Rows) -> Iterator[str]:
    """Groups a second and hours, by FLOPs."""
    from selm_fast.iteration.estimate import UTILISATION, show_duration
    from selm_fast.roofline import Settings, flops

    share = asked.utilisation or UTILISATION
    peak, origin = _flops(asked)
    speed = share * peak * asked.nproc
    training = flops(plan.shape, plan.group, plan.settings).total / speed
    reference = flops(plan.shape, plan.group, Settings(reference=True)).reference / speed
    rate = f"{1 / training:,.2f} groups/s, {plan.group.tokens / training:,.0f} tokens/s"
    yield f"speed: {rate} at {share:.0%} of {peak / 1e12:,.1f} TFLOP/s each ({origin})"
    count, what = (rows.count, f"{rows.count:,} rows") if rows.count else (10_000, "every 10,000 rows")
    steps, before = show_duration(count * asked.config.epochs * training), show_duration(count * reference)
    yield f"time: {steps} of training on {what}, after {before} of the reference pass"


def _flops(asked: Asked) -> tuple[float, str]:
    """FLOP/s of a large matmul on one device, and where the number is from."""
    import torch

    from selm_fast.iteration.facts import device_speed

    if asked.tflops is not None:
        return asked.tflops * 1e12, "as given"
    if asked.config.device == "cpu" or torch.cuda.is_available():
        speed = device_speed(asked.config)
        return speed.flops, f"measured, {speed.name}"
    return ASSUMED_TFLOPS * 1e12, "assumed, an H200's; --tflops says otherwise"


def _verdict(plan: Plan, memory: float, asked: Asked) -> None:
    """Say that it fits, or what to change. Raises Refused where it does not fit as it is."""
    from selm_fast.training.room import USABLE, advise

    room = f"{plan.total / GIB:.1f} of {memory:.1f} GiB ({USABLE:.0%} of them are planned with)"
    if plan.fits(memory * GIB):
        print(f"it fits: {room}")
        return
    print(f"it does not fit: {room}")
    changes, fits = advise(plan, memory * GIB, most_ranks=1 if plan.device == "cpu" else 8)
    for nth, change in enumerate(changes):
        last = nth == len(changes) - 1
        print(f"  {change}{(': fits' if fits else ': does not fit yet') * last}")
    if fits:
        flags = " ".join(f"--{change.name} {change.value}" for change in changes)
        raise Refused(f"training would not fit as it is set; it does with {flags}")
    raise Refused(
        "training would not fit, whatever is set: take a smaller model, or "
        + ("a machine with more memory" if plan.device == "cpu" else "more or larger GPUs")
    )
