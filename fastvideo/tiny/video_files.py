"""The tiny world as a user's folder of videos: MP4 files with a ``captions.csv``."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from fastvideo.data.video_io import write_video
from fastvideo.tiny.world import Split, TinyWorld

BATCH = 64


def write_world(folder: Path, count: int, seed: int = 0, split: Split = "train", scale: int = 1) -> Path:
    """Write `TinyWorld(split).sample(count, seed)` as `00000.mp4`, ... with captions into an emptied `folder`.

    Every pixel becomes a square of side `scale`. H.264 is lossy: the files only look like the world.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "caption"))
        number = 0
        for sample in TinyWorld(split).batches(count, seed, BATCH):
            for video, caption in zip(sample.videos, sample.captions, strict=True):
                table.writerow((write_video(folder / f"{number:05d}.mp4", video, scale=scale).name, caption))
                number += 1
    return folder
