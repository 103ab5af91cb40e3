"""The user's own videos as latents: a preprocessed dataset in Parquet, or a folder of video files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastvideo.data.captions import video_files
from fastvideo.data.clips import Policy, Size, VideoError, read_clips
from fastvideo.data.fits import DataRequirements
from fastvideo.data.parquet import ParquetSource
from fastvideo.distillation.abilities import normalised
from fastvideo.errors import UserError
from fastvideo.evaluation.instrument import Instrument
from fastvideo.inference.loading import OpenedModel
from fastvideo.inference.progress import PatientBar

Part = Iterator[Tensor]
"""Latents ``[B, C, F, H, W]`` of some videos."""


def data_features(path: Path, model: OpenedModel, instrument: Instrument, most: int, batch_size: int) -> Tensor:
    """The teacher's features ``[M, S, D]`` of up to ``most`` of the user's videos.

    Args:
        path: a Parquet file, a folder with some, or a folder of videos.
        model: the teacher, whose size the videos get.
        instrument: its features.
        most: videos to read; of a dataset an even choice over all rows.
        batch_size: videos at once.

    Raises:
        UserError: for data that cannot be read or does not fit the model, or fewer than four videos.
    """
    found: list[Tensor] = []
    with PatientBar("the user's data", most) as bar:
        for latents in _latents(path, model, most, batch_size):
            start = sum(map(len, found))
            found.append(instrument.features(latents, range(start, start + len(latents))))
            bar(len(latents))
    if sum(map(len, found)) < 4:
        raise UserError(f"--data {path}: a distance needs at least 4 videos, {sum(map(len, found))} could be read")
    return torch.cat(found)


def check_data(path: Path, model: OpenedModel) -> None:
    """Check that the data is there and fits the model, before anything is sampled.

    Raises:
        UserError: for data that cannot be read or does not fit.
    """
    if not path.exists():
        raise UserError(f"--data {path} does not exist")
    if _is_dataset(path):
        _source(path, model)
    else:
        video_files(path)


def _is_dataset(path: Path) -> bool:
    return path.is_file() or any(path.rglob("*.parquet"))


def _latents(path: Path, model: OpenedModel, most: int, batch_size: int) -> Part:
    return (_of_dataset if _is_dataset(path) else _of_videos)(path, model, most, batch_size)


def _source(path: Path, model: OpenedModel) -> ParquetSource:
    codec = model.adapter.codec
    wanted = DataRequirements(codec.latent_shape, normalise=partial(normalised, codec), codec_keys=codec.known_keys)
    return ParquetSource(str(path), wanted)


def _of_dataset(path: Path, model: OpenedModel, most: int, batch_size: int) -> Part:
    source = _source(path, model)
    count = min(most, len(source))
    rows = [place * len(source) // count for place in range(count)]
    for start in range(0, count, batch_size):
        latents = source.read(rows[start : start + batch_size]).latents
        assert latents is not None
        yield latents


def _of_videos(folder: Path, model: OpenedModel, most: int, batch_size: int) -> Part:
    """The first clip of each video, cropped to the model's size."""
    values = model.adapter.config.model_dump()
    policy = Policy((Size(values["height"], values["width"], values["num_frames"]),))
    waiting: list[Tensor] = []
    for path in itertools.islice(video_files(folder)[0].values(), most):
        try:
            waiting.append(next(read_clips(path, policy)).tensor)
        except VideoError as error:
            raise UserError(f"--data: {path} {error}: take it out of the folder") from error
        if len(waiting) == batch_size:
            yield model.adapter.codec.encode(torch.stack(waiting)).float()
            waiting = []
    if waiting:
        yield model.adapter.codec.encode(torch.stack(waiting)).float()
