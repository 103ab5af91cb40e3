"""The judge on a stream: right on real videos, and the frame from which a new prompt is read is that of the truth."""

from __future__ import annotations

import pytest
import torch

from fastvideo.live.reading import HOLD, Reader, in_words
from fastvideo.tests.live.world_stream import WorldStreamer
from fastvideo.tiny.captions import parse_caption
from fastvideo.tiny.world import torus


def test_real_streams_are_read_at_every_frame() -> None:
    real = torus("heldout", frames=29).sample(4, seed=3)
    videos = ((real.videos + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    right, seen = 0, 0
    for video, *truth in zip(videos, real.digit, real.colour, real.direction, strict=True):
        reader = Reader()
        reader.ask(parse_caption("a digit"), 0)
        read = [one for start in range(0, 29, 4) for one in reader.see(start, video[start : start + 4])]
        assert read[:8] == [None] * 8
        assert None not in read[8:]
        right += sum(one == in_words(torch.stack(truth).tolist()) for one in read[8:])
        seen += len(read[8:])
    assert right / seen > 0.95


@pytest.mark.parametrize(("before", "after"), [("left", "up"), ("left", "right"), ("up", "down and right")])
def test_latency_of_a_switch(before: str, after: str) -> None:
    """A window of nine frames sees a new motion in most of its frames after five."""
    stream, reader = WorldStreamer().open(f"a red seven moving {before}"), Reader()
    reader.ask(parse_caption(f"a red seven moving {before}"), 0)
    frame = 0
    for chunk in range(12):
        if chunk == 6:
            assert reader.latency == 9, "the first window"
            stream.prompt(f"a red seven moving {after}")
            reader.ask(parse_caption(f"a red seven moving {after}"), frame)
            assert reader.latency is None
        frames = next(stream)
        reader.see(frame, frames)
        frame += len(frames)
    assert reader.latency is not None
    assert 5 <= reader.latency <= 9


def test_what_is_not_read_for_some_frames_does_not_count() -> None:
    stream, reader = WorldStreamer().open("a red seven moving left"), Reader()
    reader.ask(parse_caption("a red seven moving left"), 0)
    for start in range(0, 8 + HOLD - 1):
        reader.see(start, next(stream)[:1])
        assert reader.latency is None
    reader.see(8 + HOLD - 1, next(stream)[:1])
    assert reader.latency == 9


def test_a_cut_forgets_the_frames_before_it() -> None:
    stream, reader = WorldStreamer().open("a red seven moving left"), Reader()
    for start in range(0, 12, 4):
        reader.see(start, next(stream))
    reader.ask(parse_caption("a digit"), 12, cut=True)
    assert reader.see(12, next(stream)) == [None] * 4
