"""One stream that a worker thread makes, and the pages that watch it.

The worker makes chunks while somebody watches and there is room in the play-out buffer; otherwise it sleeps. The first
page drives: its prompts are obeyed before the next chunk. Nothing here knows HTTP.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fastvideo.errors import UserError
from fastvideo.inference.stream_stats import StreamStats
from fastvideo.inference.streaming import Streamer
from fastvideo.inference.video_stream import Frames, VideoStream
from fastvideo.live.clock import Clock
from fastvideo.live.reading import Reader
from fastvideo.live.sprites import sprite
from fastvideo.live.steering import Asked, asked, attributes_of, changed
from fastvideo.sampling_ranges import ON_SWITCH
from fastvideo.wording import did_you_mean

Kind = Literal["switch", "cut", "again"]
"""Ways to take a prompt: go on with the scene, begin another one, or start over from the first noise."""
Send = Callable[[bytes | None], object]
"""Takes events for a page from any thread and never waits; ``None`` is the end."""
LONGEST = 2000
"""Characters of a prompt."""


class Watching(Exception):
    """A page that only watches asked for something."""


@dataclass(frozen=True)
class Wish:
    """A prompt that was received.

    Attributes:
        asked: its attributes in words, for a model of the tiny world.
        shown: frame that the pages showed then.
    """

    number: int
    prompt: str
    kind: Kind
    asked: Asked | None
    shown: float


def event(name: str, **data: Any) -> bytes:
    """One message of a ``text/event-stream``."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Session:
    """A live stream with its pages.

    Args:
        streamer: the model.
        prompt: of the first frames.
        given: uint8 ``[n, H, W, 3]`` that the stream goes on from, each time that it begins.
        clock: of the play-out.
        reader: the judge, for a model of the tiny world.

    Raises:
        UserError: for a prompt that the model cannot take.
    """

    def __init__(
        self,
        streamer: Streamer,
        prompt: str,
        clock: Clock,
        reader: Reader | None = None,
        given: Frames | None = None,
    ) -> None:
        self.streamer, self._clock, self._reader = streamer, clock, reader
        self._changed = threading.Condition()
        self._viewers: dict[int, Send] = {}
        self._numbers = itertools.count(1)
        self._waiting: Wish | None = None
        self._frame, self._latest, self._closed = 0, b"", False
        self._obeyed, self._obeyed_at = self._wish(prompt, "again", {}), 0
        self.failure: Exception | None = None
        self._opening = streamer.open(prompt, given=given).snapshot()
        self._stream: VideoStream | None = None
        self._worker = threading.Thread(target=self._work, name="live", daemon=True)

    def start(self) -> None:
        """Let the worker begin as soon as somebody watches."""
        self._worker.start()

    def close(self) -> None:
        """Stop the worker after its chunk, and tell all pages."""
        with self._changed:
            for send in () if self._closed else self._viewers.values():
                self._dismiss(send)
            self._closed = True
            self._changed.notify_all()
        if self._worker.is_alive():
            self._worker.join()

    @property
    def frames(self) -> int:
        """Frames made so far."""
        return self._frame

    @property
    def over(self) -> bool:
        """True once the session is closed or its worker has failed."""
        return self._closed or self.failure is not None

    def join(self, send: Send) -> int:
        """Let a page watch; returns its number. The first one drives."""
        with self._changed:
            viewer = next(self._numbers)
            self._viewers[viewer] = send
            now = self._obeyed
            send(event("hello", viewer=viewer, prompt=now.prompt, asked=now.asked, asked_at=self._obeyed_at))
            if self._latest:
                send(self._latest)
            if self._closed:
                self._dismiss(send)
            self._tell_roles()
            self._changed.notify_all()
            return viewer

    def leave(self, viewer: int) -> None:
        """Forget a page that has gone; if it drove, the one that has watched longest drives now."""
        with self._changed:
            if self._viewers.pop(viewer, None) is not None:
                self._tell_roles()

    def ask(self, viewer: int, prompt: str, kind: str = "switch", change: Mapping[str, Any] | None = None) -> Wish:
        """Receive a prompt; it is obeyed before the next chunk, unless another one comes before that.

        Args:
            change: other words for attributes of the prompt, ``{"direction": "left"}``, for a model of the tiny world.

        Raises:
            Watching: if another page drives.
            UserError: for a prompt or a change that the model cannot take, or an unknown kind.
        """
        with self._changed:
            if viewer != next(iter(self._viewers), None):
                raise Watching("another page drives this stream; this one watches")
            before, self._waiting = self._waiting, self._wish(prompt, kind, change or {})
            if before is not None:
                self._publish("replaced", id=before.number, by=self._waiting.number)
            return self._waiting

    def _wish(self, prompt: str, kind: str, change: Mapping[str, Any]) -> Wish:
        if kind not in (kinds := get_args(Kind)):
            raise UserError(f"kind: one of {', '.join(kinds)} is expected, got {kind!r}{did_you_mean(kind, kinds)}")
        if len(prompt) > LONGEST:
            raise UserError(f"a prompt has at most {LONGEST} characters, got {len(prompt)}")
        if not prompt.strip():
            raise UserError("the prompt is empty")
        if self._reader is None and change:
            raise UserError("change: only prompts of the tiny world are changed by attribute")
        text = changed(prompt, change) if change else prompt.strip()
        words = None if self._reader is None else asked(attributes_of(text))
        shown = max(0.0, self._frame - self._clock.ahead)
        return Wish(next(self._numbers), text, cast(Kind, kind), words, shown)

    def _work(self) -> None:
        """Obey and make until the session is closed; a failure is kept for the main thread and told to the pages."""
        try:
            while self._wait_for_turn():
                self._obey()
                self._make(self._stream or self._begin(self._obeyed))
        except Exception as error:
            with self._changed:
                self.failure = error
                self._publish("failed", message=str(error) or type(error).__name__)

    def _wait_for_turn(self) -> bool:
        """Sleep until a chunk is wanted; false when the session is closed."""
        with self._changed:
            while not self._closed:
                if not self._viewers:
                    self._changed.wait()
                elif wait := self._clock.wait:
                    self._changed.wait(wait)
                else:
                    return True
            return False

    def _obey(self) -> None:
        """Give the latest prompt to the stream; one that it refuses changes nothing."""
        with self._changed:
            wish, self._waiting = self._waiting, None
        if wish is None:
            return
        try:
            self._begin(wish)
        except UserError as error:
            with self._changed:
                self._publish("refused", id=wish.number, message=str(error))
            return
        with self._changed:
            self._obeyed, self._obeyed_at = wish, self._frame
            waited = self._frame - wish.shown
            self._publish(
                "applied", id=wish.number, prompt=wish.prompt, asked=wish.asked, frame=self._frame, waited=waited
            )

    def _begin(self, wish: Wish) -> VideoStream:
        """Let the next chunk be the first one under a prompt."""
        stream = self._stream
        if stream is None or wish.kind == "again":
            stream = self.streamer.resume(self._opening)
            stream.prompt(wish.prompt, on_switch="keep")
        else:
            stream.prompt(wish.prompt, on_switch="cut" if wish.kind == "cut" else ON_SWITCH)
        self._stream = stream
        if self._reader is not None:
            self._reader.ask(attributes_of(wish.prompt), self._frame, cut=wish.kind != "switch")
        return stream

    def _make(self, stream: VideoStream) -> None:
        """Make one chunk and show it."""
        frames = next(stream)
        image, first = sprite(frames), self._frame
        read = None if self._reader is None else self._reader.see(first, frames)
        latency = None if self._reader is None else self._reader.latency
        with self._changed:
            self._frame += len(frames)
            self._clock.arrived(len(frames))
            meters = self._meters(stream.stats)
            self._latest = self._publish(
                "chunk", frame=first, count=len(frames), sprite=image, read=read, latency=latency, meters=meters
            )

    def _meters(self, stats: StreamStats) -> dict[str, Any]:
        parts = (("denoise", stats.denoise_ms), ("commit", stats.commit_ms), ("decode", stats.decode_ms))
        return {
            "full": self._clock.full,
            "able_fps": stats.fps,
            "chunk_ms": stats.chunk_ms,
            "parts": parts,
            "first_ms": stats.first_frame_ms,
            "past_bytes": stats.past_bytes,
        }

    def _dismiss(self, send: Send) -> None:
        """Tell a page that nothing more comes."""
        send(event("bye"))
        send(None)

    def _publish(self, name: str, **data: Any) -> bytes:
        """Send an event to every page; the caller holds the lock."""
        encoded = event(name, **data)
        for send in self._viewers.values():
            send(encoded)
        return encoded

    def _tell_roles(self) -> None:
        for index, send in enumerate(self._viewers.values()):
            send(event("role", drives=index == 0, viewers=len(self._viewers)))
