"""Preprocessed datasets in Parquet, read by row group; see :mod:`fastvideo.data.schema` for the columns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastvideo.data.faults import UNREADABLE, Faults
from fastvideo.data.fits import DataRequirements, check_fits, is_raw, sample_shape
from fastvideo.data.index import (
    FileIndex,
    check_bytes,
    dataset_files,
    index_file,
    iter_row_groups,
    latent_shape,
    open_parquet,
)
from fastvideo.data.order import Bucket
from fastvideo.data.schema import LATENT, TEXT, Floats, byte_count, floats
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.stopping import unit_done

CACHE_BYTES = 512 * 2**20
"""Memory for row groups; it bounds the window within which rows are shuffled."""


@dataclass(frozen=True)
class Sample:
    """One row as read."""

    file: FileIndex
    caption: str
    arrays: dict[str, Floats]


class ParquetSource:
    """The samples of a dataset.

    Reads the required columns only, a row group at a time; a tensor's bytes are copied once, into its batch.

    Args:
        path: a Parquet file, or a folder with Parquet files in it or below, local or a URL.
        wanted: tensors to read.
        faults: bound on skipped files and rows; none may be skipped by default.

    Raises:
        UserError: naming the file, if one is not readable or lacks a tensor.
    """

    def __init__(self, path: str, wanted: DataRequirements, faults: Faults | None = None) -> None:
        self.wanted, self.faults = wanted, Faults() if faults is None else faults
        self.files = list(self._usable(path))
        self.names = [*wanted.required, *([TEXT] if self._has_text() else [])]
        self._groups = list(iter_row_groups(self.files))
        self._starts = np.cumsum([0, *(rows for *_, rows in self._groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def _usable(self, path: str) -> Iterator[FileIndex]:
        """Readable files that fit."""
        optional = [TEXT] if TEXT in self.wanted.extras else []
        first: UserError | None = None
        count = 0
        for file in dataset_files(path):
            unit_done()
            try:
                indexed = index_file(file, self.wanted.required, optional)
                check_fits(indexed, self.wanted)
            except UserError as error:
                first = first or error
                self.faults.record(file, None, error)
            else:
                count += 1
                yield indexed
        if not count:
            raise UserError(f"data.path: no file of {path} can be used; the first: {first}")

    def _has_text(self) -> bool:
        """True if every row has a text embedding; refuses a dataset in which only some have one."""
        if TEXT not in self.wanted.extras:
            return False
        missing = [(file, file.tensors[TEXT].missing if TEXT in file.tensors else file.rows) for file in self.files]
        total = sum(count for _, count in missing)
        if total in (0, len(self)):
            return total == 0
        file = next(file for file, count in missing if count)
        raise UserError(f"data: {total} of {len(self)} rows have no text embedding, the first of them in {file.path}")

    def __len__(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def has_text(self) -> bool:
        """True if stored text embeddings replace encoded captions."""
        return TEXT in self.names

    def captions(self) -> list[str]:
        """All readable captions.

        Raises:
            UserError: for a row without one that may not be skipped.
        """
        captions: list[str] = []
        for file in self.files:
            with open_parquet(file.path) as opened:
                column = opened.read(columns=["caption"])["caption"]
            for row, value in enumerate(column):
                try:
                    caption = value.as_py()
                    if caption is None:
                        raise UserError(f"{file.path}, row {row}: no caption")
                    captions.append(caption)
                except UNREADABLE as error:
                    self.faults.record(file.path, row, error)
        return captions

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        """Rows by latent shape; one bucket if latents are not read."""
        rows = torch.arange(len(self))
        sizes = torch.tensor([count for *_, count in self._groups])
        blocks = torch.arange(len(sizes)).repeat_interleave(sizes)
        if not self.wanted.latents:
            return (Bucket("all", rows, blocks, self._window(1)),)
        shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
        start = 0
        for file in self.files:
            index = file.tensors[LATENT]
            for code, (shape, _) in enumerate(index.kinds):
                own = torch.from_numpy(np.flatnonzero(index.codes == code)) + start
                shapes.setdefault(latent_shape(shape), []).append(own)
            start += file.rows
        window = self._window(len(shapes))
        members = {shape: torch.cat(found).sort().values for shape, found in sorted(shapes.items())}
        return tuple(Bucket("x".join(map(str, shape)), own, blocks[own], window) for shape, own in members.items())

    def _window(self, buckets: int) -> int:
        """Row groups that may be open at once in each bucket."""
        largest = max((self._group_bytes(i) for i in range(len(self._groups))), default=1)
        return max(1, CACHE_BYTES // (max(1, largest) * buckets))

    def _group_bytes(self, number: int) -> int:
        file, _, start, rows = self._groups[number]
        total = 0
        for name in self.names:
            index = self.files[file].tensors[name]
            counts = np.bincount(index.codes[start : start + rows], minlength=len(index.kinds))
            total += sum(int(n) * byte_count(*kind) for n, kind in zip(counts, index.kinds, strict=True))
        return total

    def read(self, rows: Sequence[int]) -> RawBatch:
        """Samples by number: latents ``[B, C, F, H, W]`` normalised, extras by name, all float32.

        The other samples of the batch replace skipped rows in turn.

        Raises:
            UserError: naming file and row, for an unreadable one that may not be skipped, or if no row is readable.
        """
        found = [self._row(row) for row in rows]
        good = [row for row in found if row is not None]
        if not good:
            raise UserError(f"{self.files[0].path.parent}: no row of a batch can be read")
        spare = cycle(good)
        samples = [next(spare) if row is None else row for row in found]
        extras = {name: self._stacked(name, samples) for name in self.names if name != LATENT}
        latents = self._latents(samples) if self.wanted.latents else None
        return RawBatch(tuple(row.caption for row in samples), latents, extras)

    def _row(self, number: int) -> Sample | None:
        """One sample, or ``None`` for a skipped row."""
        file, row, group, offset = self._locate(number)
        try:
            table = self._group(group)
            caption = table["caption"][offset].as_py() or ""
            return Sample(file, caption, {name: self._array(name, file, row, table, offset) for name in self.names})
        except UNREADABLE as error:
            self.faults.record(file.path, row, error)
            return None

    def _locate(self, row: int) -> tuple[FileIndex, int, int, int]:
        """File, row within it, number of the row group, row within that."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, _, start, _ = self._groups[number]
        offset = row - int(self._starts[number])
        return self.files[file], start + offset, number, offset

    def _group(self, number: int) -> pa.Table:
        if number not in self._cache:
            file, group, *_ = self._groups[number]
            columns = ["caption", *(f"{name}_bytes" for name in self.names)]
            with open_parquet(self.files[file].path) as opened:
                self._cache[number] = opened.read_row_group(group, columns=columns, use_threads=False)
            # Room first for every bucket's window; a single row group may be larger than the whole budget.
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _stacked(self, name: str, rows: Sequence[Sample]) -> Tensor:
        """One tensor of all rows; text embeddings are zero-padded to the longest."""
        arrays = [row.arrays[name] for row in rows]
        if name != TEXT:
            return torch.from_numpy(np.stack(arrays))
        longest = max(len(array) for array in arrays)
        padded = np.zeros((len(arrays), longest, arrays[0].shape[1]), dtype=np.float32)
        for out, array in zip(padded, arrays, strict=True):
            out[: len(array)] = array
        return torch.from_numpy(padded)

    def _array(self, name: str, file: FileIndex, row: int, table: pa.Table, offset: int) -> Floats:
        index = file.tensors[name]
        kind = index.kinds[index.codes[row]]
        data = table[f"{name}_bytes"][offset].as_buffer()
        check_bytes(file.path, row, name, data, kind)
        return floats(data, sample_shape(name, kind, self.wanted), kind[1])

    def _latents(self, rows: Sequence[Sample]) -> Tensor:
        latents = self._stacked(LATENT, rows)
        raw = torch.tensor([is_raw(row.file.made) for row in rows])
        if raw.any():
            assert self.wanted.normalise is not None
            latents[raw] = self.wanted.normalise(latents[raw])
        return latents
