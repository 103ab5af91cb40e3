"""A live stream on a port of its own, and what a client without a browser needs."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvideo.live.clock import Clock
from fastvideo.live.page import render
from fastvideo.live.reading import Reader
from fastvideo.live.server import address, listen, serve
from fastvideo.live.session import Session
from fastvideo.tests.live.world_stream import WorldStreamer

PROMPT = "a red seven moving left"
SMALL = 4096
"""Bytes of a buffer that is full soon."""


@dataclass
class Live:
    """A running server."""

    session: Session
    port: int
    url: str
    thread: threading.Thread
    raised: list[BaseException]

    def post(self, body: Any, kind: str = "application/json", host: str = "127.0.0.1") -> tuple[int, Any]:
        """Status and answer to a prompt."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", "/prompt", text, {"content-type": kind, "host": f"{host}:{self.port}"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content.startswith(b"{") else content.decode()


@contextmanager
def live(
    seconds: float = 0.0,
    fps: float = 40.0,
    judged: bool = True,
    prompt: str = PROMPT,
    name: str = "tiny_stream",
    buffer: int | None = None,
) -> Iterator[Live]:
    """A server of the true world; ``seconds`` per chunk, and bytes that the system keeps for a connection."""
    session = Session(WorldStreamer(seconds), PROMPT, Clock(fps), Reader() if judged else None)  # type: ignore[arg-type]
    listening, raised = listen(0), []
    if buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    page = render(name, "the true world", 32, 32, fps, world=judged)

    def run() -> None:
        try:
            serve(session, page, listening)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    try:
        yield Live(session, listening.getsockname()[1], address(listening), thread, raised)
    finally:
        session.close()
        thread.join(60)
        assert not thread.is_alive(), "the server goes on after its session"


@contextmanager
def deaf(live: Live) -> Iterator[socket.socket]:
    """A page that stops reading as soon as it has joined."""
    with socket.socket() as client:
        client.settimeout(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.connect(("127.0.0.1", live.port))
        client.sendall(b"GET /events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        read = b""
        while b"hello" not in read:
            read += client.recv(64)
        yield client


class Page:
    """A client of the events, as a page is one."""

    def __init__(self, live: Live) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
        self._connection.request("GET", "/events")
        self._answer = self._connection.getresponse()
        assert self._answer.headers["content-type"].startswith("text/event-stream")
        self.number: int = self.wait("hello")["viewer"]

    def next(self) -> tuple[str, Any]:
        """The next event; ``("end", None)`` after the last."""
        name = ""
        while line := self._answer.readline():
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                return name, json.loads(value)
        return "end", None

    def wait(self, name: str) -> Any:
        """The next event of a name; those before it are dropped."""
        while True:
            found, data = self.next()
            if found == name:
                return data
            assert found != "end", f"no {name} came"

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        """Break the connection without a word."""
        self._answer.close()
        self._connection.close()
