"""Index of a Parquet dataset without reading its tensors: rows, row groups, shapes, dtypes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo.data.columns import check_column, plain
from fastvideo.data.schema import DTYPES, LATENT, byte_count, dtype_name, metadata_of
from fastvideo.errors import UserError
from fastvideo.storage import Place, RangeFile, Remote, files_below, is_file, place, read_bytes

MANIFEST = "preprocess.json"
"""First file that ``fastvideo preprocess`` writes; it marks a folder as its output."""
TAR = ".tar"
Kind = tuple[tuple[int, ...], str]
"""Shape and dtype of a stored tensor."""


@dataclass(frozen=True)
class TensorIndex:
    """One tensor column of one file: the distinct kinds, and which of them each row is (-1 for a row without it)."""

    kinds: tuple[Kind, ...]
    codes: npt.NDArray[np.int64]

    @property
    def missing(self) -> int:
        """Rows that have no such tensor."""
        return int((self.codes < 0).sum())


@dataclass(frozen=True)
class FileIndex:
    """One Parquet file: rows of each row group, tensors by name, preprocessing settings (empty if made elsewhere)."""

    path: Place
    groups: tuple[int, ...]
    tensors: dict[str, TensorIndex]
    made: dict[str, Any]

    @property
    def rows(self) -> int:
        return sum(self.groups)


def dataset_files(path: str) -> list[Place]:
    """The Parquet files at ``path`` (local or a URL), in nested folders too, in the order of their names.

    Raises:
        UserError: if there is none, or a ``fastvideo preprocess`` into that folder was interrupted.
    """
    root = place(path)
    if isinstance(root, Path) and not root.exists():
        expected = "'tiny', 'tiny_stream', 'tiny_soft', 'tiny_stills', a Parquet file or a folder of them is expected"
        raise UserError(f"data.path: {path!r} does not exist; {expected}")
    if is_file(root):
        return [root]
    found = files_below(root, ".parquet")
    if not found:
        hint = "make one from videos with: fastvideo preprocess VIDEOS --model MODEL --out FOLDER"
        raise UserError(f"data.path: {path!r} has no .parquet file; {hint}")
    for manifest in (file for file in files_below(root, MANIFEST) if file.name == MANIFEST):
        _check_finished(manifest, sum(str(file.parent) == str(manifest.parent) for file in found))
    return found


def has_tars(path: str) -> bool:
    """True for a tar shard, or a folder with such and no Parquet file."""
    root = place(path)
    if is_file(root):
        return root.suffix == TAR
    return bool(files_below(root, TAR)) and not files_below(root, ".parquet")


def _check_finished(manifest: Place, present: int) -> None:
    made = json.loads(read_bytes(manifest))
    expected = made["files"]
    if present < expected:
        raise UserError(
            f"data.path: {manifest.parent} has {present} of {expected} files: its preprocessing was interrupted. Run "
            f"the same {made.get('command', 'fastvideo preprocess')} command again to finish it"
        )


def open_parquet(file: Place) -> pq.ParquetFile:
    """Open a Parquet file; of a remote one, only the asked columns of the asked row groups are fetched."""
    if isinstance(file, Path):
        return pq.ParquetFile(file)
    size, footer = _remote_footer(file)
    return pq.ParquetFile(RangeFile(file, size), metadata=footer, pre_buffer=True)


@lru_cache(maxsize=1024)
def _remote_footer(file: Remote) -> tuple[int, pq.FileMetaData]:
    """Size in bytes, and the footer, which every row group would read again."""
    stream = RangeFile(file)
    return stream.size, pq.read_metadata(stream)


def index_file(path: Place, required: Sequence[str] = (), optional: Sequence[str] = ()) -> FileIndex:
    """Read the footer, and the shape and dtype columns of the named tensors.

    Raises:
        UserError: if the file is not readable as Parquet, lacks a column, a column has another type, or a dtype is
            unknown.
    """
    try:
        with open_parquet(path) as file:
            schema, footer = file.schema_arrow, file.metadata
            groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            present = [name for name in optional if f"{name}_bytes" in schema.names]
            _check_columns(path, schema, [*required, *present])
            tensors = {name: _index_tensor(file, path, name) for name in [*required, *present]}
            _check_first_row(file, path, tensors)
            return FileIndex(path, groups, tensors, metadata_of(footer.metadata))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from error


def _check_columns(path: Place, schema: pa.Schema, tensors: Sequence[str]) -> None:
    for column in ("caption", *(f"{name}_{part}" for name in tensors for part in ("bytes", "shape", "dtype"))):
        try:
            check_column(schema, column)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _index_tensor(file: pq.ParquetFile, path: Place, name: str) -> TensorIndex:
    table = plain(file.read(columns=[f"{name}_shape", f"{name}_dtype"], use_threads=False))
    kinds: dict[Kind, int] = {}
    pairs = zip(table[f"{name}_shape"].to_pylist(), table[f"{name}_dtype"].to_pylist(), strict=True)
    codes = np.empty(len(table), dtype=np.int64)
    for row, (shape, written) in enumerate(pairs):
        if not shape:
            codes[row] = -1
            continue
        dtype = dtype_name(written or "")
        if dtype is None:
            raise UserError(f"{path}, row {row}: {name}_dtype is {written!r}, one of {', '.join(DTYPES)} is expected")
        if not all(size is not None and size > 0 for size in shape):
            raise UserError(f"{path}, row {row}: {name}_shape is {shape}, sizes above 0 are expected")
        codes[row] = kinds.setdefault((tuple(shape), dtype), len(kinds))
    return TensorIndex(tuple(kinds), codes)


def _check_first_row(file: pq.ParquetFile, path: Place, tensors: dict[str, TensorIndex]) -> None:
    """Compare one row's bytes with its shape and dtype; reading checks the other rows."""
    if not tensors or not len(next(iter(tensors.values())).codes):
        return
    columns = [f"{name}_bytes" for name in tensors]
    first = plain(pa.table(next(file.iter_batches(batch_size=1, columns=columns, use_threads=False))))
    for name, index in tensors.items():
        if index.codes[0] >= 0:
            check_bytes(path, 0, name, first[f"{name}_bytes"][0].as_buffer(), index.kinds[index.codes[0]])


def check_bytes(path: Place, row: int, name: str, data: pa.Buffer | None, kind: Kind) -> None:
    """Refuse a tensor whose size in bytes differs from its shape and dtype.

    Raises:
        UserError: with the file, the row and both numbers.
    """
    size, expected = 0 if data is None else len(data), byte_count(*kind)
    if size != expected:
        shape, dtype = kind
        raise UserError(
            f"{path}, row {row}: {name}_bytes has {size} bytes, shape {list(shape)} of {dtype} takes {expected}"
        )


def latent_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A stored latent's shape as ``(C, F, H, W)``: adds F to an image without one, drops a batch dimension of 1."""
    if len(shape) == 5 and shape[0] == 1:
        shape = shape[1:]
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else tuple(shape)


def bucket_sizes(files: Sequence[FileIndex]) -> dict[tuple[int, ...], int]:
    """Rows by latent shape ``(C, F, H, W)``, sorted."""
    counts: Counter[tuple[int, ...]] = Counter()
    for index in (file.tensors[LATENT] for file in files):
        for code, (shape, _) in enumerate(index.kinds):
            counts[latent_shape(shape)] += int((index.codes == code).sum())
    return dict(sorted(counts.items()))


def iter_row_groups(files: Sequence[FileIndex]) -> Iterator[tuple[int, int, int, int]]:
    """``(file, row group, first row within the file, rows)`` of every row group, in order."""
    for number, file in enumerate(files):
        start = 0
        for group, rows in enumerate(file.groups):
            yield number, group, start, rows
            start += rows
