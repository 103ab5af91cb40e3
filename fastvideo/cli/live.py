"""``fastvideo live``: a page that plays a stream while it is made, and steers it."""

from __future__ import annotations

import signal
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import tyro

from fastvideo.cli.arguments import (
    INT,
    OptionalArithmetic,
    OptionalFrames,
    OptionalPath,
    OptionalText,
    Switch,
    parse,
)
from fastvideo.cli.console import patience
from fastvideo.errors import UserError
from fastvideo.ranges import Seed
from fastvideo.sampling_ranges import FrameRate, Port, Workers

if TYPE_CHECKING:
    from fastvideo.live.session import Session

FIRST_PROMPT = "a red seven moving left"
"""First prompt of a model of the tiny world."""


@dataclass(frozen=True)
class LiveArguments:
    """Play a streaming student on a page of this machine, in real time, and steer it with prompts while it plays."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a student that streams, a hub id, or `tiny_stream` for the one that ships with this package."""
    prompt: OptionalText = None
    """First prompt. Default for a model of the tiny world: "a red seven moving left"."""
    image: OptionalPath = None
    """Image (or clip, up to the length of the model's videos) that the stream goes on from; scaled and cropped."""
    port: Port = 8321
    """Port at 127.0.0.1, the only address; 0 for any free one."""
    fps: FrameRate = 12.0
    """Frames per second that are shown; real Wan plays at 16."""
    seed: Seed = 0
    """Same seed and prompts, same video."""
    window: OptionalFrames = None
    """Latent frames of the past that a chunk sees, instead of those of the training."""
    device: str = "cpu"
    """Device: cpu, cuda, mps."""
    precision: OptionalArithmetic = None
    """Precision that the network is held and computed in; bfloat16 takes half of the memory. Default: the model's own
    (`precision` in its recipe), else float32."""
    threads: Annotated[Workers | None, INT] = None
    """Threads of the CPU for the model. Default: 1 for a model of the tiny world, which more do not help; else all."""
    open: Switch = False
    """Open the page in this machine's browser."""


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code."""
    arguments = parse(LiveArguments, argv, "live")
    _check_extra()
    from fastvideo.live.server import address, listen, serve

    with listen(arguments.port) as listening:
        with patience("loading the model"):
            session, page = _prepare(arguments)
        url = address(listening)
        print(f"{session.streamer.describe()}\n{url}  (Ctrl-C ends it)", flush=True)
        if arguments.open and not webbrowser.open(url):
            print("no browser was found here: open the address in one", flush=True)
        with _ending_alike():
            serve(session, page, listening)
    print(f"ended after {session.frames} frames")
    return 0


@contextmanager
def _ending_alike() -> Iterator[None]:
    """Let SIGTERM end as Ctrl-C does: the server closes everything and then raises its signal again."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_extra() -> None:
    """Check that the packages of the extra are there.

    Raises:
        UserError: with the command that installs them.
    """
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'fastvideo-distillation[live]'")


def _prepare(arguments: LiveArguments) -> tuple[Session, str]:
    """Load the model; returns a session and its page.

    Raises:
        UserError: for a model that cannot stream, or a prompt that it cannot take.
    """
    import torch

    from fastvideo.inference.first_frames import read_beginning
    from fastvideo.inference.loading import open_model, with_network
    from fastvideo.inference.streaming import Streamer, window_note, with_window
    from fastvideo.live.clock import Clock
    from fastvideo.live.page import render
    from fastvideo.live.reading import Reader
    from fastvideo.live.session import Session

    options = {} if arguments.precision is None else {"precision": arguments.precision}
    opened = open_model(arguments.folder, options, arguments.device)
    given = None if arguments.image is None else read_beginning(arguments.image, opened)
    model = with_network(opened)
    if note := window_note(model.sampler(), arguments.window):
        print(note, file=sys.stderr)
    streamer, world = Streamer(model, with_window(model.sampler(), arguments.window), arguments.seed), model.is_embedded
    if threads := arguments.threads or (1 if world else None):
        torch.set_num_threads(threads)
    prompt = FIRST_PROMPT if arguments.prompt is None and world else arguments.prompt
    if prompt is None:
        raise UserError(f"--prompt: the first prompt is needed, as {arguments.folder} is no model of the tiny world")
    session = Session(streamer, prompt, Clock(arguments.fps), Reader() if world else None, given)
    with streamer.open(prompt) as stream:  # libraries choose and compile kernels in the first chunks
        height, width = next(stream).shape[1:3]
        next(stream)
    return session, render(arguments.folder, streamer.describe(), width, height, arguments.fps, world)
