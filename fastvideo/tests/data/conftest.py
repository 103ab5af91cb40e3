"""Real video files, the toy Wan pipeline, and Parquet files as other programs write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fastvideo.data.clips import Policy, Size
from fastvideo.data.model import choose_model
from fastvideo.data.preprocess import Job, make_job
from fastvideo.tests.distillation.tiny import wan_folder

torch.set_num_threads(1)
TOY = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
CAPTIONS = ("a green seven moving up", "red three", "a red seven moving left")
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".gif": "gif"}


def write_clip(path: Path, frames: int = 6, size: tuple[int, int] = (24, 48), seed: int = 0, fps: int = 8) -> Path:
    """A file whose frames brighten from black to white, with a red left half; ``size`` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 20, size=(*size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        for i in range(frames):
            picture = noise + 230 * (i + 1) // frames
            picture[:, : size[1] // 2, 1:] = 0
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Wan pipeline folder with random weights: latents [4, 2, 2, 4]."""
    return wan_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Nine good videos with a ``.txt`` beside each, in nested folders, of four containers."""
    folder = tmp_path / "videos"
    for i, suffix in enumerate((".mp4", ".webm", ".mov", ".gif", ".mp4", ".mkv", ".mp4", ".mp4", ".mp4")):
        path = write_clip(folder / ("nested" if i % 2 else ".") / f"{i}{suffix}", seed=i)
        path.with_suffix(".txt").write_text(CAPTIONS[i % 3])
    return folder


MakeJob = Callable[..., Job]


@pytest.fixture
def job(toy: Path, videos: Path, tmp_path: Path) -> MakeJob:
    """The work on the videos; every argument of it can be another."""

    def make(
        out: str = "out",
        folder: Path = videos,
        captions: Path | None = None,
        per_file: int = 2,
        policy: Policy = Policy((Size(16, 32, 5),)),  # noqa: B008
    ) -> Job:
        return make_job(folder, captions, choose_model(str(toy), TOY), policy, tmp_path / out, per_file, "cpu")

    return make
