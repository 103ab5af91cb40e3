"""A real S3-compatible server on this machine (moto's), behind a proxy that can be cut in the middle of an upload."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
"""Program of the server: prints its port, and ends with the process that started it."""


class Proxy:
    """Forwards a free local port to another one, until it is cut: then every connection breaks, as when a server dies.

    Attributes:
        upload_limit: bytes from clients after which it cuts itself; ``None`` for no limit.
        uploaded: bytes from clients so far.
        deaths: number of cuts.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.uploaded, self.deaths = target, 0, 0
        self.upload_limit: int | None = None
        self._counting = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.dead = threading.Event()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                self._open |= {client, server}
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(one, other, one is client), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if upwards and self._reached_limit(len(data)):
                    self.cut()
                    return
                sink.sendall(data)
        for end in (source, sink):
            self._close(end)

    def _reached_limit(self, more: int) -> bool:
        """Count bytes from clients; true once, for the one connection that reaches the limit."""
        with self._counting:
            self.uploaded += more
            reached = self.upload_limit is not None and self.uploaded > self.upload_limit
            if reached:
                self.upload_limit = None
            return reached

    def _close(self, end: socket.socket) -> None:
        self._open.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def cut(self) -> None:
        """Break every connection and accept no more."""
        self.deaths += 1
        self.dead.set()
        for end in (self._listener, *list(self._open)):
            self._close(end)

    def mend(self) -> None:
        """Listen at the same port again."""
        self._open.clear()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.dead.clear()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()


@contextlib.contextmanager
def s3_server(program: str = SERVER, seconds: float = 120.0) -> Iterator[Proxy]:
    """Run a server; yields its proxy.

    Raises:
        AssertionError: if it does not serve in time, with what it printed.
    """
    command = [sys.executable, "-W", "ignore", "-c", program]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        try:
            proxy = Proxy(("127.0.0.1", port_of(process, Path(log.name), seconds)))
            try:
                yield proxy
            finally:
                proxy.cut()
        finally:
            process.kill()
            process.communicate(timeout=60)


def port_of(process: subprocess.Popen[bytes], log: Path, seconds: float) -> int:
    """The port that a server printed."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(r"^port (\d+)\n", log.read_text(), re.MULTILINE)):
        goes_on = time.monotonic() < deadline and process.poll() is None
        assert goes_on, f"no server within {seconds} s, exit code {process.poll()}:\n{log.read_text()}"
        time.sleep(0.02)
    return int(found[1])


def environment(proxy: Proxy) -> dict[str, str]:
    """Environment of a program that uses the server: it answers at once instead of trying for long."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
