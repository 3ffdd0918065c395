"""Whole runs whose responses come from a server and whose ranks from PairRM, killed five times."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pairrm_checkpoint import make_checkpoint, make_tokenizer
from selm_fast.config import RunConfig
from selm_fast.errors import Refused, Stopped
from selm_fast.iteration import pool
from selm_fast.iteration.job import read_manifest
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.rankers import check_ranker
from selm_fast.iteration.sources import check_run
from selm_fast.iteration.stages import do_part
from selm_fast.pairrm.ranker import PairRM
from selm_fast.training.progress import Display

from ..training.harness import KILLED, WORDS, in_child, make_rows, write_rows
from .completion_server import Server
from .harness import MakeRun, StopAfter, job_of, lines, planned, run_inline, shards
from .runs import DEADLINE_S, assert_same_results, die_at, processes_in, start_run, states, wait_until
from .test_served import served as served

pytestmark = pytest.mark.usefixtures("plain_report")
NUM_PROMPTS, NUM_HELD_OUT = 40, 6
# At its first write, before its manifest, or just after it.
KILLS = (
    ("write", "iter-1/rollout"), ("write", "iter-1/rank"), ("rename", "iter-1/train"), ("write", "iter-2/rollout"),
    ("fsync", "iter-2/rank"),
)  # fmt: skip


@pytest.fixture(scope="session")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PairRM with random weights."""
    texts = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(len(WORDS))] + ["yes", "no", "so", "and"]
    tokenizer = make_tokenizer(texts, 160)
    folder = tmp_path_factory.mktemp("pairrm") / "tiny"
    return make_checkpoint(folder, tokenizer, hidden=32, layers=2, heads=2, form="PairRM-hf")


@pytest.fixture
def faulty_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that now and then drops a request, answers 500 or half of its JSON."""
    monkeypatch.setattr(pool, "_BACK_OFF_S", (0.005, 0.02))
    faults = [*["ok"] * 6, "drop", *["ok"] * 9, "500", *["ok"] * 7, "truncated", "twice"]
    server = Server({"style": "vllm", "faults": faults})
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def settings(url: str, pairrm: Path, folder: Path) -> dict[str, Any]:
    """Two iterations over two portions of 40 prompts."""
    return {
        "data__train": str(folder / "train.jsonl"), "data__eval": str(folder / "test.jsonl"),
        "rollout__engine": "server", "rollout__servers": url, "rollout__concurrency": 2, "rollout__shard_prompts": 7,
        "ranker": "pairrm", "pairrm__path": str(pairrm), "pairrm__max_tokens": 512,
        "checkpoint__every": 1, "checkpoint__keep": 1, "batch__groups": 8,
    }  # fmt: skip


def test_two_iterations_killed_five_times(
    make_run: MakeRun, faulty_server: Server, pairrm: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", make_rows(NUM_PROMPTS, seed=1))
    write_rows(tmp_path / "test.jsonl", make_rows(NUM_HELD_OUT, seed=2))
    own = settings(faulty_server.url, pairrm, tmp_path)
    alone = make_run("alone", **own)
    run_inline(alone)
    config = make_run("killed", **own)
    for kind, title in KILLS:

        def attempt(kind: str = kind, title: str = title) -> None:
            die_at(kind, Paths(config).root / title)
            run_inline(config)

        assert in_child(attempt) == KILLED
        assert (states(config)[title] == "done") == (kind == "fsync")
    run_inline(config)
    assert_same_results(Paths(alone).root, Paths(config).root)
    check_ranks(config, pairrm)


def check_ranks(config: RunConfig, pairrm: Path) -> None:
    """The rows of both iterations are as PairRM, asked here, ranks the candidates."""
    paths = Paths(config)
    device = torch.device("cpu")
    model = PairRM.from_pretrained(str(pairrm), device=device, dtype=torch.float32, max_tokens=2048)
    for number in (1, 2):
        responses = {line["row"]: line for line in shards(paths.stage(number, "rollout"), "policy")}
        assert len(responses) == NUM_PROMPTS // 2
        ranked = lines(paths.stage(number, "rank") / "rows.jsonl")
        manifest = read_manifest(paths.stage(number, "rank"))
        assert manifest is not None
        assert manifest["counts"]["groups"] == len(ranked) > NUM_PROMPTS // 4
        assert sum(manifest["counts"]["skipped"].values()) == NUM_PROMPTS // 2 - len(ranked)
        source = lines(Path(str(config.data.train)))
        for line in ranked:
            row = source[line["row"]]
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
            texts = [responses[line["row"]]["responses"][0]["text"]]
            texts += [row[n] if isinstance(row[n], str) else row[n][-1]["content"] for n in ("chosen", "rejected")]
            (scores,) = model.score([prompt], [texts])
            assert line["scores"] == pytest.approx(scores, abs=1e-5)
            names = dict(zip(line["candidates"], line["scores"], strict=True))
            assert names[line["chosen_is"]] == max(line["scores"])
            assert names[line["rejected_is"]] == min(line["scores"])


def test_pairrm_says_how_fast_it_is_and_a_stop_is_heard_between_batches(
    make_run: MakeRun, faulty_server: Server, pairrm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "train.jsonl", make_rows(8, seed=1))
    own = settings(faulty_server.url, pairrm, tmp_path) | {"data__eval": None, "portions": 1, "iterations": 1}
    config = make_run(**own | {"rollout__shard_prompts": 100, "pairrm__max_tokens": 64})
    run_inline(config, until="rollout")
    with pytest.raises(Stopped, match="stopped in iter-1/rank; what is ranked is saved"):
        do_part(job_of(config, "iter-1/rank", stop=StopAfter(3)))
    assert not list(Paths(config).stage(1, "rank").rglob("rows-*"))
    do_part(job_of(config, "iter-1/rank", display=Display(console=Console(width=200, soft_wrap=True))))
    assert "PairRM scored 48 rows: " in capsys.readouterr().out


def test_two_processes_rank_as_one_does(make_run: MakeRun, faulty_server: Server, pairrm: Path, tmp_path: Path) -> None:
    """As on two GPUs: each process scores chunks of its own, and whose they are changes no score."""
    write_rows(tmp_path / "train.jsonl", make_rows(20, seed=1))
    own = settings(faulty_server.url, pairrm, tmp_path) | {"data__eval": None, "portions": 1, "iterations": 1}
    ranked = []
    for processes in (1, 2):
        config = make_run(f"of {processes}", **own)
        run_inline(config, until="rank", processes=processes)
        ranked.append((Paths(config).stage(1, "rank") / "rows.jsonl").read_bytes())
    assert ranked[0] == ranked[1] != b""


def test_another_checkpoint_is_another_ranker(make_run: MakeRun, pairrm: Path, tmp_path: Path) -> None:
    """Its content is what stages depend on, not its path; what is none is refused before any work."""
    write_rows(tmp_path / "train.jsonl", make_rows(8, seed=1))
    write_rows(tmp_path / "test.jsonl", make_rows(4, seed=2))
    own = settings("http://127.0.0.1:9", pairrm, tmp_path)
    before = planned(make_run(**own))
    moved = tmp_path / "moved"
    moved.symlink_to(pairrm)
    assert {title: stage.key for title, stage in planned(make_run(**own | {"pairrm__path": str(moved)})).items()} == {
        title: stage.key for title, stage in before.items()
    }
    other = make_checkpoint(
        tmp_path / "other", make_tokenizer(WORDS, 120), hidden=32, layers=1, heads=2, form="PairRM-hf"
    )
    for changes in ({"pairrm__path": str(other)}, {"pairrm__dtype": "bfloat16"}, {"ranker": "python:the_ranker:score"}):
        after = planned(make_run(**own | changes))
        changed = {title for title in before if before[title].key != after[title].key}
        assert "iter-1/rollout" not in changed
        assert {"iter-1/rank", "iter-0/evaluate", "iter-1/train"} <= changed
    alone = [make_run(**own | {"data__eval": None} | more) for more in ({}, {"pairrm__path": str(other)})]
    assert len({planned(config)["iter-1/rank"].key for config in alone}) == 2
    batched = planned(make_run(**own | {"rollout__max_tokens": 999}))  # servers batch as they like
    assert {title: stage.key for title, stage in batched.items()} == {
        title: stage.key for title, stage in before.items()
    }
    (tmp_path / "none").mkdir()
    with pytest.raises(Refused, match="none"):
        check_ranker(make_run(**own | {"pairrm__path": str(tmp_path / "none")}))
    check_ranker(make_run(**own))
    check_run(make_run(**own))


# The command itself, with a real server and real rows.


@pytest.fixture
def real_data() -> Path:
    """Folder of real preference rows beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "offline_train.jsonl").is_file():
        pytest.skip("no real rows beside the repository")
    return folder


@pytest.mark.slow
def test_the_command_on_real_rows_killed_five_times(
    make_run: MakeRun, served: str, real_data: Path, tmp_path: Path
) -> None:
    """SIGKILL to the command in stages of either iteration; `transformers serve` answers for every iterate."""
    for name, count in (("train", NUM_PROMPTS), ("test", NUM_HELD_OUT)):
        rows = (real_data / f"offline_{name}.jsonl").read_text("utf-8").splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), "utf-8")
    model = LlamaConfig(
        vocab_size=16384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(model).save_pretrained(tmp_path / "small")
    for file in (real_data / "tokenizer").iterdir():  # the server reads both from one folder
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    words = make_tokenizer((tmp_path / "train.jsonl").read_text("utf-8").splitlines(), 3000)
    pairrm = make_checkpoint(tmp_path / "pairrm", words, hidden=64, layers=1, heads=1, form="PairRM")
    own = settings(served, pairrm, tmp_path) | {
        "model__path": str(tmp_path / "small"), "data__max_length": 256, "data__max_prompt_length": 128,
        "rollout__max_new_tokens": 12, "rollout__concurrency": 1, "batch__max_tokens": 4096,
    }  # fmt: skip
    alone = make_run("alone", **own)
    process = start_run(alone, tmp_path)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    config = make_run("killed", **own)
    root = Paths(config).root
    for place in ("iter-0/evaluate/policy-00000.jsonl", "iter-1/rollout/policy-00001.jsonl", "iter-1/rank/scratch",
                  "iter-2/rollout/policy-00000.jsonl", "iter-2/train/checkpoints/step-00000001"):  # fmt: skip
        process = start_run(config, tmp_path)
        wait_until((root / place).exists, f"no {place}")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL
        wait_until(lambda: not processes_in(tmp_path), "processes of the run are still there")
    process = start_run(config, tmp_path)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert_same_results(Paths(alone).root, root)
    check_ranks(config, pairrm)
    assert json.loads((root / "run.json").read_text())["done"]
