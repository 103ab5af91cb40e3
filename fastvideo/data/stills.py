"""Images as frames, upright, opaque or not, in sRGB; animations with their times. Pillow decodes."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, ImageSequence

from fastvideo.data.faults import VideoError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Files that are images; those that Pillow has no decoder for are listed with this reason."""
ANIMATED = ("WEBP", "PNG", "AVIF")
"""Formats whose further pictures are an animation, and no pages or thumbnails; Pillow counts those of each."""
UNTIMED_MS = 100
"""Milliseconds on screen of an animation's frame that does not say: browsers show it for as long."""
BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""Errors that Pillow raises for a damaged or an oversized file."""


@dataclass(frozen=True)
class Pictures:
    """Frames with ``pts`` and ``duration`` in milliseconds, read one by one; ``still`` for a single one."""

    frames: Iterator[Any]
    rate: Fraction
    still: bool


def is_image(path: Path) -> bool:
    """True for a file that is named as an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_pictures(path: Path) -> Pictures:
    """An image file's one frame, or the frames of an animation.

    Raises:
        VideoError: if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            still = image.format not in ANIMATED or image.n_frames == 1
            if still:
                return Pictures(iter([_frame(image, 0)]), Fraction(1), True)
            first = _milliseconds(image)
        return Pictures(_animation(path), Fraction(1000, first), False)
    except BROKEN as error:
        raise _undecodable(error) from error


def _animation(path: Path) -> Iterator[Any]:
    time = 0
    try:
        with Image.open(path) as image:
            for picture in ImageSequence.Iterator(image):
                frame = _frame(picture, time)
                yield frame
                time += frame.duration
    except BROKEN as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> VideoError:
    return VideoError(f"cannot be decoded: {(str(error) or type(error).__name__).splitlines()[0]}")


def _milliseconds(image: Image.Image) -> int:
    return round(image.info.get("duration", 0)) or UNTIMED_MS


def _frame(image: Image.Image, time: int) -> Any:
    image.load()
    pixels = _pixels(ImageOps.exif_transpose(image))
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
    frame.pts, frame.duration, frame.time_base = time, _milliseconds(image), Fraction(1, 1000)
    return frame


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` or, with transparency, ``[H, W, 4]``, sRGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known")
    if image.mode[0] == "I":  # 16 bits of grey, which Pillow's own conversion would clip to 8
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        return grey[..., None].repeat(3, axis=2)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        return np.dstack([_srgb(whole.convert("RGB"), profile), np.asarray(whole.getchannel("A"))])
    return _srgb(image if image.mode in ("L", "CMYK", "RGB") else image.convert("RGB"), profile)


def _srgb(image: Image.Image, profile: bytes | None) -> npt.NDArray[np.uint8]:
    if profile:
        try:
            made = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            return np.asarray(made)
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that is none, or for another mode: every viewer shows the plain colours
    return np.asarray(image.convert("RGB"))
