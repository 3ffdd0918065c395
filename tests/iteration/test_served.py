"""`transformers serve`, a real server in a process of its own: its greedy answers are those of this process."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selm_fast.iteration.paths import Paths
from selm_fast.iteration.stages import do_part

from ..training.harness import TEMPLATE, WORDS
from .harness import MakeRun, job_of, shards

ROLLOUT = "iter-1/rollout"
PATIENCE_S = 120.0
SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|unknown|>"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server that loads whichever folder a request names."""
    for name in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} (extra: serve)")
    folder = tmp_path_factory.mktemp("served")
    (folder / "hub").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(PATIENCE_S)


@pytest.fixture
def word_model(tmp_path: Path) -> Path:
    """A random model whose tokens are words: the text of its responses becomes their ids again."""
    folder = tmp_path / "words"
    vocabulary = [*SPECIAL, *dict.fromkeys(" ".join(WORDS).split())]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[4]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1], unk_token=SPECIAL[4],
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[1] *= 2.5  # some responses end
        model.lm_head.weight[[0, 2, 3, 4]] = 0.0  # and none holds a token that has no text
    model.generation_config.repetition_penalty = 3.0  # which nobody here asks for
    model.save_pretrained(folder)
    return folder


def test_greedy_ids_are_those_of_this_process(make_run: MakeRun, word_model: Path, served: str) -> None:
    found: dict[str, Any] = {}
    for name, engine in (("here", {}), ("served", {"rollout__engine": "server", "rollout__servers": served})):
        config = make_run(
            name, model__path=str(word_model), portions=1, rollout__concurrency=2, rollout__max_tokens=400, **engine
        )
        do_part(job_of(config, ROLLOUT))
        lines = shards(Paths(config).stage(1, "rollout"), "policy")
        found[name] = {line["row"]: (line["prompt_ids"], line["responses"][0]) for line in lines}
    assert len(found["here"]) == 12
    for row, (prompt, response) in found["here"].items():
        assert found["served"][row] == (prompt, response | {"retokenised": True})
    ends = {response["finish"] for _, response in found["here"].values()}
    assert ends == {"stop", "length"}
    assert len({tuple(response["ids"]) for _, response in found["here"].values()}) > 5


def test_samples_are_samples(make_run: MakeRun, word_model: Path, served: str) -> None:
    """This server samples only where its own setting says so."""
    sampled = {"rollout__responses": 4, "rollout__temperature": 1.0, "rollout__concurrency": 1}
    config = make_run(model__path=str(word_model), rollout__engine="server", rollout__servers=served, **sampled)
    do_part(job_of(config, ROLLOUT))
    lines = shards(Paths(config).stage(1, "rollout"), "policy")
    different = [len({tuple(response["ids"]) for response in line["responses"]}) for line in lines]
    assert sum(different) > 2 * len(different)
