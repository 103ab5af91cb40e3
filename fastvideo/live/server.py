"""The web server of a live stream: the page, its events, and prompts, on this machine's loopback address."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import uvicorn
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvideo.errors import UserError
from fastvideo.live.session import LONGEST, Session, Watching

HOST = "127.0.0.1"
HEARTBEAT = 10.0
"""Seconds of silence after which a page is sent an empty line, so that a broken connection is noticed."""
MOST_WAITING = 64
"""Events that may wait for a page. One that is slower is cut off, and connects again."""
PATIENCE = 2.0
"""Seconds for which a full connection may stay so before it is cut off."""
GRACE = 3
"""Seconds that pages have at the end, more than the patience with one that reads nothing."""
LARGEST = 8 * LONGEST
"""Bytes of a request."""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-store"}
RETRY = b"retry: 1000\n\n"
"""Milliseconds after which a page connects again."""


def listen(port: int) -> socket.socket:
    """A socket at the loopback address; port 0 is any free one.

    Raises:
        UserError: if the port is in use, or this user may not have it.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "in use" if error.errno == errno.EADDRINUSE else "not allowed for this user"
        hint = f"perhaps by another live stream: look at http://{HOST}:{port}, or give " if why == "in use" else "give "
        raise UserError(f"--port {port} is {why}; {hint}--port 0 for any free one") from error
    return listening


def address(listening: socket.socket) -> str:
    """The URL of a socket's page."""
    return f"http://{HOST}:{listening.getsockname()[1]}"


def serve(session: Session, page: str, listening: socket.socket) -> None:
    """Serve until Ctrl-C, or a SIGTERM that is handled as one.

    Raises:
        Exception: what made the session's worker fail.
    """
    config = uvicorn.Config(
        application(session, page),
        http=Connection,
        log_level="warning",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE,
    )
    session.start()
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has closed everything
        asyncio.run(_serve(uvicorn.Server(config), session, listening))
    session.close()
    if session.failure is not None:
        raise session.failure


class Connection(H11Protocol):
    """A connection that ends when nobody reads what it holds; what waits to be sent would wait for ever."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        self._end.cancel()
        super().resume_writing()


async def _serve(server: uvicorn.Server, session: Session, listening: socket.socket) -> None:
    ending = asyncio.create_task(_end_together(server, session))
    await server.serve(sockets=[listening])
    await ending


async def _end_together(server: uvicorn.Server, session: Session) -> None:
    """Close the session when the server is asked to stop, as that waits for its pages, and stop the server after it."""
    while not server.should_exit and not session.over:
        await asyncio.sleep(0.05)
    server.should_exit = True
    await asyncio.to_thread(session.close)


def application(session: Session, page: str) -> Starlette:
    """The routes of a session."""

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    async def events(request: Request) -> Response:
        return StreamingResponse(feed(session), media_type="text/event-stream", headers=HEADERS)

    async def prompt(request: Request) -> Response:
        return await _prompt(session, request)

    return Starlette(
        routes=[Route("/", show), Route("/events", events), Route("/prompt", prompt, methods=["POST"])],
        # A page of another site may not reach this server under a name of its own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


async def feed(session: Session) -> AsyncIterator[bytes]:
    """Events for one page, until it goes, falls behind or the session ends."""
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[bytes | None](MOST_WAITING + 1)

    def put(event: bytes | None) -> None:
        if waiting.qsize() == MOST_WAITING:
            session.leave(viewer)  # at once, as the page may never take another event
            event = None
        with suppress(asyncio.QueueFull):  # behind the end
            waiting.put_nowait(event)

    viewer = session.join(lambda event: loop.call_soon_threadsafe(put, event))
    try:
        yield RETRY
        while (event := await _next(waiting)) is not None:
            yield event
    finally:
        session.leave(viewer)


async def _next(waiting: asyncio.Queue[bytes | None]) -> bytes | None:
    try:
        return await asyncio.wait_for(waiting.get(), HEARTBEAT)
    except TimeoutError:
        return b": nothing new\n\n"


async def _prompt(session: Session, request: Request) -> Response:
    """Answer a prompt with its number; the events tell when it is applied.

    JSON is demanded because a page of another site cannot send it without being allowed to.
    """
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        return JSONResponse({"error": "content-type: application/json is expected"}, 415)
    if (body := await _body(request)) is None:
        return JSONResponse({"error": f"a request has at most {LARGEST} bytes"}, 413)
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return JSONResponse({"error": f"{where}: {first['msg']}" if where else first["msg"]}, 400)
    try:
        wish = session.ask(asked.viewer, asked.prompt, asked.kind, asked.change)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 422)
    except Watching as error:
        return JSONResponse({"error": str(error)}, 403)
    return JSONResponse({"received": wish.number, "prompt": wish.prompt, "asked": wish.asked}, 202)


class Asked(BaseModel):
    """The body of a request for another prompt."""

    model_config = ConfigDict(extra="forbid")
    viewer: int
    prompt: str
    kind: str = "switch"
    change: dict[str, str | None] | None = None


async def _body(request: Request) -> bytes | None:
    """The body of a request; ``None`` for one that is too large."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST:
            return None
    return body
