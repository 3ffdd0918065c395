"""What the tests of training share: small models and rows, running, comparing, stopping and killing runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selm_fast.config import Config
from selm_fast.data.dataset import load_groups
from selm_fast.data.groups import TokenGroup
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.model import Policy
from selm_fast.training import checkpoint, storage
from selm_fast.training.loop import Trainer
from selm_fast.training.metrics import TIMINGS
from selm_fast.training.run_train import train
from selm_fast.training.signals import StopFlag
from selm_fast.training.world import World

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = (
    "the", "sky", "sea", "air", "blue", "green", "is", "was", "and", "not", "over", "under", "why", "how", "because",
    "of", "light", "water", "tree", "stone",
)  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALONE = World(0, 1, torch.device("cpu"))
KILLED = 9  # exit code of a child that `Crash` ended
Rows = list[dict[str, Any]]
MakeConfig = Callable[..., Config]


def override(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """These settings with others in their place; `optim__lr=1e-4` sets optim.lr."""
    for key, value in overrides.items():
        *sections, last = key.split("__")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return settings


def write_tokenizer(folder: Path, template: str = TEMPLATE, words: Sequence[str] = WORDS) -> None:
    """A byte-level BPE of 280 tokens with BOS, EOS, two role tokens and a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(words)] * 20, trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=template
    )
    hf.save_pretrained(str(folder))


def write_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random two-layer Llama with its tokenizer. Its weights are larger than usual, so that log-probs vary."""
    settings = {
        "vocab_size": 284, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def make_rows(count: int, seed: int = 0, *, duplicates: int = 0) -> Rows:
    """Preference rows, plain and conversational; the explored response is chosen, rejected, a third one, or missing.

    duplicates: so many rows of the `count` repeat earlier ones.
    """
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows: Rows = []
    for index in range(count - duplicates):
        prompt, chosen, rejected, third = text(3, 8), text(1, 7) + " yes", text(1, 7) + " no", text(2, 5) + " so"
        explored = (chosen, rejected, third, None)[index % 4]
        row: dict[str, Any] = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        if explored is not None:
            row["reference_response"] = " " + explored
        if index % 3 == 0:
            row["prompt"] = [{"role": "user", "content": prompt}]
            row["chosen"] = [{"role": "assistant", "content": chosen}]
            row["rejected"] = [{"role": "assistant", "content": rejected}]
            if explored is not None:
                row["reference_response"] = [{"role": "assistant", "content": explored}]
        rows.append(row)
    return rows + [dict(rows[rng.randrange(len(rows))]) for _ in range(duplicates)]


def write_rows(path: Path, rows: Rows) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def groups_of(config: Config, rows: Rows) -> list[TokenGroup]:
    """The token groups that a run makes of rows, in their order."""
    tokenizer = load_tokenizer(str(config.tokenizer_source))
    return load_groups(None, config.data, tokenizer, rows=rows, wants_explored=config.exploration_weight != 0).groups


def own_model(folder: Path | str, dtype: torch.dtype) -> Any:
    """A model by transformers alone, with its plain attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def own_logp(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-prob of one response by the model's own forward, unpacked and unshared: () fp64; differentiable."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).sum()


@dataclass
class Trace:
    """What a run logged, line by line."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of optimiser steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of evaluations."""
        return [line for line in self.lines if "eval_loss" in line]


def run(config: Config, rows: Rows) -> Trace:
    """Train to the end; -> what `on_log` saw."""
    trace = Trace()
    train(config, rows=rows, on_log=trace)
    return trace


@dataclass
class Live:
    """The objects of the run under way, or of the last one (fixture `live`)."""

    stop: StopFlag | None = None
    trainer: Trainer | None = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between two runs of the same command."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files right in a folder."""
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load(path.read_bytes()).items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit: NaN equals itself, 0 is not -0."""
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, and the same bits under each."""
    if not one or one.keys() != other.keys():
        raise AssertionError(f"tensors {sorted(one)} and {sorted(other)}")
    different = [name for name in one if not same_bits(one[name], other[name])]
    if different:
        raise AssertionError(f"{len(different)} of {len(one)} tensors differ: {different[:5]}")


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's last step."""
    return max((folder / "checkpoints").glob("step-*"))


@dataclass(frozen=True)
class Whole:
    """All of one checkpoint, or what is kept of it, with full tensors."""

    path: Path
    step: int
    state: dict[str, Any]
    masters: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def read_checkpoint(path: Path) -> Whole:
    """One checkpoint, every file checked. Raises Damaged."""
    state = json.loads(storage.Manifest.of(path).read(checkpoint.STATE))
    kinds = {kind: checkpoint.read_whole(path, kind) for kind in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)}
    assert {step for _, step in kinds.values()} == {state["step"]}
    return Whole(path, state["step"], state, *(tensors for tensors, _ in kinds.values()))


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, exported weights, final masters, optimiser state and position of two runs are equal to the bit."""
    if read_metrics(one) != read_metrics(other):
        pairs = zip(read_metrics(one), read_metrics(other), strict=False)
        different = [(a, b) for a, b in pairs if a != b]
        raise AssertionError(f"metrics of {len(read_metrics(one))} and {len(read_metrics(other))} lines: {different}")
    assert_same_tensors(tensors_of(one / "model"), tensors_of(other / "model"))
    first, second = newest_checkpoint(one), newest_checkpoint(other)
    if first.name != second.name:
        raise AssertionError(f"{first.name} and {second.name}")
    assert_same_tensors(tensors_of(first), tensors_of(second))
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    for state in states:
        state.pop("metrics_bytes")  # timings take more or fewer digits
    if states[0] != states[1]:
        raise AssertionError(f"{states[0]} and {states[1]}")


def leftovers(*folders: Path) -> list[Path]:
    """Temporary files and folders that a killed process left behind."""
    return [path for folder in folders for path in folder.rglob("*") if "tmp" in path.name.lower()]


@dataclass
class Crash:
    """Ends the process at the n-th point where something reaches a disk: a write, an fsync or a rename of `storage`.

    torn: a write puts half of its bytes down first.
    """

    at: int
    torn: bool = False
    kinds: list[str] = field(default_factory=list)  # of the points seen

    def install(self) -> None:
        """Take the place of the functions that `storage` does everything through (in a child that will not return)."""
        write, fsync, rename = storage._write, storage._fsync, storage._rename

        def crashing_write(fd: int, data: memoryview) -> int:
            if self._due("write"):
                if self.torn:
                    write(fd, data[: len(data) // 2])
                os._exit(KILLED)
            return write(fd, data)

        def crashing_fsync(fd: int) -> None:
            if self._due("fsync"):
                os._exit(KILLED)
            fsync(fd)

        def crashing_rename(source: Path, target: Path) -> None:
            if self._due("rename"):
                os._exit(KILLED)
            rename(source, target)

        storage._write, storage._fsync, storage._rename = crashing_write, crashing_fsync, crashing_rename

    def _due(self, kind: str) -> bool:
        self.kinds.append(kind)
        return len(self.kinds) == self.at


@contextmanager
def disk_points() -> Iterator[list[str]]:
    """The kinds of all points that a `Crash` could end a process at, in order, while the block runs."""
    counter = Crash(at=-1)
    before = storage._write, storage._fsync, storage._rename
    counter.install()
    try:
        yield counter.kinds
    finally:
        storage._write, storage._fsync, storage._rename = before


def start_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked process, its output thrown away; -> its process id.

    It exits with the action's value where that is an int, else with 0, and with 1 where it raised.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        value = action()
        code = value if isinstance(value, int) else 0
    finally:
        os._exit(code)


def wait_for(child: int) -> int:
    """Exit code of a forked process; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked process to its end; -> its exit code."""
    return wait_for(start_child(action))


def write_recipe(config: Config, path: Path) -> Path:
    """A recipe file with these settings (JSON is YAML)."""
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)), "utf-8")
    return path


def start_command(config: Config, recipe: Path) -> subprocess.Popen[str]:
    """Start `python -m selm_fast train` in a process of its own; standard output and error come as one pipe."""
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "selm_fast", "train", str(write_recipe(config, recipe))],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )


def count_forwards_of(action: Callable[[], Any]) -> int:
    """How many packed forwards (`Policy.hidden_states`) an action makes."""
    count = 0
    hidden_states = Policy.hidden_states

    def counted(self: Policy, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return hidden_states(self, batch)

    Policy.hidden_states = counted  # type: ignore[method-assign]
    try:
        action()
    finally:
        Policy.hidden_states = hidden_states  # type: ignore[method-assign]
    return count
