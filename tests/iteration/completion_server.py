"""A small completion server whose answers are known and whose faults are given; a program of its own, without torch.

    python completion_server.py '{"port": 0, "style": "vllm", "faults": ["ok", "500"], "log": "asked.jsonl"}'

It prints its port once it listens. What a prompt is answered depends on the prompt alone: `answer_ids`, `answer_text`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EOS = 1
OLD_WORDS = ("yes", "no", "so", "and")


def answer_ids(prompt: list[int], limit: int, vocab: int = 97, seed: int | None = None) -> tuple[list[int], str]:
    """Token ids for a prompt and why they end; greedy ones do not depend on the seed."""
    digest = hashlib.sha256(json.dumps([prompt, seed]).encode()).digest()
    ids = [2 + value % (vocab - 2) for value in digest[: 3 + digest[0] % 9]]
    return (ids[:limit], "length") if len(ids) >= limit else ([*ids, EOS], "stop")


def answer_text(prompt: str, limit: int) -> tuple[str, str]:
    """Words for a prompt."""
    digest = hashlib.sha256(prompt.encode()).digest()
    words = [OLD_WORDS[value % len(OLD_WORDS)] for value in digest[: 1 + digest[0] % 5]]
    return " ".join(words)[:limit], "stop"


class Server(ThreadingHTTPServer):
    """settings: port; style: vllm, ids (OpenAI's fields alone, ids taken), text (no ids taken), transformers.

    models: those that are served, None for any.  key: that requests must bring.  vocab: of answers.
    faults: what happens to the requests one after the other, again from the first: ok, drop (no answer), 500, 429,
        truncated (half of the JSON), short (fewer bytes than announced), twice (the answer and one more), slow (later
        than anybody waits), drips (byte by byte, as late), late (after a little while), empty, abort (a finish reason
        that is none), reads-another, other-ids, rejects (400), tells (500, and what was asked), die (the process ends).
    log: where each prompt is written down.  ready_after: requests for health that fail before.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", settings.get("port", 0)), Handler)
        self.settings = settings
        self.lock = threading.Lock()
        self.count = 0
        self.asked_health = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        """What happens to this request."""
        with self.lock:
            faults = self.settings.get("faults", ["ok"])
            found: str = faults[self.count % len(faults)]
            self.count += 1
            return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log of requests is `log`."""

    def do_GET(self) -> None:
        settings = self.server.settings
        if self.path == "/health":
            with self.server.lock:
                self.server.asked_health += 1
                ready = self.server.asked_health > settings.get("ready_after", 0)
            self.send(200 if ready else 503, b"a word")
        elif not self.allowed():
            self.send(401, {"error": "no key"})
        elif self.path == "/v1/models" and settings.get("models") is not None:
            owner = "vllm" if settings["style"] == "vllm" else "somebody"
            self.send(200, {"data": [{"id": name, "owned_by": owner} for name in settings["models"]]})
        else:
            self.send(500, {"error": "nothing to list"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        settings = self.server.settings
        if not self.allowed():
            self.send(401, {"error": "no key"})
            return
        if problem := self.problem(body):
            self.send(*problem)
            return
        probe = body["max_tokens"] == 1 and settings.get("faults") is not None
        fault = "ok" if probe else self.server.fault()
        if not probe and "log" in settings:
            with self.server.lock, open(settings["log"], "a") as log:
                log.write(json.dumps({"model": body["model"], "prompt": body["prompt"], "seed": body["seed"]}) + "\n")
        answer = json.dumps(self.answer(body, fault)).encode()
        self.misbehave(fault, answer)

    def allowed(self) -> bool:
        key = self.server.settings.get("key")
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def problem(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Why a request is not understood."""
        settings = self.server.settings
        extra = set(body) - {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
        if settings["style"] == "transformers":
            extra -= {"generation_config"}
        if settings["style"] != "vllm" and extra:
            return 422, {"detail": f"unexpected {sorted(extra)}"}
        if settings["style"] in ("text", "transformers") and not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string."}
        if settings.get("models") is not None and body["model"] not in settings["models"]:
            return 404, {"error": f"no model {body['model']}"}
        return None

    def answer(self, body: dict[str, Any], fault: str) -> Any:
        settings = self.server.settings
        prompt, limit = body["prompt"], body["max_tokens"]
        if isinstance(prompt, str):
            text, finish = answer_text(prompt, limit)
            return {"choices": [{"text": text, "finish_reason": finish}], "usage": {}}
        seed = body["seed"] if body["temperature"] > 0 else None
        ids, finish = answer_ids(prompt, limit, settings.get("vocab", 97), seed)
        choice: dict[str, Any] = {"text": "unread", "finish_reason": "abort" if fault == "abort" else finish}
        if settings["style"] == "vllm":
            choice["token_ids"] = [10**9] if fault == "other-ids" else ids
            choice["prompt_token_ids"] = [*prompt[1:], 7] if fault == "reads-another" else prompt
        else:
            choice["text"] = answer_text(str(prompt), limit)[0]
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}

    def misbehave(self, fault: str, answer: bytes) -> None:
        """Send an answer, or what a fault makes of it."""
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "drop":
            self.connection.close()
            return
        if fault in ("slow", "late"):
            time.sleep(30 if fault == "slow" else 0.2)
        if fault == "drips":
            self.wfile.write(b"HTTP/1.1 200 Said\r\nContent-Length: 600\r\n\r\n")
            for _ in range(600):
                self.wfile.write(b" ")
                time.sleep(0.05)
            return
        if fault == "tells":
            answer = str(self.headers).encode()
        status = {"500": 500, "tells": 500, "429": 429, "rejects": 400}.get(fault, 200)
        body = {"truncated": answer[: len(answer) // 2], "empty": b""}.get(fault, answer)
        self.send(status, body, more=fault == "short")
        if fault == "twice":
            self.send(200, body)

    def send(self, status: int, content: Any, more: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {len(data) + more}\r\n\r\n"
        self.wfile.write(head.encode() + data)
        self.wfile.flush()


def main(settings: dict[str, Any]) -> None:
    server = Server(settings)
    print(server.server_address[1], flush=True)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
