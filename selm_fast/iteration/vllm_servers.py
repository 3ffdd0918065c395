"""vLLM as child processes: one server for each GPU, in an environment of its own, for as long as it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from selm_fast.config import API_KEY, RunConfig
from selm_fast.errors import Refused
from selm_fast.iteration.exit_codes import ending
from selm_fast.iteration.guard import GONE_S, GRACE_S, own_code
from selm_fast.iteration.job import Job

GUARD: Final = Path(__file__).with_name("guard.py")
FLAG: Final = "--vllm-python"
FALL_BACK: Final = "--rollout.engine transformers"
# Ours, which another environment's Python must not see, and what would make its processes one of our ranks.
_OURS: Final = (
    API_KEY,
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# The command `vllm`, by the interpreter that has it: its module has moved between versions, its script may be anywhere.
_FIND: Final = "import sys; from importlib.metadata import entry_points as every; sys.argv[0] = 'vllm'; "
_HAS: Final = _FIND + "sys.exit(not every(group='console_scripts', name='vllm'))"
_SERVE: Final = _FIND + "(vllm,) = every(group='console_scripts', name='vllm'); sys.exit(vllm.load()())"
_CHECK_S: Final = 120.0


class VllmServer:
    """One vLLM server on 127.0.0.1, behind a guard that ends it when this process is gone."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command, self._environment = command, environment
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen(
            [sys.executable, "-P", str(GUARD), *self._command], stdin=subprocess.PIPE, stdout=2, env=self._environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None
        self.ask_to_end()
        try:
            self._guard.wait(GRACE_S + GONE_S + 5)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def ask_to_end(self) -> None:
        """Have the guard end the server, without waiting for it."""
        assert self._guard is not None and self._guard.stdin is not None
        self._guard.stdin.close()

    def ended(self) -> str | None:
        """How the server ended, None while it runs."""
        assert self._guard is not None
        code = self._guard.poll()
        return None if code is None else f"vLLM {ending(own_code(code))}; the log has its last words"


def start_vllm(job: Job, model: str, key: str, stack: ExitStack) -> list[VllmServer]:
    """Start a server of `model` on each GPU, ended with `stack`; none of them is ready yet.

    key: what every request must bring.
    """
    python = interpreter(job.vllm_python)
    gpus = _gpus(job.config)
    found = []
    for gpu, port in zip(gpus, _free_ports(len(gpus)), strict=True):
        environment = _environment() | {
            "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": gpu or "",
        }  # fmt: skip
        command = vllm_command(job.config, python, model, job.paths.tokenizer, port, on_gpu=gpu is not None)
        found.append(stack.enter_context(VllmServer(command, port, environment)))
        stack.callback(_ask_to_end, found)  # all of them, before the last is waited for
    servers = "server" if len(found) == 1 else "servers"
    job.display.say(f"starting {len(found)} vLLM {servers} for {model}")
    return found


def vllm_command(config: RunConfig, python: str, model: str, tokenizer: str, port: int, *, on_gpu: bool) -> list[str]:
    """The command line of one server: the run's own precision and lengths, and no setting of the model's files."""
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    command = [
        python, "-c", _SERVE, "serve", model, "--tokenizer", tokenizer,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--seed", str(config.seed),
        "--max-model-len", str(config.data.max_prompt_length + config.rollout.max_new_tokens),
        "--generation-config", "vllm",
    ]  # fmt: skip
    return [*command, "--trust-remote-code"] if config.model.trust_remote_code else command


def interpreter(given: str | None) -> str:
    """The Python that has vLLM: the given one, else this one. Raises Refused where there is none."""
    if given is not None:
        return str(Path(given).expanduser())
    if not entry_points(group="console_scripts", name="vllm"):
        raise Refused(
            f"rollout.engine is vllm, and this environment has no vLLM: give the Python of one that does, "
            f"{FLAG} ~/vllm/bin/python (python -m venv ~/vllm; ~/vllm/bin/pip install vllm), or {FALL_BACK}"
        )
    return sys.executable


def check_vllm(given: str | None) -> None:
    """Raise Refused, before any work, where the Python that should have vLLM is not there or has none."""
    python = interpreter(given)
    try:
        result = subprocess.run(
            [python, "-c", _HAS], env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHECK_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(
            f"{FLAG} {python} cannot be run ({error}); expected the Python of an environment with vLLM"
        ) from error
    if result.returncode:
        raise Refused(f"{FLAG} {python} has no vLLM: {python} -m pip install vllm, or {FALL_BACK}")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OURS}


def _ask_to_end(servers: list[VllmServer]) -> None:
    for server in servers:
        server.ask_to_end()


def _free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nobody listens on, no two the same."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def _gpus(config: RunConfig) -> list[str | None]:
    """The GPUs that a run may use, as CUDA_VISIBLE_DEVICES names them; one server without any where there is none."""
    count = 0 if config.device == "cpu" else torch.cuda.device_count()
    count = min(count, config.processes or count)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
    return [*names] if names else [None]
