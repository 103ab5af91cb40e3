"""Images as videos of one frame: every mode and format, upright, and animations with their times."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from fastvideo.data.clips import Clip, Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.tests.data.footage_files import corners, half_transparent

SIZE = Size(64, 96, 9)
RGB = Image.fromarray(corners(3))


def clip_of(path: Path, **options: Any) -> Clip:
    return next(read_clips(path, Policy((SIZE,), **options)))


def saved(path: Path, image: Image.Image = RGB, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("a.png", {}, 0), ("a.bmp", {}, 0), ("a.tif", {}, 0), ("a.tiff", {"compression": "tiff_lzw"}, 0),
        ("a.webp", {"lossless": True}, 0), ("a.jpg", {"quality": 100, "subsampling": 0}, 4),
    ],
)  # fmt: skip
def test_an_image_is_a_clip_of_one_frame(name: str, options: dict[str, Any], most: int, tmp_path: Path) -> None:
    clip = clip_of(saved(tmp_path / name, **options))
    assert (clip.frames.shape, clip.still, clip.number) == ((1, 64, 96, 3), True, 0)
    assert np.abs(clip.frames[0].astype(int) - corners(3)).max() <= most


@pytest.mark.parametrize("mode", ["P", "L", "LA", "1", "CMYK", "I;16", "I", "RGBA"])
def test_every_mode_shows_its_picture(mode: str, tmp_path: Path) -> None:
    sixteen = np.asarray(RGB.convert("L")).astype(np.uint16) * 257
    image = Image.fromarray(sixteen) if mode == "I;16" else RGB.convert(mode)
    if mode == "I":
        image = Image.fromarray(sixteen.astype(np.int32))
    suffix = {"CMYK": ".jpg", "I": ".tif"}.get(mode, ".png")
    clip = clip_of(saved(tmp_path / f"a{suffix}", image))
    grey = mode in ("L", "LA", "I;16", "I")
    expected = np.asarray((RGB.convert("L") if grey else image).convert("RGB")).astype(int)
    assert np.abs(clip.frames[0] - expected).mean() <= (3 if mode == "CMYK" else 0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.jpg", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    (clip,) = read_clips(path, Policy((Size(*upright.shape[:2], 9),)))
    np.testing.assert_array_equal(clip.frames[0], upright)


def test_a_profile_is_followed_and_a_broken_one_is_not(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    plain = clip_of(saved(tmp_path / "plain.png")).frames
    same = clip_of(saved(tmp_path / "same.png", icc_profile=srgb.tobytes())).frames
    broken = clip_of(saved(tmp_path / "broken.png", icc_profile=b"no profile")).frames
    assert np.abs(same.astype(int) - plain).max() <= 1
    np.testing.assert_array_equal(broken, plain)
    grey = io.BytesIO()
    RGB.convert("L").save(grey, "png", icc_profile=srgb.tobytes())  # of another mode than the image's
    (tmp_path / "grey.png").write_bytes(grey.getvalue())
    assert clip_of(tmp_path / "grey.png").still


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_transparency_lies_over_the_background(name: str, tmp_path: Path) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, Image.fromarray(half_transparent(3)), **options)
    assert clip_of(path).still
    assert clip_of(path).frames[0, :, :48].max() == 0
    assert clip_of(path, background=(255, 255, 255)).frames[0, :, :48].min() == 255


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_an_animation_is_a_video_with_its_times(name: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(corners(2 * i)) for i in range(12)]
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], duration=100, loop=0)
    clip = clip_of(path)
    assert (clip.still, clip.fps, clip.frames.shape) == (False, 10.0, (9, 64, 96, 3))
    double = clip_of(path, fps=20.0)
    np.testing.assert_array_equal(double.frames[::2][:4], double.frames[1::2][:4])
    np.testing.assert_array_equal(double.frames[::2][:4], clip.frames[:4])


def test_an_image_takes_the_nearest_shape_and_its_own_sizes_first(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png")
    sizes = (Size(32, 32, 9), Size(32, 48, 9), Size(32, 48, 17))
    assert next(read_clips(path, Policy(sizes))).frames.shape == (1, 32, 48, 3)
    assert next(read_clips(path, Policy((*sizes, Size(64, 64, 1))))).frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.heic"])
def test_what_is_no_whole_image_is_listed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.heic":
        path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    else:
        noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        path.write_bytes(saved(path, Image.fromarray(noise)).read_bytes()[:900])
    with pytest.raises(VideoError, match="cannot be decoded"):
        clip_of(path)
