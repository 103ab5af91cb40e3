"""Figures of a stream: read from any thread, and right for decoders that wait."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from fastvideo.inference.stream_stats import RECENT, Clock


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that interrupt each other as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_figures_are_read_while_another_thread_makes_chunks() -> None:
    clock, over = Clock(torch.device("cpu")), threading.Event()

    def make() -> None:
        while not over.is_set():
            with clock.part("denoise"):
                pass
            clock.finish(4)

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    try:
        while (figures := clock.read(0, 0, 0)).chunks < 200 * RECENT:
            pass
    finally:
        over.set()
        maker.join(60)
    assert not maker.is_alive()
    assert figures.denoise_ms > 0


def test_the_first_frame_comes_with_the_first_frames() -> None:
    """A decoder may wait for another chunk before it gives any."""
    clock = Clock(torch.device("cpu"))
    clock.finish(0)
    waiting = clock.read(0, 0, 0)
    assert (waiting.chunks, waiting.first_frame_ms) == (1, None)
    clock.finish(4)
    first = clock.read(4, 0, 0).first_frame_ms
    assert first is not None
    clock.finish(4)
    assert clock.read(8, 0, 0).first_frame_ms == first
