"""Times and streams of real files: the frames that ffmpeg takes, in every container, and cuts where a clock jumps."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice, repeat
from pathlib import Path

import av
import numpy as np
import pytest

from fastvideo.data.clips import Clip, Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.data.footage import open_footage, resampled
from fastvideo.tests.data.footage_files import (
    CODECS,
    FFMPEG,
    chosen,
    corners,
    grey,
    greys_of_program,
    with_matrix,
    write,
)

RATES = [(16, 16), (24, 16), (30, 16), (60, 16), (25, 24)]
TIES = [(30, 15), (60, 30), (24, 30)]
"""Rates at which frames lie just between two; ``ffmpeg`` chooses by how the container rounded them."""
COUNT = 32
QUALITY = {".avi": {"qmin": 1, "qmax": 1}}


def levels(path: Path, fps: float | None) -> list[float]:
    """Mean grey of each frame at a rate."""
    with open_footage(path) as footage:
        shots = footage.shots if fps is None else (resampled(s, footage.tick, fps) for s in footage.shots)
        return [float(frame.to_ndarray(format="gray").mean()) for frame in chain.from_iterable(shots)]


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("suffix", CODECS)
def test_frames_at_every_rate_are_those_of_ffmpeg(suffix: str, b_frames: int, tmp_path: Path) -> None:
    """AVI has one clock, that of decoding: with B-frames its first frame is shown one late, for ffmpeg too."""
    delay = 1 if b_frames and suffix == ".avi" else 0
    for rate in sorted({rate for rate, _ in RATES + TIES}):
        path = numbered(tmp_path / f"{rate}{suffix}", rate, b_frames)
        own = levels(path, None)
        assert len(own) == COUNT
        assert (np.diff(own) > 0).all()
        for fps in [fps for source, fps in RATES + TIES if source == rate]:
            expected = [own[number] for number in chosen(COUNT, rate, fps, delay)]
            assert levels(path, fps) == expected, (rate, fps)


@pytest.mark.slow
@pytest.mark.skipif(FFMPEG is None, reason="no program named ffmpeg on the path")
@pytest.mark.parametrize("suffix", CODECS)
def test_frames_at_every_rate_are_those_of_the_program(suffix: str, tmp_path: Path) -> None:
    for rate, fps in RATES:
        for b_frames in (0, 2):
            path = numbered(tmp_path / f"{rate}-{b_frames}{suffix}", rate, b_frames)
            np.testing.assert_allclose(levels(path, fps), greys_of_program(path, fps), atol=1.5, err_msg=path.name)


def numbered(path: Path, rate: int, b_frames: int) -> Path:
    return write(path, COUNT, rate, grey, b_frames=b_frames, **QUALITY.get(path.suffix, {}))


def test_avi_with_b_frames_of_h264_comes_out_in_order(tmp_path: Path) -> None:
    """libavformat gives its frames the times 1, 3, 4, 2, 6: at its own rate each has to come once."""
    path = write(tmp_path / "a.avi", COUNT, 24, grey, codec="libx264", b_frames=2)
    assert levels(path, 24) == levels(path, None)
    assert len(levels(path, 24)) == COUNT


@pytest.mark.parametrize("start", [0, 700])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_follows_the_clock(suffix: str, start: int, tmp_path: Path) -> None:
    times = (start + np.cumsum([0, 10, 120, 33, 33, 90, 400, 20, 20, 20, 34, 33])).tolist()
    path = write(tmp_path / f"a{suffix}", 12, 24, grey, milliseconds=times)
    own = levels(path, None)
    shown = [own.index(level) for level in levels(path, 10.0)]
    # Each time rounds to a tenth of a second, and the last frame of a tenth is shown.
    tenths = [int((time - (0 if suffix == ".mkv" else start)) / 100 + 0.5) for time in times]
    wanted = [max(i for i, tenth in enumerate(tenths) if tenth <= due) for due in range(tenths[0], tenths[-1] + 1)]
    assert shown[: len(wanted)] == wanted
    assert len(shown) - len(wanted) <= 1


def clips(path: Path, frames: int = 5, **options: object) -> list[Clip]:
    return list(read_clips(path, Policy((Size(32, 32, frames),), **options)))  # type: ignore[arg-type]


def numbers(found: list[Clip]) -> list[list[int]]:
    """Source frames of each clip, by their grey."""
    return [[round((frame.mean() - 8) / 5) for frame in clip.frames] for clip in found]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("jump", [7_200_000, 5_000, 2_000])
def test_a_gap_in_the_clock_is_cut_and_not_filled(jump: int, suffix: str, tmp_path: Path) -> None:
    """Six frames, a gap, six frames: no clip holds frames of both sides, or one frame again and again."""
    times = [125 * i + (jump if i >= 6 else 0) for i in range(12)]
    path = write(tmp_path / f"a{suffix}", 12, 8, grey, milliseconds=times, codec="ffv1" if suffix == ".mkv" else None)
    for fps in (None, 8.0):
        found = clips(path, fps=fps, every_clip=True)
        assert numbers(found) == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
        assert [clip.number for clip in found] == [0, 1]
        assert [clip.fps for clip in found] == [8.0, 8.0]
        assert [clip.start for clip in found] == [0.0, None], "the place of its sound is not known behind the gap"


def test_a_late_last_frame_does_not_stay_on_screen(tmp_path: Path) -> None:
    times = [125 * i for i in range(11)] + [7_577_500]
    path = write(tmp_path / "a.mkv", 12, 8, grey, milliseconds=times)
    assert numbers(clips(path, fps=8.0, every_clip=True)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_beginning_that_is_too_short_gives_way_to_what_follows_the_gap(tmp_path: Path) -> None:
    times = [125 * i + (9_000 if i >= 3 else 0) for i in range(12)]
    path = write(tmp_path / "a.mkv", 12, 8, grey, milliseconds=times)
    assert numbers(clips(path)) == [[3, 4, 5, 6, 7]]
    with pytest.raises(VideoError, match=r"too short: 9 frames in the longest of 2 parts between jumps"):
        clips(path, frames=10)


def test_a_slow_clock_has_no_gaps(tmp_path: Path) -> None:
    """One picture every two seconds, as in a slide show: that is its rate, although the file says 8 per second."""
    path = write(tmp_path / "a.mkv", 6, 8, grey, milliseconds=[2000 * i for i in range(6)])
    assert numbers(clips(path, fps=1.0)) == [[1, 1, 2, 2, 3]]


def test_frames_without_times_follow_each_other_at_the_rate() -> None:
    from fastvideo.data.footage import Clock

    clock = Clock(Fraction(1, 1000), Fraction(8))
    frames = [av.VideoFrame(2, 2, "gray") for _ in range(4)]
    assert [clock.stamp(frame) for frame in frames] == [0, 0, 0, 0]
    assert [frame.pts * clock.tick for frame in frames] == [0, Fraction(1, 8), Fraction(2, 8), Fraction(3, 8)]


def test_a_long_video_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first clip needs no more frames than it has, and a few that the decoder holds back."""
    import fastvideo.data.footage as footage

    decoded = 0
    stamp = footage.Clock.stamp

    def counted(clock: footage.Clock, frame: object) -> int:
        nonlocal decoded
        decoded += 1
        return stamp(clock, frame)

    monkeypatch.setattr(footage.Clock, "stamp", counted)
    path = write(tmp_path / "a.mkv", 200, 24, lambda i: grey(i % 40))
    stream = read_clips(path, Policy((Size(32, 32, 5),), fps=24.0, every_clip=True))
    assert len(list(islice(stream, 3))) == 3
    assert decoded <= 20


def two_streams(path: Path, pictures: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in pictures]
        for stream, picture in zip(streams, pictures, strict=True):
            stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        for frame in chain(repeat(0, 8), [None]):
            for stream, picture in zip(streams, pictures, strict=True):
                made = None if frame is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(made))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_the_largest_stream_is_taken_and_not_the_first(suffix: str, tmp_path: Path) -> None:
    small, large = np.full((32, 32, 3), 60, np.uint8), np.full((64, 96, 3), 200, np.uint8)
    (clip,) = clips(two_streams(tmp_path / f"a{suffix}", [small, large]))
    assert abs(int(clip.frames.mean()) - 200) < 4


TURNS = {
    "upright": (1, 0, 0, 1), "right": (0, 1, -1, 0), "half": (-1, 0, 0, -1), "left": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1), "flipped": (1, 0, 0, -1), "transposed": (0, 1, 1, 0), "crossed": (0, -1, -1, 0),
}  # fmt: skip


@pytest.mark.parametrize("fps", [None, 12.0])
@pytest.mark.parametrize("name", TURNS)
def test_every_display_matrix_shows_what_a_player_shows(name: str, fps: float | None, tmp_path: Path) -> None:
    """The pixel at (x, y) goes to (a x + c y, b x + d y), counted from the edge that it ends at."""
    a, b, c, d = TURNS[name]
    base = write(tmp_path / "base.mp4")
    (plain,) = read_clips(base, Policy((Size(64, 96, 3),)))
    y, x = np.mgrid[:64, :96]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    expected = np.zeros((down.max() + 1, across.max() + 1, 3), np.uint8)
    expected[down, across] = plain.frames[0] if fps is None else read(base, fps)
    turned = with_matrix(base, tmp_path / "turned.mp4", TURNS[name])
    (clip,) = read_clips(turned, Policy((Size(*expected.shape[:2], 3),), fps=fps))
    np.testing.assert_array_equal(clip.frames[0], expected)


def read(path: Path, fps: float) -> np.ndarray:
    return next(read_clips(path, Policy((Size(64, 96, 3),), fps=fps))).frames[0]


def test_a_turn_by_another_angle_is_listed(tmp_path: Path) -> None:
    turned = with_matrix(write(tmp_path / "a.mp4"), tmp_path / "b.mp4", (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(VideoError, match="turned by 30 degrees"):
        clips(turned)


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_fields_become_whole_frames(order: str, tmp_path: Path) -> None:
    """A bar moves between the fields: what is taken has no comb, and a file that is not marked stays as it is."""

    def fields(number: int) -> np.ndarray:
        picture = np.zeros((64, 96, 3), np.uint8)
        for line in range(64):
            late = (line % 2 == 1) == (order == "tff")
            at = 8 * number + 4 * late
            picture[line, at : at + 16] = 255
        return picture

    def comb(frames: np.ndarray) -> float:
        lines = frames[..., 0].astype(float)
        return float(np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean())

    def taken(path: Path, fps: float | None) -> np.ndarray:
        return next(read_clips(path, Policy((Size(64, 96, 6),), fps=fps))).frames

    marked = write(tmp_path / "a.mp4", 10, 25, fields, options={"x264-params": f"{order}=1", "crf": "1"})
    plain = write(tmp_path / "b.mp4", 10, 25, fields, options={"crf": "1"})
    for fps in (None, 25.0):
        assert comb(taken(plain, fps)) > 10 * comb(taken(marked, fps))


def frames_of(path: Path) -> Iterator[Clip]:
    return read_clips(path, Policy((Size(64, 96, 5),)))


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    plain, cover = write(tmp_path / "plain.mp4"), tmp_path / "cover.mp4"
    only = tmp_path / "only.m4v"
    for path, with_video in ((cover, True), (only, False)):
        with av.open(str(plain)) as source, av.open(str(path), "w", format="mp4") as out:
            picture = out.add_stream("mjpeg", rate=24)
            picture.height, picture.width, picture.pix_fmt = 128, 192, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
            copied = out.add_stream_from_template(source.streams.video[0]) if with_video else None
            frame = av.VideoFrame.from_ndarray(np.zeros((128, 192, 3), np.uint8), format="rgb24")
            out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
            for packet in source.demux(video=0) if copied else ():
                if packet.dts is not None:
                    packet.stream = copied
                    out.mux(packet)
    assert next(frames_of(cover)).frames[0].mean() > 50
    with pytest.raises(VideoError, match="only a cover picture"):
        next(frames_of(only))


def test_what_is_damaged_is_not_in_a_clip(tmp_path: Path) -> None:
    """A cut file gives the whole frames before the cut, or its reason."""
    path = write(tmp_path / "a.mkv", 40, 8, corners, codec="mpeg4")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    found = list(read_clips(path, Policy((Size(64, 96, 5),), every_clip=True)))
    assert 1 <= len(found) < 8
    path.write_bytes(data[:200])
    with pytest.raises(VideoError, match=r"cannot be decoded|no "):
        next(frames_of(path))
