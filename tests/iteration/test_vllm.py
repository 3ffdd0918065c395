"""vLLM as a child process: how it is started, waited for, used and ended; a small script plays the part of vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selm_fast.config import API_KEY, RunConfig
from selm_fast.errors import Refused, RunFailed
from selm_fast.iteration import pool, vllm_servers
from selm_fast.iteration.guard import own_code
from selm_fast.iteration.paths import Paths
from selm_fast.iteration.sources import check_run
from selm_fast.iteration.stages import do_part
from selm_fast.iteration.vllm_servers import GUARD, VllmServer, vllm_command

from ..training.harness import write_tokenizer
from .completion_server import answer_ids
from .harness import MakeRun, job_of, lines, shards

ROLLOUT = "iter-1/rollout"
# An interpreter that has nothing but a vLLM: it writes down how it was called and serves, beside a child like vLLM's.
FAKE = """#!{python} -P
import importlib.util, json, os, subprocess, sys
here = os.path.dirname(os.path.abspath(__file__))
settings = json.load(open(here + "/settings.json"))
if sys.argv[3:] == []:  # asked whether it has the command
    sys.exit(not settings["has_vllm"])
with open(here + "/called.jsonl", "a") as log:
    log.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}}) + "\\n")
if settings.get("dies"):
    sys.exit("no memory")
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
engine = subprocess.Popen([sys.executable, "-c", deaf])
with open(here + "/engine.pid", "w") as file:
    file.write(str(engine.pid))
spec = importlib.util.spec_from_file_location("completion_server", {server!r})
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)
model, flags = sys.argv[4], dict(zip(sys.argv[5::2], sys.argv[6::2]))
server.main({{"style": "vllm", "faults": settings["faults"], "port": int(flags["--port"]), "ready_after": 2,
    "models": [model], "key": os.environ["VLLM_API_KEY"], "log": here + "/asked.jsonl"}})
"""


class Vllm:
    """The script, what it is told, and what it wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.python = folder / "python"
        self.python.write_text(
            FAKE.format(python=sys.executable, server=str(Path(__file__).with_name("completion_server.py")))
        )
        self.python.chmod(0o755)
        self.set()

    def set(self, **settings: Any) -> None:
        (self.folder / "settings.json").write_text(json.dumps({"has_vllm": True, "faults": ["ok"], **settings}))

    def called(self) -> list[dict[str, Any]]:
        return lines(self.folder / "called.jsonl")

    def living(self) -> list[int]:
        """Processes of the servers that are still there."""
        pids = [call["pid"] for call in self.called()] + [int((self.folder / "engine.pid").read_text())]
        return [pid for pid in pids if is_there(pid)]


def is_there(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vllm:
    monkeypatch.setattr(pool, "_BACK_OFF_S", (0.02, 0.1))
    return Vllm(tmp_path / "vllm")


@pytest.fixture
def make(make_run: MakeRun) -> Callable[..., RunConfig]:
    def make(**overrides: Any) -> RunConfig:
        return make_run(
            **{"rollout__engine": "vllm", "rollout__wait_s": 60.0, "portions": 1, "iterations": 1} | overrides
        )

    return make


def roll_out(config: RunConfig, vllm: Vllm, title: str = ROLLOUT) -> None:
    do_part(job_of(config, title, vllm_python=str(vllm.python)))


def test_started_used_and_ended(make: Callable[..., RunConfig], vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"PYTHONPATH": "/ours", API_KEY: "ours", "CUDA_VISIBLE_DEVICES": "1"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    config = make(seed=7)
    roll_out(config, vllm)
    found = shards(Paths(config).stage(1, "rollout"), "policy")
    assert [line["responses"][0]["ids"] for line in found] == [answer_ids(line["prompt_ids"], 8)[0] for line in found]
    assert len(found) == 12
    (call,) = vllm.called()
    model = str(Path(str(config.model.path)).absolute())
    port = call["argv"][call["argv"].index("--port") + 1]
    assert call["argv"] == vllm_command(config, "python", model, model, int(port), on_gpu=False)[1:]
    assert call["argv"][2:4] == ["serve", model]
    flags = dict(zip(call["argv"][4::2], call["argv"][5::2], strict=True))
    assert (flags["--tokenizer"], flags["--host"]) == (model, "127.0.0.1")
    assert flags["--max-model-len"] == "48"  # 40 of the prompt, 8 of the response
    assert (flags["--seed"], flags["--dtype"], flags["--generation-config"]) == ("7", "float32", "vllm")
    assert not {"PYTHONPATH", API_KEY} & set(call["env"])
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == ""  # device is cpu
    assert len(call["env"]["VLLM_API_KEY"]) == 32
    assert not vllm.living()  # and its engine, which does not hear SIGTERM


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_is_run_only_where_it_is_trusted(
    make: Callable[..., RunConfig], trusted: bool
) -> None:
    command = vllm_command(make(model__trust_remote_code=trusted), "python", "m", "t", 1, on_gpu=True)
    assert ("--trust-remote-code" in command) == trusted
    assert command[command.index("--tokenizer") + 1] == "t"


def test_one_server_answers_for_all_of_an_evaluation(make: Callable[..., RunConfig], vllm: Vllm) -> None:
    config = make()
    Paths(config).stage(1, "train").mkdir(parents=True)
    (Paths(config).stage(1, "train") / "model").symlink_to(str(config.model.path))
    roll_out(config, vllm, "iter-1/evaluate")
    assert len(vllm.called()) == 1
    folder = Paths(config).stage(1, "evaluate")
    assert len(shards(folder, "policy")) == len(shards(folder, "sample")) == 5
    assert not vllm.living()


def test_a_server_for_each_gpu(make: Callable[..., RunConfig], vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    asked_to_end: list[list[bool]] = []

    started: list[VllmServer] = []

    class Watched(VllmServer):
        def __enter__(self) -> Self:
            started.append(self)
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            guards = [server._guard for server in started]
            asked_to_end.append([bool(guard and guard.stdin and guard.stdin.closed) for guard in guards])
            super().__exit__(*error)

    monkeypatch.setattr(vllm_servers, "VllmServer", Watched)
    roll_out(make(device="auto", rollout__concurrency=1), vllm)
    assert asked_to_end == [[True] * 3] * 3  # together, not one after the other
    calls = vllm.called()
    assert sorted(call["env"]["CUDA_VISIBLE_DEVICES"] for call in calls) == ["4", "5", "7"]
    assert {call["argv"][call["argv"].index("--dtype") + 1] for call in calls} == {"bfloat16"}
    assert len({call["argv"][call["argv"].index("--port") + 1] for call in calls}) == 3
    assert not vllm.living()


def test_no_more_servers_than_processes(
    make: Callable[..., RunConfig], vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    roll_out(make(device="auto", processes=1), vllm)
    assert [call["env"]["CUDA_VISIBLE_DEVICES"] for call in vllm.called()] == ["0"]


def test_weights_that_are_pickles_are_not_given_to_it(
    make: Callable[..., RunConfig], vllm: Vllm, tmp_path: Path
) -> None:
    config = make()
    folder = tmp_path / "pickled"
    shutil.copytree(str(config.model.path), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match="safetensors"):
        roll_out(make(model__path=str(folder)), vllm)
    assert not (vllm.folder / "called.jsonl").exists()


def test_one_that_does_not_start_is_the_end_at_once(make: Callable[..., RunConfig], vllm: Vllm) -> None:
    vllm.set(dies=True)
    began = time.monotonic()
    with pytest.raises(RunFailed, match="vLLM ended with exit code 1; the log has its last words") as failed:
        roll_out(make(), vllm)
    assert time.monotonic() - began < 30
    assert "12 of 12 prompts have no response" in str(failed.value)


def test_one_that_dies_midway_is_the_end_with_what_is_done_kept(make: Callable[..., RunConfig], vllm: Vllm) -> None:
    vllm.set(faults=["ok"] * 5 + ["die"])
    config = make(rollout__concurrency=1)
    with pytest.raises(RunFailed, match="vLLM was killed by SIGKILL"):
        roll_out(config, vllm)
    assert len(shards(Paths(config).stage(1, "rollout"), "policy")) == 4
    assert not vllm.living()
    vllm.set()
    roll_out(config, vllm)
    assert len(shards(Paths(config).stage(1, "rollout"), "policy")) == 12


def test_it_does_not_outlive_the_run(make: Callable[..., RunConfig], vllm: Vllm) -> None:
    """SIGKILL to the process that started it: the guard notices, and ends the server and what that has started."""
    vllm.set(faults=["slow"])
    config = make()
    pid = os.fork()
    if pid == 0:
        try:
            roll_out(config, vllm)
        finally:
            os._exit(1)
    asked = vllm.folder / "asked.jsonl"
    deadline = time.monotonic() + 60
    while not asked.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert vllm.living()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while vllm.living() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not vllm.living()


def test_the_guard_tells_how_its_command_ended(tmp_path: Path) -> None:
    def code(*command: str) -> int:
        return subprocess.run([sys.executable, str(GUARD), *command], stdin=subprocess.PIPE, timeout=60).returncode

    with subprocess.Popen(
        [sys.executable, str(GUARD), sys.executable, "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE
    ) as guard:
        assert guard.wait(60) == 3
    # Standard input ends at once.
    assert own_code(code(sys.executable, "-c", "import time; time.sleep(600)")) == -signal.SIGTERM


def test_the_guard_waits_for_what_its_command_has_started() -> None:
    """Children that outlive their parent hold its GPU: when the guard has ended they are gone, not only killed."""
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    leader = (
        "import subprocess, sys\n"
        f"found = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "found.stdout.readline()\n"
        "print(found.pid, flush=True)\n"
    )
    command = [sys.executable, str(GUARD), sys.executable, "-c", leader + "import time; time.sleep(600)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdin is not None and guard.stdout is not None
        pid = int(guard.stdout.readline())
        guard.terminate()  # which is for the parent to heed
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(0.2)
        guard.stdin.close()
        guard.wait(60)
        assert not Path(f"/proc/{pid}").exists()


def test_the_command_is_found_by_the_interpreter_that_has_it(tmp_path: Path) -> None:
    """As installed by pip: a distribution with a console script, whose module may be anywhere."""
    info = tmp_path / "vllm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: vllm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nvllm = moved.again:main\n")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/again.py").write_text("import sys\ndef main():\n    print(sys.argv)\n    return 7\n")
    run_config = RunConfig(model={"path": "m"}, rollout={"engine": "vllm"})
    command = vllm_command(run_config, sys.executable, "m", "t", 8000, on_gpu=True)
    for path, code, said in ((str(tmp_path), 7, "['vllm', 'serve', 'm', '--tokenizer', 't', '--host',"), ("", 1, "")):
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        if not path and entry_points(group="console_scripts", name="vllm"):
            continue
        assert done.returncode == code
        assert done.stdout.startswith(said)


# What is refused before any work.


def test_an_interpreter_without_vllm_is_refused(make: Callable[..., RunConfig], vllm: Vllm, tmp_path: Path) -> None:
    config = make()
    check_run(config, vllm_python=str(vllm.python))
    vllm.set(has_vllm=False)
    with pytest.raises(Refused, match=r"--vllm-python .*/python has no vLLM: .* install vllm, or --rollout.engine tr"):
        check_run(config, vllm_python=str(vllm.python))
    with pytest.raises(Refused, match="--vllm-python .*/nowhere cannot be run"):
        check_run(config, vllm_python=str(tmp_path / "nowhere"))
    if not entry_points(group="console_scripts", name="vllm"):
        with pytest.raises(Refused, match=r"this environment has no vLLM: give .* --vllm-python ~/vllm/bin/python"):
            check_run(config)
    with pytest.raises(Refused, match="--vllm-python is given and rollout.engine is transformers: set it to vllm"):
        check_run(make(rollout__engine="transformers"), vllm_python=str(vllm.python))


# vLLM itself.


def test_greedy_ids_of_vllm_itself(make_run: MakeRun, tmp_path: Path) -> None:
    """With SELM_FAST_VLLM_PYTHON, or where vLLM is installed: its greedy ids are those of transformers."""
    python = os.environ.get("SELM_FAST_VLLM_PYTHON")
    if python is None and not entry_points(group="console_scripts", name="vllm"):
        pytest.skip("no vLLM here: set SELM_FAST_VLLM_PYTHON to the Python of an environment that has it")
    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=284, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    found = {}
    for engine in ("transformers", "vllm"):
        run = make_run(engine, model__path=str(folder), rollout__engine=engine, device="auto", dtype="float32")
        do_part(job_of(run, ROLLOUT, vllm_python=python))
        every = shards(Paths(run).stage(1, "rollout"), "policy")
        found[engine] = {line["row"]: line["responses"] for line in every}
    assert found["vllm"] == found["transformers"]
