"""An endpoint on loopback that does what a test tells it, well or badly, and counts what it is asked.

It takes chats, and prompts as tokens (whose text is the list of them).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reaction = Callable[["Handler"], None]
"""What is done with one request, instead of answering it."""


@dataclass
class Endpoint:
    """``react(prompt, nth)``: the reaction to the nth time (from 1) that ``prompt`` comes; None: a good answer."""

    react: Callable[[str, int], Reaction | None] = lambda prompt, nth: None
    write: Callable[[str], str] = lambda prompt: f"answer to {prompt}"
    models: tuple[str, ...] = ("teacher", "other")
    delay: Callable[[str], float] = lambda prompt: 0.0
    usage: bool = True
    logprobs: bool = False
    most: int = 99  # completions of one prompt in one reply
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)  # prompts whose answer was written in full
    lines: list[socket.socket] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(body) for body in self.bodies]

    @property
    def asked(self) -> Counter[str]:
        return Counter(self.prompts)


def prompt_of(body: dict[str, Any]) -> str:
    """What a request asks."""
    return str(body["prompt"]) if "prompt" in body else body["messages"][0]["content"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: Endpoint
    body: dict[str, Any]

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.endpoint.lines.append(self.connection)

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send(404, "<html>Not Found</html>", "text/html")
            return
        self.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in self.endpoint.models]}))

    def do_POST(self) -> None:
        endpoint = self.endpoint
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = prompt_of(self.body)
        with endpoint.lock:
            endpoint.bodies.append(self.body)
            endpoint.keys.append(self.headers["Authorization"])
            endpoint.times.append(time.monotonic())
            nth = endpoint.asked[prompt]
            endpoint.busy += 1
            endpoint.busiest = max(endpoint.busiest, endpoint.busy)
        try:
            time.sleep(endpoint.delay(prompt))
            reaction = endpoint.react(prompt, nth)
            if reaction is None:
                self.send(200, json.dumps(self.completion(endpoint.write(prompt))))
                with endpoint.lock:
                    endpoint.answered.append(prompt)
            else:
                reaction(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with endpoint.lock:
                endpoint.busy -= 1

    def completion(self, text: str | None, **message: Any) -> dict[str, Any]:
        if "prompt" in self.body:
            count = min(self.body["n"], self.endpoint.most)
            return {"choices": [{"index": i, "text": text, "finish_reason": "stop"} for i in range(count)]}
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text, **message},
        }
        if self.endpoint.logprobs and self.body.get("logprobs"):
            top = [{"token": t, "logprob": -float(i), "bytes": None} for i, t in enumerate("ab")]
            choice["logprobs"] = {
                "content": [{"token": "a", "logprob": 0.0, "top_logprobs": top[: self.body["top_logprobs"]]}]
            }
        made: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1, "model": "teacher"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {**made, "choices": [choice], **({"usage": usage} if self.endpoint.usage else {})}

    def send(self, status: int, body: str, kind: str = "application/json", length: int = 0, **headers: str) -> None:
        """A whole reply; ``length``: how far the length that is announced is from the truth."""
        raw = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw) + length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()


def status(number: int, message: str = "no", **extra: Any) -> Reaction:
    headers = {name: extra.pop(name) for name in ("Retry_After", "Retry_After_Ms") if name in extra}
    error = json.dumps({"error": {"message": message, "type": "test", "param": None, "code": None, **extra}})
    return lambda handler: handler.send(number, error, **headers)


def drop(handler: Handler) -> None:
    """Reset the connection before a byte is sent."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    raise ConnectionResetError


def half(handler: Handler) -> None:
    """Announce a whole reply, send half of it, hang up."""
    text = json.dumps(handler.completion("x" * 200))
    handler.send(200, text[: len(text) // 2], length=len(text) // 2)
    handler.close_connection = True


def too_long(handler: Handler) -> None:
    """Announce more than is sent, and keep the line open."""
    handler.send(200, json.dumps(handler.completion("x")), length=50)
    time.sleep(1.0)
    handler.close_connection = True


def too_short(handler: Handler) -> None:
    """Announce less than is sent."""
    handler.send(200, json.dumps(handler.completion("x")), length=-50)
    handler.close_connection = True


def slow_loris(handler: Handler) -> None:
    """A byte now and then: no single read ever takes long."""
    text = json.dumps(handler.completion("x" * 1000))
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    for letter in text[:60]:
        handler.wfile.write(letter.encode())
        handler.wfile.flush()
        time.sleep(0.03)
    handler.close_connection = True


def broken_json(handler: Handler) -> None:
    handler.send(200, json.dumps(handler.completion("x"))[:-7])


def html(handler: Handler) -> None:
    handler.send(200, "<html><body>Please log in</body></html>", "text/html")


def other_json(handler: Handler) -> None:
    handler.send(200, json.dumps({"error": {"message": "upstream is gone", "code": 502}}))


def no_choices(handler: Handler) -> None:
    handler.send(200, json.dumps({**handler.completion("x"), "choices": []}))


def gateway(handler: Handler) -> None:
    handler.send(502, "<html>Bad Gateway</html>", "text/html")


def reply(text: str | None, **message: Any) -> Reaction:
    return lambda handler: handler.send(200, json.dumps(handler.completion(text, **message)))


def job(url: str, folder: Path, count: int) -> None:
    """A stage that asks ``count`` questions, in the run ``folder``."""
    from stillhouse.core.run import Run
    from stillhouse.core.stage import Generate
    from stillhouse.teachers import EndpointTeacher, Request, Retry

    retry = Retry(first=0.01, longest=0.02)
    teacher = EndpointTeacher(url, "teacher", store=folder / "answers.jsonl", concurrency=4, retry=retry)
    requests = teacher.keyed([Request.of(f"question {i}") for i in range(count)])
    Run(folder, quiet=True).execute([Generate("answers", requests, teacher.answers, together=True)])


def child(url: str, folder: Path, count: int) -> Any:
    """`job` in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=job, args=(url, folder, count), daemon=True)
    process.start()
    return process


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve until the block ends."""
    handler = type("Bound", (Handler,), {"endpoint": endpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        for line in endpoint.lines:  # kept alive between requests
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        thread.join()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
