"""Colours of a decoded frame as BT.709 for a screen of today: what HDR, wide gamuts and transparency become."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import ImageColor

from fastvideo.data.faults import VideoError
from fastvideo.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
WHITE_NITS, HLG_PEAK_NITS = 203, 1000
"""Diffuse white of HDR (BT.2408), which becomes white; peak of the display that HLG is graded on (BT.2100)."""
GAMMA = 2.4
"""Of the display that SDR is graded on (BT.1886)."""
MATRICES = {0: "rgb", 1: "bt709", 2: "unspecified", 3: "reserved", 4: "fcc", 5: "bt470bg", 6: "smpte170m"} | {
    7: "smpte240m", 9: "bt2020nc"
}  # fmt: skip
"""Matrices from YCbCr to RGB that libswscale has; for any other it would take BT.601's without a word."""
UNUSUAL = {ColorTrc.LINEAR: "linear light", ColorTrc.LOG: "logarithmic", ColorTrc.LOG_SQRT: "logarithmic"} | {
    ColorTrc.SMPTE428: "SMPTE 428"
}  # fmt: skip
"""Transfer functions of masters and cameras, which nobody shows as they are."""
D65 = (0.3127, 0.3290)
PRIMARIES = {
    ColorPrimaries.BT709: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060),
    ColorPrimaries.BT2020: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    ColorPrimaries.SMPTE431: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    ColorPrimaries.SMPTE432: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
"""Chromaticities x, y of red, green and blue; the white is D65 (that of DCI-P3 is shown as white)."""
WIDE = frozenset(PRIMARIES) - {ColorPrimaries.BT709}


def _pq(signal: Floats) -> Floats:
    """SMPTE ST 2084: signal to white = 1."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return (10000 / WHITE_NITS) * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg(signal: Floats) -> Floats:
    """ARIB STD-B67: signal to white = 1, with the system gamma of 1.2 on each channel, as zimg (``zscale``) has it."""
    a = 0.17883277
    b = 1 - 4 * a
    c = 0.5 - a * np.log(4 * a)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return (HLG_PEAK_NITS / WHITE_NITS) * scene**1.2


def _sdr(signal: Floats) -> Floats:
    return signal**GAMMA


HDR: dict[int, Callable[[Floats], Floats]] = {ColorTrc.SMPTE2084: _pq, ColorTrc.ARIB_STD_B67: _hlg}


def check_colours(frame: Any) -> None:
    """Refuse what cannot be shown right.

    Raises:
        VideoError: naming the colour matrix, the transfer function or the primaries.
    """
    if frame.colorspace not in MATRICES:
        raise VideoError(f"its colour matrix (number {frame.colorspace} of ITU-T H.273) cannot be converted")
    if frame.color_trc in UNUSUAL:
        raise VideoError(f"its transfer function ({UNUSUAL[ColorTrc(frame.color_trc)]}) cannot be shown as it is")
    if frame.color_primaries == ColorPrimaries.SMPTE428:
        raise VideoError("its colours are CIE XYZ, which cannot be converted")
    if frame.color_trc not in HDR and frame.side_data.get("DOVI_METADATA") and frame.colorspace not in (1, 9):
        raise VideoError("Dolby Vision without an HDR10 or HLG picture in it cannot be converted")


def is_wide(frame: Any) -> bool:
    """True for HDR and for wider gamuts than BT.709's."""
    return frame.color_trc in HDR or frame.color_primaries in WIDE


def to_bt709(pixels: npt.NDArray[np.uint16], frame: Any) -> npt.NDArray[np.uint8]:
    """16-bit RGB ``pixels`` ``[H, W, 3]`` with the colours of ``frame``, in BT.709; what is above white clips."""
    wide = _to_linear(frame.color_trc)[pixels] @ _matrix(frame.color_primaries).T
    shown: npt.NDArray[np.uint8] = (wide.clip(0, 1) ** (1 / GAMMA) * 255).round().astype(np.uint8)
    return shown


@cache
def _to_linear(transfer: int) -> Floats:
    """Light of each of the 65,536 signals."""
    return HDR.get(transfer, _sdr)(np.linspace(0, 1, 65536)).astype(np.float32)


@cache
def _matrix(primaries: int) -> Floats:
    """Linear RGB to linear RGB of BT.709; HDR without primaries has those of BT.2020."""
    known = PRIMARIES.get(primaries, PRIMARIES[ColorPrimaries.BT2020])  # type: ignore[call-overload]
    return (np.linalg.inv(_to_xyz(PRIMARIES[ColorPrimaries.BT709])) @ _to_xyz(known)).astype(np.float32)


def _to_xyz(primaries: tuple[float, ...]) -> npt.NDArray[np.float64]:
    points = [*zip(primaries[::2], primaries[1::2], strict=True)]
    columns, white = (np.array([(x / y, 1, (1 - x - y) / y) for x, y in chosen]).T for chosen in (points, [D65]))
    return columns * np.linalg.solve(columns, white).T


def parse_colour(text: str) -> tuple[int, int, int]:
    """RGB of a colour's name or ``#rrggbb``.

    Raises:
        UserError: if it is neither.
    """
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UserError(f"--background: {text!r} is no colour; give a name such as black, or #rrggbb") from error


@cache
def has_alpha(pixel_format: str) -> bool:
    """True for formats with an alpha channel or a palette, whose entries may be transparent."""
    known = av.VideoFormat(pixel_format)
    return known.has_palette or any(component.is_alpha for component in known.components)


def over(frame: Any, background: tuple[int, int, int]) -> Any:
    """A transparent ``frame`` over a colour, at its own size, as RGB of 16 bits."""
    pixels = frame.reformat(format="rgba64le").to_ndarray().astype(np.float32)
    alpha = pixels[..., 3:] / 65535
    mixed = pixels[..., :3] * alpha + np.array(background, np.float32) * 257 * (1 - alpha)
    return av.VideoFrame.from_ndarray(mixed.round().astype(np.uint16), format="rgb48le")
