"""The plan of a run before it begins: counts, disk and hours by hand, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from selm_fast.cli.run import run_arguments
from selm_fast.config import RunConfig
from selm_fast.errors import Refused
from selm_fast.iteration.estimate import Estimate, estimate, show_duration, show_size
from selm_fast.iteration.facts import Lengths, Model, Speed, model_size
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.plan import Stage, plan_stages
from selm_fast.iteration.run import run
from selm_fast.roofline import Shape

from .harness import MakeRun, run_inline

PROMPTS = 61_135  # the paper's
SHAPE = Shape.from_config(
    {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256,
    }
)  # fmt: skip
LLAMA = Model(SHAPE, compute_bytes=2)
DEVICE = Speed("a device", flops=1e15, bandwidth=4e12)


def paper(*flags: str) -> RunConfig:
    return run_arguments(["llama3-8b", *flags]).config


def stages_of(config: RunConfig) -> dict[str, Stage]:
    return {stage.title: stage for stage in plan_stages(config, {"model": "m", "data": "d"})}


@pytest.fixture
def llama() -> tuple[Estimate, dict[str, Stage]]:
    config = paper()
    return Estimate(config, PROMPTS, 0, Lengths(prompt=100, response=250), LLAMA, DEVICE), stages_of(config)


def test_portions_and_steps(llama: tuple[Estimate, dict[str, Stage]]) -> None:
    found, stages = llama
    assert [found.portion(number) for number in (1, 2, 3)] == [20_378, 20_378, 20_379]
    assert found.of(stages["iter-1/train"]).what == "selm, 160 steps of 128 groups, lr 5e-07"
    assert found.of(stages["iter-3/train"]).what == "selm, 160 steps of 128 groups, lr 1e-07"
    assert found.of(stages["iter-2/rank"]).what == "3 candidates for each of 20,378 prompts, 122,268 rows of PairRM"
    rollout = found.of(stages["iter-2/rollout"]).what
    assert rollout == "20,378 prompts, 1 response each, greedy, at most 1,024 tokens"


BODY, HEAD, WEIGHTS = 6_979_321_856, 525_336_576, 8_030_261_248


def parts(groups: float, prompt: int, response: int, responses: float) -> tuple[float, float, float]:
    """FLOPs of body, attention and head, forward: the prompt once, no response's last token."""
    pairs = prompt * (prompt - 1) / 2 + responses * (response * (prompt - 1) + response * (response + 1) / 2)
    tokens = prompt - 1 + responses * response
    return 2 * BODY * groups * tokens, 524_288 * groups * pairs, 2 * HEAD * groups * responses * response


def test_hours_and_disk_by_hand(llama: tuple[Estimate, dict[str, Stage]]) -> None:
    found, stages = llama
    # The prompt once, chosen, rejected, and an explored response that is neither in one group of three.
    body, scores, head = parts(20_378, 100, 250, 2 + 1 / 3)
    cache, train = found.of(stages["iter-1/cache"]), found.of(stages["iter-1/train"])
    assert cache.seconds == pytest.approx((body + scores + head) / 0.4e15)
    assert cache.what == f"{20_378 * (99 + (2 + 1 / 3) * 250) / 1e6:,.1f}M packed tokens"
    assert found.config.model.activation_checkpointing == "full"
    # 16,384 tokens a micro-batch come to 3.6 GB of logits: above the budget, so that they are computed again.
    assert train.seconds == pytest.approx((4 * body + 4.5 * scores + 4 * head) / 0.4e15)
    assert train.left == WEIGHTS * (2 + 4)
    assert train.peak == WEIGHTS * (2 + 3 * 12)  # two checkpoints kept, a third under way
    config = paper("--rollout.engine", "transformers")
    local = Estimate(config, PROMPTS, 0, found.lengths, LLAMA, DEVICE)
    rollout = local.of(stages_of(config)["iter-1/rollout"])
    steps = 20_378 * (100 + 1024) / 65_536 * 1024  # every batch as long as it may be
    first, all_of_it = (sum(parts(20_378, 100, length, 1)) / 0.4e15 for length in (1, 250))
    assert rollout.seconds == pytest.approx(first + steps * WEIGHTS * 2 / (0.5 * 4e12))
    # Where memory is fast, decoding is bound by its matmuls.
    fast = Speed("fast", flops=1e15, bandwidth=4e16)
    for settings in (found.config, config):
        unbound = Estimate(settings, PROMPTS, 0, found.lengths, LLAMA, fast)
        assert unbound.of(stages_of(settings)["iter-1/rollout"]).seconds == pytest.approx(all_of_it)


def test_hours_of_vllm_of_servers_and_of_pairrm_by_hand(llama: tuple[Estimate, dict[str, Stage]]) -> None:
    found, stages = llama
    # 16 responses under way, the next one begun where one ends: each token of all reads the weights once in 16.
    config = paper("--rollout.concurrency", "16")
    few = Estimate(config, PROMPTS, 0, found.lengths, LLAMA, DEVICE)
    first = sum(parts(20_378, 100, 1, 1)) / 0.4e15
    expected = first + 20_378 / 16 * 250 * WEIGHTS * 2 / (0.5 * 4e12)
    assert few.of(stages_of(config)["iter-1/rollout"]).seconds == pytest.approx(expected)
    config = paper("--rollout.engine", "server", "--rollout.servers", "http://there:8000")
    elsewhere = Estimate(config, PROMPTS, 0, found.lengths, LLAMA, DEVICE)
    assert elsewhere.of(stages_of(config)["iter-1/rollout"]).seconds is None
    # DeBERTa-v3-large: 24 layers of 12 x 1024^2 weights, attention to contents and to 512 relative positions; the last
    # layer is asked about three tokens.
    tokens = 100 + 2 * 250
    row = 24 * (2 * tokens * 12 * 1024**2 + 4 * tokens * 1024 * (tokens + 512))
    assert 0.955 < found.of(stages["iter-1/rank"]).seconds / (122_268 * row / 0.2e15) < 1
    config = paper("--ranker", "python:a:b")
    assert (
        Estimate(config, PROMPTS, 0, found.lengths, LLAMA, DEVICE).of(stages_of(config)["iter-1/rank"]).seconds is None
    )


@pytest.mark.parametrize(
    "flags, again, head_passes",
    [
        (["--model.activation_checkpointing", "none"], 0, 4),
        (["--batch.max_tokens", "4096"], 1, 3),  # 0.9 GB of logits are kept
        (["--batch.groups", "8"], 1, 3),  # a step that is smaller than a micro-batch may be
        (["--head_mode", "keep"], 1, 3),
        (["--head_mode", "recompute", "--batch.max_tokens", "4096"], 1, 4),
        (["--epochs", "3"], 1, 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_hours_of_training_follow_its_settings(flags: list[str], again: int, head_passes: int) -> None:
    config = paper(*flags)
    found = Estimate(config, PROMPTS, 0, Lengths(prompt=100, response=250), LLAMA, DEVICE)
    body, scores, head = parts(20_378 * config.epochs, 100, 250, 2 + 1 / 3)
    seconds = ((3 + again) * body + (3.5 + again) * scores + head_passes * head) / 0.4e15
    assert found.of(stages_of(config)["iter-1/train"]).seconds == pytest.approx(seconds)


def test_an_iteration_s_own_settings_are_not_those_of_its_evaluation() -> None:
    """Iterates are compared, so all answer the held-out prompts in the same way."""
    shorter = {"iteration": {2: {"rollout": {"max_new_tokens": 4}}}}
    found = []
    for config in (paper(), RunConfig.model_validate(paper().model_dump(exclude_unset=True) | shorter)):
        costs = Estimate(config, PROMPTS, 500, Lengths(prompt=100, response=250), LLAMA, DEVICE)
        stages = {stage.title: stage for stage in plan_stages(config, {"model": "m", "data": "d", "eval": "e"})}
        found.append([costs.of(stages[f"iter-2/{name}"]) for name in ("rollout", "evaluate")])
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_without_a_model_there_are_no_hours(llama: tuple[Estimate, dict[str, Stage]]) -> None:
    found, stages = llama
    bare = Estimate(found.config, PROMPTS, 0, found.lengths, None, None)
    assert bare.of(stages["iter-1/train"]).seconds is None
    assert bare.of(stages["iter-1/train"]).left is None
    assert bare.of(stages["iter-1/rollout"]).left == found.of(stages["iter-1/rollout"]).left


def test_no_explored_response_no_third_sequence(llama: tuple[Estimate, dict[str, Stage]]) -> None:
    found, _ = llama
    config = run_arguments(["dpo-iterative"]).config
    dpo = Estimate(config, PROMPTS, 0, found.lengths, LLAMA, DEVICE)
    cost = dpo.of(stages_of(config)["iter-1/cache"])
    assert cost.seconds == pytest.approx(sum(parts(20_378, 100, 250, 2)) / 0.4e15)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma2", "gpt2"])
def test_a_model_s_parameters_are_counted(model_type: str, tmp_path: Path) -> None:
    """Architectures name their sizes in their own way, and not all have a gate in their MLP."""
    names = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    width = {} if model_type == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **names, **width)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = model_size(Paths(paper("--model.path", str(tmp_path), "--device", "cpu", "--output_dir", str(tmp_path))))
    assert found is not None
    assert found.weights == sum(weight.numel() for weight in model.parameters())
    assert found.compute_bytes == 4
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(count for name, count in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    assert matmuls == 2 * 8 * (found.shape.body + found.shape.head)
    assert (found.shape.layers, found.shape.vocab, found.shape.heads) == (3, 100, 4)


def test_units() -> None:
    assert [show_size(size) for size in (512, 2**20 * 1.5, 2**30 * 1234, None)] == [
        "0.5 KiB",
        "1.5 MiB",
        "1,234.0 GiB",
        "?",
    ]
    assert [show_duration(time) for time in (5, 90, 5400, None)] == ["5.0 s", "1.5 min", "1.5 h", "?"]


def test_a_dry_run_writes_nothing_and_tells_what_is_there(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    config = make_run()
    run(config, dry_run=True)
    assert config.output_dir is not None
    assert not config.output_dir.exists()
    printed = capsys.readouterr().out
    assert "12 prompts in 2 portions, 5 held out" in printed
    assert printed.count("to do") == 11
    assert "6 prompts, 1 response each, greedy, at most 8 tokens" in printed
    assert "TFLOP/s" in printed

    run_inline(config, until="rank")
    before = sorted(path for path in config.output_dir.rglob("*"))
    run(config, dry_run=True)
    printed = capsys.readouterr().out
    assert printed.count(" done  ") == 3
    assert printed.count("to do") == 8
    run(make_run(rank__min_margin=0.5), dry_run=True)
    printed = capsys.readouterr().out
    assert "iter-1/rank was made with other settings: rank.min_margin: 0.0 there, 0.5 here" in printed
    assert sorted(path for path in config.output_dir.rglob("*")) == before


def test_fewer_rows_than_portions_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(Refused, match=r"prompts.jsonl has 12 rows; expected at least one for each of 13 portions"):
        estimate(Paths(make_run(portions=13)))


def write_paper_rows(path: Path, words: int) -> Path:
    def row(index: int) -> dict[str, object]:
        turns = [{"role": "user", "content": f"question {index}"}]
        answers = {
            name: [*turns, {"role": "assistant", "content": f"{name} " * words}] for name in ("chosen", "rejected")
        }
        return {"prompt": f"question {index}", **answers}

    with path.open("w") as file:
        file.writelines(json.dumps(row(index)) + "\n" for index in range(PROMPTS))
    return path


def test_the_paper_s_rows_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_paper_rows(tmp_path / "rows.jsonl", words=1)
    flags = ["--data.train", str(rows), "--data.eval", "none", "--output_dir", str(tmp_path / "run")]
    run(paper(*flags, "--model.path", str(tmp_path / "absent")), dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "61,135 prompts in 3 portions" in printed
    assert "20,378 prompts" in printed
    assert "20,379 prompts" in printed
    assert "The size of the model is not known" in printed


@pytest.mark.slow
def test_the_paper_s_rows_at_their_size_fit_a_gigabyte_and_a_minute(tmp_path: Path) -> None:
    """250 tokens a response, as UltraFeedback has; the process is measured whole, Python and libraries included."""
    rows = write_paper_rows(tmp_path / "rows.jsonl", words=250)
    flags = ["--data.train", str(rows), "--data.eval", "none", "--output_dir", str(tmp_path / "run")]
    # VmHWM of the process itself: what wait() reports for a child begins with the memory of the one that started it.
    code = "import atexit, time; from selm_fast.cli.main import entry\n"
    code += "atexit.register(lambda: print(open('/proc/self/status').read(), 'seconds', time.process_time()))\nentry()"
    command = [sys.executable, "-c", code, "run", "llama3-8b", "--dry-run", *flags]
    done = subprocess.run([*command, "--model.path", str(tmp_path / "absent")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "61,135 prompts in 3 portions" in done.stdout
    peak_kib = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert peak_kib < 2**20
    assert float(done.stdout.split()[-1]) < 60  # of the processor, whatever else goes on here
