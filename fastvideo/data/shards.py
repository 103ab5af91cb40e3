"""One output file: the rows of its videos, with the skipped ones in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from fastvideo.data.captions import Video
from fastvideo.data.clips import Clip, Policy, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.data.schema import LATENT, METADATA_KEY, TEXT, Floats, schema_with, tensor_columns
from fastvideo.data.sound_io import read_sound
from fastvideo.distillation.adapters.base import Codec, Conditioner
from fastvideo.distillation.sound import Sound, SoundingCodec
from fastvideo.distillation.types import UserError
from fastvideo.errors import counted
from fastvideo.files import replacing

GROUP_BYTES = 32 * 2**20
"""Size of a row group's tensors: a shuffling reader holds several groups."""
RATE_ERROR = 0.002
"""Largest relative difference of frame rates that are taken for one, such as 23.976 and 24."""
Row = dict[str, Any]
"""Values by column."""


def encode_clip(clip: Clip, video: Video, codec: Codec, conditioner: Conditioner) -> dict[str, Tensor]:
    """Precomputed tensors of one clip, by name, without a batch dimension.

    Encodes one clip at a time, so that a row depends on its video alone.
    """
    videos = clip.tensor[None]
    if isinstance(codec, SoundingCodec):
        sound = sound_of(clip, video, codec)
        latents = codec.with_sound(codec.encode(videos), sound)
    else:
        latents = codec.encode(videos)
    tensors = {LATENT: latents, **conditioner.encode_stored(videos, [video.caption])}
    return {name: value[0].float().cpu() for name, value in tensors.items()}


def sound_of(clip: Clip, video: Video, codec: SoundingCodec) -> Sound:
    """The sound of a clip, for a model whose videos have one.

    Raises:
        VideoError: if there is none, or it does not fit the pictures at the model's frame rate.
    """
    fps = codec.sounding_rate
    if clip.still:
        raise VideoError("an image has no sound: the model needs videos with sound")
    if abs(clip.fps - fps) > RATE_ERROR * fps:
        raise VideoError(f"{clip.fps:g} frames per second, and the model's videos have {fps:g}: --fps {fps:g}")
    if clip.start is None:
        raise VideoError("its clock jumps before this clip, so that its sound cannot be told from that of other clips")
    return read_sound(video.path, clip.start, len(clip.frames) / fps, *codec.sound_format)


def rows_of(video: Video, codec: Codec, conditioner: Conditioner, policy: Policy) -> Iterator[Row]:
    """The rows of one video, one clip after another.

    Raises:
        VideoError: with the reason to skip it, or its rest.
    """
    if video.problem:
        raise VideoError(video.problem)
    try:
        conditioner.check_prompts([video.caption])
    except UserError as error:
        raise VideoError(f"caption: {error}") from error
    for clip in read_clips(video.path, policy):
        if clip.still and conditioner.needs_frames:
            raise VideoError("an image has no frames that go on from its first: the model needs videos")
        yield _row(clip, video, encode_clip(clip, video, codec, conditioner), policy)


def _row(clip: Clip, video: Video, tensors: Mapping[str, Tensor], policy: Policy) -> Row:
    frames, height, width = clip.frames.shape[:3]
    row: Row = {
        "id": f"{video.name}#{clip.number}" if policy.every_clip else video.name,
        "file_name": video.name,
        "caption": video.caption,
        "media_type": "image" if clip.still else "video",
        "width": width,
        "height": height,
        "num_frames": frames,
        "duration_sec": frames / clip.fps,
        "fps": clip.fps,
    }
    for name, value in tensors.items():
        row |= tensor_columns(name, without_padding(value.numpy()) if name == TEXT else value.numpy())
    return row


def without_padding(embedding: Floats) -> Floats:
    """A text embedding ``[L, D]`` without the zeros at its end, which readers pad again."""
    used = embedding.any(axis=1).nonzero()[0]
    return embedding[: used[-1] + 1 if len(used) else 1]


@contextmanager
def whole_file(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file that appears whole."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as file:
        yield file


@dataclass(frozen=True)
class ShardWriter:
    """Writes output files; ``made`` is their metadata."""

    codec: Codec
    conditioner: Conditioner
    policy: Policy
    made: Mapping[str, Any]

    def write(self, path: Path, videos: Sequence[Video], done: Callable[[int], None]) -> None:
        """Write the file of ``videos``, whole or not at all; calls ``done`` with the number of finished videos."""
        schema = schema_with(self.conditioner.stored_shapes)
        skipped: list[dict[str, str]] = []
        with whole_file(path, schema) as file:
            groups = _Groups(file, schema)
            for count, video in enumerate(videos, start=1):
                added = 0
                try:
                    for row in rows_of(video, self.codec, self.conditioner, self.policy):
                        groups.add(row)
                        added += 1
                except VideoError as error:
                    before = f"after {counted(added, 'clip')} that are in: " if added else ""
                    skipped.append({"file": video.name, "reason": f"{before}{error}"})
                done(count)
            groups.close()
            text = self.conditioner.text_settings
            texts = {TEXT: {**text, "dtype": "float32", "model": self.made["model"]}} if text else {}
            made = {**self.made, "texts": texts, "skipped": skipped}
            file.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(made)})


class _Groups:
    """Row groups of one latent shape each, so that a batch reads its own bucket only."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.file, self.schema = file, schema
        self.open: dict[tuple[int, ...], list[Row]] = {}

    def add(self, row: Row) -> None:
        """Collect a row; write its group at :data:`GROUP_BYTES`."""
        shape = tuple(row[f"{LATENT}_shape"])
        rows = self.open.setdefault(shape, [])
        rows.append(row)
        if sum(len(v) for row in rows for v in row.values() if isinstance(v, bytes)) >= GROUP_BYTES:
            self._write(self.open.pop(shape))

    def close(self) -> None:
        """Write the incomplete groups."""
        for shape in sorted(self.open):
            self._write(self.open[shape])

    def _write(self, rows: list[Row]) -> None:
        self.file.write_table(pa.Table.from_pylist(rows, schema=self.schema))
