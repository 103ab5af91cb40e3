"""Windows of long sounds: the same samples as in the whole sound, from a bounded number of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from fastvideo.data import sound_io
from fastvideo.data.faults import VideoError
from fastvideo.data.sound_io import read_sound

SECONDS = 12
STARTS = (0.0, 3.1, 4.6, 7.0133, 10.5)
FILES: dict[str, tuple[str, int, dict[str, str]]] = {
    "a.mp4": ("aac", 44_100, {"aac_pns": "0"}),  # bands of noise would be drawn anew
    "b.mkv": ("aac", 44_100, {"aac_pns": "0"}),
    "c.webm": ("libopus", 48_000, {}),
    "d.wav": ("pcm_s16le", 44_100, {}),
    "e.mp4": ("libmp3lame", 44_100, {}),
    "f.mkv": ("libmp3lame", 44_100, {}),
    "g.wav": ("pcm_s16le", 22_254, {}),  # samples of 16 kHz fall on its own every 0.5 s
}
FAST = ("a.mp4", "c.webm", "g.wav")
SHARED = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FILES]


def write(
    path: Path, codec: str, rate: int, seconds: float, options: dict[str, str], clock: Callable[[float], float]
) -> Path:
    """A rising tone in noise; ``clock`` gives the time at which the sound of a time is stored."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (300 + 50 * t) * t) + 0.05 * np.random.default_rng(0).standard_normal(len(t))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", options=options)
        as_stored = av.AudioResampler(format=stream.codec_context.format.name, layout="mono", rate=rate)
        for begin in range(0, len(t), 4096):
            samples = np.ascontiguousarray(wave[None, begin : begin + 4096], np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            (stored,) = as_stored.resample(frame)
            stored.pts, stored.time_base = round(clock(begin / rate) * rate), Fraction(1, rate)
            container.mux(stream.encode(stored))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each window that is read, True if the file was entered near it."""
    found, real = list[bool](), sound_io.entered

    def noted(*arguments: Any) -> Iterator[Any] | None:
        frames = real(*arguments)
        found.append(frames is not None)
        return frames

    monkeypatch.setattr(sound_io, "entered", noted)
    return found


def windows(path: Path, starts: tuple[float, ...], rate: int, seconds: float = 1.5) -> list[torch.Tensor]:
    return [read_sound(path, start, seconds, rate, 1).waveform for start in starts]


def from_the_beginning(path: Path, starts: tuple[float, ...], rate: int) -> list[torch.Tensor]:
    """The same windows of a sound that is never entered elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sound_io, "entered", lambda *_: None)
        return windows(path, starts, rate)


def alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SHARED)
def test_a_window_has_the_samples_of_the_whole_sound(name: str, tmp_path: Path, entries: list[bool]) -> None:
    """At its own rate, and resampled: to the bit."""
    codec, rate, options = FILES[name]
    path = write(tmp_path / name, codec, rate, SECONDS, options, lambda t: t)
    for other in (rate, 16_000):
        whole = read_sound(path, 0.0, SECONDS, other, 1).waveform
        entries.clear()
        for start, window in zip(STARTS, windows(path, STARTS, other), strict=True):
            begin = round(start * other)
            assert torch.equal(window, whole[:, :, begin : begin + window.shape[2]]), start
        assert entries == [start > 3 for start in STARTS]


@pytest.mark.parametrize(
    ("name", "gap"),
    [
        ("a.mp4", 3.3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("b.mkv", 3.3), ("b.mkv", 512_000 / 44_100)]),
    ],
)
def test_a_window_behind_a_gap_has_the_samples_of_its_time(name: str, gap: float, tmp_path: Path) -> None:
    """A sound that begins late, and a gap of any length behind 5 s or of whole frames."""
    codec, rate, options = FILES[name]
    path = write(tmp_path / name, codec, rate, SECONDS, options, lambda t: t + 0.7 + gap * (t >= 5))
    starts = tuple(gap + start for start in (7.0, 10.013))
    for other in (rate, 16_000):
        assert alike(windows(path, starts, other), from_the_beginning(path, starts, other))


def test_a_window_at_a_rate_with_one_common_sample_a_second_is_that_of_the_whole_sound(
    tmp_path: Path, entries: list[bool]
) -> None:
    """Within rounding: where a block of samples ends, the resampler may sum in another order."""
    path = write(tmp_path / "a.wav", "pcm_s16le", 44_101, SECONDS, {}, lambda t: t)
    for found, expected in zip(windows(path, STARTS, 48_000), from_the_beginning(path, STARTS, 48_000), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert entries[: len(STARTS)] == [start > 3 for start in STARTS]


@pytest.mark.parametrize(("rate", "other"), [(22_254, 16_000), (11_127, 16_000), (44_101, 48_000), (44_100, 16_000)])
def test_a_gap_alone_is_silent_and_does_not_count_as_heard(rate: int, other: int, tmp_path: Path) -> None:
    """Of 0.3 s behind the block of samples in which 5 s lie; common samples of two rates are up to 1 s apart."""
    path = write(tmp_path / "a.mkv", "pcm_s16le", rate, SECONDS, {}, lambda t: t + 0.3 * (t >= 5))
    begin = math.ceil(5 * rate / 4096) * 4096 / rate
    (found,) = windows(path, (4.0,), other, 7.0)
    silent = 4 + (found.flatten() == 0).nonzero().flatten() / other
    assert (silent[0].item(), silent[-1].item()) == pytest.approx((begin, begin + 0.3), abs=2e-3)
    assert len(silent) / other == pytest.approx(0.3, abs=2e-3)
    with pytest.raises(VideoError, match=r"its sound covers 2\.70 s of a clip of 3\.00 s"):
        windows(path, (4.0,), other, 3.0)


def test_a_clock_that_does_not_tell_a_place_is_not_trusted(tmp_path: Path, entries: list[bool]) -> None:
    """Times of whole milliseconds that jump about."""
    path = write(tmp_path / "a.mkv", "pcm_s16le", 44_100, SECONDS, {}, lambda t: t + 0.006 * (round(t * 441) % 3))
    expected = from_the_beginning(path, STARTS, 16_000)
    assert alike(windows(path, STARTS, 16_000), expected)
    assert not any(entries)


class Counting:
    """A container that counts the frames that it decodes."""

    frames = 0

    def __init__(self, container: Any) -> None:
        self._container = container

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self._container.decode(stream):
            Counting.frames += 1
            yield frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()


@pytest.mark.parametrize(
    "name", ["a.mp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("c.webm", "d.wav"))]
)
def test_the_end_of_a_long_sound_takes_no_more_frames_than_its_middle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / name, FILES[name][0], 16_000, 120, {}, lambda t: t)
    real, counts = av.open, []
    monkeypatch.setattr(sound_io.av, "open", lambda *arguments: Counting(real(*arguments)))
    for start in (20.0, 118.0):
        Counting.frames = 0
        windows(path, (start,), 16_000)
        counts.append(Counting.frames)
    assert counts[1] < 1.5 * counts[0] < 600
