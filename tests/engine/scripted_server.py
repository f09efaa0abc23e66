"""An OpenAI-compatible server over real HTTP whose replies a test scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[list[dict[str, str]], int], "str | Fault"]


@dataclass(frozen=True)
class Fault:
    """What the server does instead of replying."""

    status: int = 500
    after: str | None = None
    silent_s: float = 0.0
    body: str = '{"error": "scripted"}'


@dataclass
class Server:
    """Where it listens, and what it was asked."""

    url: str = ""
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    """A server for the block; the script gets the messages and how many calls came before."""
    state, lock, now = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(state.asked)
                state.asked.append(body["messages"])
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                state.times.append(time.monotonic())
                now[0] += 1
                state.most_at_once = max(state.most_at_once, now[0])
            try:
                self._reply(script(body["messages"], number))
            finally:
                with lock:
                    now[0] -= 1

        def _reply(self, said: str | Fault) -> None:
            if isinstance(said, Fault):
                time.sleep(said.silent_s)
                self._send(said.status, said.body.encode(), said.after)
                return
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": said},
            }
            usage = {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}
            content: dict[str, Any] = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [choice],
                "usage": usage,
            }
            self._send(200, json.dumps(content).encode(), None)

        def _send(self, status: int, body: bytes, after: str | None) -> None:
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                if after is not None:
                    self.send_header("retry-after", after)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client gave up waiting

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
