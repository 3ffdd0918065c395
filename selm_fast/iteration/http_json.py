"""One request to a server and its answer as JSON, over a connection of its own; each way to fail has a name."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

_CONNECT_S: Final = 30.0
_SHOWN: Final = 300  # characters of what a server says
_PART: Final = 65536  # bytes of an answer that are read at once
# Too many requests, or a gateway without its server.
_BUSY: Final = frozenset({429, 502, 503})
_LATER: Final = frozenset({408, 425})  # the same request may succeed later


class Away(Exception):
    """Nobody takes requests at that address now; the message says why. The request has not been looked at."""


class Failed(Exception):
    """The server took the request and gave no answer to it; the same request may succeed later."""


class Rejected(Exception):
    """The server will never answer this request (HTTP status 4xx)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Client:
    """Requests to one base URL, from any number of threads.

    A connection serves one request: whatever a server sends beyond its answer, or too late, is never read as another's.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        """key: sent as the bearer token; it is in no message."""
        self.url = url
        self._parts = urlsplit(url)
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False

    def check(self, path: str, timeout_s: float) -> None:
        """GET whose answer is its status alone. Raises Away, Failed or Rejected."""
        self._request("GET", path, None, timeout_s)

    def get(self, path: str, timeout_s: float) -> Any:
        """The answer to GET. Raises Away, Failed or Rejected."""
        return self._content(self._request("GET", path, None, timeout_s))

    def post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        """The answer to POST. Raises Away, Failed or Rejected."""
        return self._content(self._request("POST", path, json.dumps(body).encode(), timeout_s))

    def close(self) -> None:
        """Break off every request that is under way, so that servers stop working on them."""
        with self._lock:
            self._closed = True
            sockets = list(self._open)
        for connected in sockets:
            with suppress(OSError):  # it has ended in the meantime
                connected.shutdown(socket.SHUT_RDWR)

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=min(_CONNECT_S, timeout_s))
        connected = None
        try:
            try:
                connection.connect()
            except OSError as error:
                raise Away(_reason(error)) from error
            connected = connection.sock  # of the connection it is gone before the answer is read
            self._register(connected)
            try:
                connected.settimeout(timeout_s)
                until = time.monotonic() + timeout_s
                connection.request(method, f"{self._parts.path}{path}", body, self._headers)
                response = connection.getresponse()
                data = _read(response, until)
            except TimeoutError as error:
                raise Failed(f"no answer within {timeout_s:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                raise Failed(f"the connection broke ({_reason(error)})") from error
        finally:
            if connected is not None:
                with self._lock:
                    self._open.discard(connected)
            connection.close()
        self._check_status(response.status, data)
        return data

    def _register(self, connected: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise Failed("broken off")
            self._open.add(connected)

    def _check_status(self, status: int, data: bytes) -> None:
        if status in _BUSY:
            raise Away(f"HTTP {status}: {self._shown(data)}")
        if status in _LATER or status >= 500:
            raise Failed(f"HTTP {status}: {self._shown(data)}")
        if not 200 <= status < 300:
            raise Rejected(status, self._shown(data))

    def _content(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise Failed(f"its answer is not JSON ({error}): {self._shown(data)[:80]!r}") from error

    def _shown(self, data: bytes) -> str:
        """What a message repeats of an answer, which may repeat the key."""
        text = " ".join(data.decode("utf-8", "replace").split())
        return (text.replace(self._key, "[key]") if self._key else text)[:_SHOWN]


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body. Raises TimeoutError where it is not there by `until`, however steadily it drips."""
    data = bytearray()
    while part := response.read1(_PART):
        data += part
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
