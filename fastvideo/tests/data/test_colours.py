"""HDR, wide gamuts and transparency on a screen of today, against the standards' own numbers."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc

from fastvideo.data.clips import Policy, Size, read_clips
from fastvideo.data.colours import check_colours, is_wide, parse_colour, to_bt709
from fastvideo.data.faults import VideoError
from fastvideo.errors import UserError
from fastvideo.tests.data.footage_files import half_transparent, write

SIZE = Size(64, 96, 5)


def tagged(transfer: int, primaries: int = ColorPrimaries.BT2020, matrix: int = 9) -> av.VideoFrame:
    frame = av.VideoFrame(2, 2, "yuv420p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace = transfer, primaries, matrix
    return frame


def grey(signal: float, transfer: int) -> int:
    pixel = np.full((1, 1, 3), round(signal * 65535), np.uint16)
    low, high = np.sort(to_bt709(pixel, tagged(transfer)).ravel())[[0, -1]]
    assert high - low <= 1
    return int(high)


@pytest.mark.parametrize(
    ("transfer", "signal", "light"),
    [
        (ColorTrc.SMPTE2084, 0.0, 0.0),
        (ColorTrc.SMPTE2084, 0.58069, 1.0),  # 203 nits, BT.2408 table 1: 58 %
        (ColorTrc.SMPTE2084, 0.50808, 100 / 203),  # 100 nits
        (ColorTrc.SMPTE2084, 1.0, 1.0),  # 10,000 nits clip
        (ColorTrc.ARIB_STD_B67, 0.0, 0.0),
        (ColorTrc.ARIB_STD_B67, 0.75, 1.0),  # reference white, BT.2408: 75 %
        (ColorTrc.ARIB_STD_B67, 0.5, (1000 / 203) * (1 / 12) ** 1.2),  # the bend of the curve
        (ColorTrc.BT2020_10, 0.5, 0.5**2.4),
    ],
)
def test_grey_has_the_light_that_the_standard_names(transfer: int, signal: float, light: float) -> None:
    assert abs(grey(signal, transfer) - 255 * light ** (1 / 2.4)) <= 1


def test_red_of_bt709_within_a_wide_gamut_is_red() -> None:
    """BT.2087: linear red of BT.709 is (0.6274, 0.0691, 0.0164) in BT.2020, and (0.8225, 0.0332, 0.0171) in P3."""
    for primaries, red in (
        (ColorPrimaries.BT2020, (0.6274, 0.0691, 0.0164)),
        (ColorPrimaries.SMPTE432, (0.8225, 0.0332, 0.0171)),
    ):
        signal = (np.array(red) ** (1 / 2.4) * 65535).round().astype(np.uint16)[None, None]
        shown = to_bt709(signal, tagged(ColorTrc.BT709, primaries))[0, 0]
        assert shown[0] >= 254
        assert shown[1:].max() <= 12  # a thousandth of the light


def test_only_wide_colours_are_converted() -> None:
    assert is_wide(tagged(ColorTrc.ARIB_STD_B67, ColorPrimaries.UNSPECIFIED))
    assert is_wide(tagged(ColorTrc.BT709, ColorPrimaries.BT2020))
    assert not is_wide(tagged(ColorTrc.BT709, ColorPrimaries.BT709))
    assert not is_wide(tagged(ColorTrc.UNSPECIFIED, ColorPrimaries.SMPTE170M))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (tagged(ColorTrc.SMPTE2084, matrix=14), "colour matrix .number 14"),
        (tagged(ColorTrc.SMPTE2084, matrix=10), "colour matrix .number 10"),
        (tagged(ColorTrc.BT709, matrix=8), "colour matrix .number 8"),
        (tagged(ColorTrc.LINEAR), "linear light"),
        (tagged(ColorTrc.BT709, ColorPrimaries.SMPTE428), "CIE XYZ"),
    ],
)
def test_what_cannot_be_converted_is_listed(frame: av.VideoFrame, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        check_colours(frame)


TRANSPARENT = [
    ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("a.webm", "libvpx-vp9", "yuva420p", {}),
    ("a.mkv", "libvpx-vp9", "yuva420p", {}),
    ("a.mov", "prores_ks", "yuva444p10le", {}),
    ("a.mov", "qtrle", "argb", {}),
    ("a.mov", "png", "rgba", {}),
    ("a.mkv", "ffv1", "bgra", {}),
]


@pytest.mark.parametrize(("name", "codec", "pixels", "options"), TRANSPARENT)
def test_transparent_pixels_show_the_background(
    name: str, codec: str, pixels: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / name, 6, 8, half_transparent, codec, pixels, options)
    opaque = np.array(half_transparent(2)[32, 80, :3], int)
    for background in ((0, 0, 0), (255, 255, 255), (10, 200, 30)):
        frame = next(read_clips(path, Policy((SIZE,), background=background))).frames[2].astype(int)
        assert np.abs(frame[32, 10] - background).max() <= 3
        assert np.abs(frame[32, 80] - opaque).max() <= 20


def test_hidden_colours_do_not_bleed_at_an_edge_that_is_made_smaller(tmp_path: Path) -> None:
    """Transparent white beside opaque black, over black."""

    def picture(_: int) -> np.ndarray:
        pixels = np.zeros((64, 96, 4), np.uint8)
        pixels[:, :45], pixels[:, 45:, 3] = (255, 255, 255, 0), 255
        return pixels

    path = write(tmp_path / "a.mkv", 6, 8, picture, "ffv1", "bgra")
    assert next(read_clips(path, Policy((Size(16, 24, 5),)))).frames.max() == 0


def test_a_background_is_a_name_or_a_number() -> None:
    assert parse_colour("white") == (255, 255, 255)
    assert parse_colour("#0a141e") == (10, 20, 30)
    with pytest.raises(UserError, match="'blak' is no colour"):
        parse_colour("blak")
