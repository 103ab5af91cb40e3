"""The columns of a preprocessed dataset, as FastVideo publishes them, and tensors as bytes in them.

Column names and types are those of hao-ai-lab/FastVideo, ``fastvideo/dataset/dataloader/schema.py``. A tensor is three
columns: ``NAME_bytes`` (row-major, little-endian), ``NAME_shape`` (without a batch dimension) and ``NAME_dtype``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

LATENT, TEXT = "vae_latent", "text_embedding"
METADATA_KEY = b"fastvideo.preprocess"
"""Key of the JSON in a Parquet file's metadata with the preprocessing settings; public datasets have none."""

DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
"""Numpy types of the bytes; numpy has no bfloat16, so its 16 bits are read as integers."""

Floats = npt.NDArray[np.float32]


def schema_with(tensors: Iterable[str]) -> pa.Schema:
    """The columns of a dataset with latents, text embeddings and the given further tensors."""
    names = [LATENT, TEXT, *(name for name in tensors if name not in (LATENT, TEXT))]
    fields = [pa.field("id", pa.string())]
    for name in names:
        types = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
        fields += [pa.field(f"{name}_{part}", kind) for part, kind in types.items()]
    fields += [pa.field(name, pa.string()) for name in ("file_name", "caption", "media_type")]
    fields += [pa.field(name, pa.int64()) for name in ("width", "height", "num_frames")]
    return pa.schema(fields + [pa.field(name, pa.float64()) for name in ("duration_sec", "fps")])


def tensor_columns(name: str, value: Floats) -> dict[str, Any]:
    """One tensor of one row, float32."""
    data = np.ascontiguousarray(value, dtype="<f4")
    return {f"{name}_bytes": data.tobytes(), f"{name}_shape": list(data.shape), f"{name}_dtype": "float32"}


def text_column(number: int) -> str:
    """Column of the text of a run's families, the first of which is the student's."""
    return TEXT if number == 0 else f"{TEXT}_{number + 1}"


def is_text(name: str) -> bool:
    """True for a text column of any family."""
    return name == TEXT or (name.startswith(f"{TEXT}_") and name.removeprefix(f"{TEXT}_").isdecimal())


def text_schema(families: int) -> pa.Schema:
    """The columns of a dataset of prompts: FastVideo's, and further texts for further families."""
    fields = [pa.field("id", pa.string())]
    for name in map(text_column, range(families)):
        types = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
        fields += [pa.field(f"{name}_{part}", kind) for part, kind in types.items()]
    return pa.schema([*fields, pa.field("caption", pa.string())])


def bfloat16_columns(name: str, value: Tensor) -> dict[str, Any]:
    """One tensor of one row, by the bits of its bfloat16 numbers."""
    data = value.bfloat16().contiguous().view(torch.int16).numpy().astype("<i2", copy=False)
    return {f"{name}_bytes": data.tobytes(), f"{name}_shape": list(value.shape), f"{name}_dtype": "bfloat16"}


def dtype_name(written: str) -> str | None:
    """The dtype that a file names (``float32``, ``torch.bfloat16``); ``None`` if unknown."""
    name = written.removeprefix("torch.")
    return name if name in DTYPES else None


def byte_count(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def floats(data: pa.Buffer | bytes, shape: Sequence[int], dtype: str) -> Floats:
    """The numbers in ``data``; no copy for float32. Nothing is unpickled."""
    numbers = np.frombuffer(data, dtype=DTYPES[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32, copy=False).reshape(shape)


def metadata_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Preprocessing settings in a file's metadata; empty for a file made elsewhere."""
    text = (metadata or {}).get(METADATA_KEY)
    found: dict[str, Any] = json.loads(text) if text else {}
    return found
