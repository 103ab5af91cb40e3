"""How a page of ``fastvideo live`` experiences a stream: pace, first frame, and the wait for a new prompt.

    taskset -c 0 python benchmarks/live.py tiny_stream           # one core; one JSON object as the last line

The server is a process of its own with one torch thread; this program is the page, without a browser. Prompts change
the direction at random moments, as arrow keys do.

fps             frames per second that arrive, of --fps
late            share of chunks that arrive after the page has shown everything before them
first_frame_ms  from the request for the events to the first frame, and the model's own part
wait_frames     from a prompt to the first frame under it, in frames that are shown before it; a full buffer is 8
wait_chunks     the same in chunks
read_frames     frames of the new prompt until the judge reads the new direction; ``null`` for one that it did not read
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

PROMPT = "a red seven moving left"
DIRECTIONS = ("up", "down", "left", "right")


@dataclass
class Seen:
    """Chunks as ``(seconds, frames)``; wait and latency in frames of each prompt that was applied; latest meters."""

    chunks: list[tuple[float, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    read: list[int | None] = field(default_factory=list)
    meters: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, data: Any, now: float) -> None:
        """Note an event."""
        if name == "applied":
            self.waits.append(data["waited"])
            self.read.append(None)
        elif name == "chunk":
            self.chunks.append((now, data["count"]))
            self.meters = data["meters"]
            if self.read:
                self.read[-1] = data["latency"]


@contextmanager
def serving(model: str, fps: float) -> Iterator[int]:
    """The port of ``fastvideo live`` in a process of its own."""
    command = [sys.executable, "-m", "fastvideo.cli", "live", model]
    command += ["--prompt", PROMPT, "--port", "0", "--fps", f"{fps:g}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield next(int(line.split()[0].rpartition(":")[2]) for line in process.stdout if line.startswith("http"))
        finally:
            process.kill()  # it has nothing to save, and may not have come so far as to listen


@contextmanager
def events(port: int) -> Iterator[Iterator[tuple[str, Any]]]:
    """Events of the stream, without an end."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/events")
        with connection.getresponse() as answer:
            yield parsed(answer)


def parsed(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Names and data of the events in the lines of a ``text/event-stream``."""
    name = ""
    for line in lines:
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)


def ask(port: int, viewer: int, direction: str) -> None:
    """Change the direction."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"viewer": viewer, "prompt": PROMPT, "change": {"direction": direction}})
    connection.request("POST", "/prompt", body, {"content-type": "application/json"})
    assert connection.getresponse().status == 202
    connection.close()


def watch(port: int, seconds: float, every: float) -> tuple[Seen, float]:
    """Watch, and change the direction about ``every`` seconds; returns the milliseconds to the first frame too."""
    seen, draw, viewer = Seen(), random.Random(0), 0
    begin = time.perf_counter()
    due, directions = every, DIRECTIONS * (1 + int(seconds / every))
    with events(port) as stream:
        for name, data in stream:
            now = time.perf_counter() - begin
            viewer = data.get("viewer", viewer)
            seen.note(name, data, now)
            if now > seconds:
                break
            if now > due:
                time.sleep(draw.uniform(0.0, 0.2))
                ask(port, viewer, directions[len(seen.waits)])
                due = now + every * draw.uniform(0.8, 1.2)
    return seen, 1000 * seen.chunks[0][0]


def late_share(chunks: list[tuple[float, int]], fps: float) -> float:
    """Share of chunks that come after everything before them has been shown."""
    end, late = chunks[0][0], 0
    for at, count in chunks:
        late += at > end
        end = max(end, at) + count / fps
    return late / len(chunks)


def measure(model: str, seconds: float, fps: float, every: float) -> dict[str, Any]:
    """All figures."""
    with serving(model, fps) as port:
        seen, first = watch(port, seconds, every)
    largest = max(count for _, count in seen.chunks)
    span = seen.chunks[-1][0] - seen.chunks[2][0]
    return {
        "fps": sum(count for _, count in seen.chunks[3:]) / span,
        "could_be_fps": seen.meters["able_fps"],
        "late": late_share(seen.chunks[2:], fps),
        "first_frame_ms": {"page": first, "model": seen.meters["first_ms"]},
        "chunk_ms": seen.meters["chunk_ms"],
        "prompts": len(seen.waits),
        "wait_frames": {"median": statistics.median(seen.waits), "max": max(seen.waits)},
        "wait_chunks": {"median": statistics.median(seen.waits) / largest, "max": max(seen.waits) / largest},
        "read_frames": seen.read,
        "past_bytes": seen.meters["past_bytes"],
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a student of the tiny world that streams")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fps", type=float, default=12.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between prompts")
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.seconds, given.fps, given.every)))


if __name__ == "__main__":
    main()
