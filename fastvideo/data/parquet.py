"""Preprocessed datasets in Parquet, read by row group; see :mod:`fastvideo.data.schema` for the columns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastvideo.data.fits import Wanted, check_fits, is_raw, sample_shape
from fastvideo.data.index import FileIndex, check_bytes, dataset_files, index_file, iter_row_groups, latent_shape
from fastvideo.data.order import Bucket
from fastvideo.data.schema import LATENT, TEXT, Floats, byte_count, floats
from fastvideo.distillation.types import RawBatch, UserError

CACHE_BYTES = 512 * 2**20
"""Row groups kept in memory; the window within which rows are shuffled is as large as this allows."""


class ParquetSource:
    """The samples of a dataset.

    Only the columns that are wanted are read, a row group at a time; a tensor's bytes are copied once, into its batch.

    Args:
        path: a Parquet file, or a folder with Parquet files in it or below.
        wanted: what to read.

    Raises:
        UserError: naming the file, if one is not readable or does not hold what is wanted.
    """

    def __init__(self, path: str, wanted: Wanted) -> None:
        self.wanted = wanted
        optional = [TEXT] if TEXT in wanted.extras else []
        self.files = [index_file(file, wanted.required, optional) for file in dataset_files(path)]
        for file in self.files:
            check_fits(file, wanted)
        self.names = [*wanted.required, *([TEXT] if self._has_text() else [])]
        self._groups = list(iter_row_groups(self.files))
        self._starts = np.cumsum([0, *(rows for *_, rows in self._groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def _has_text(self) -> bool:
        """Whether every row has its text embedding; a dataset in which only some have is refused."""
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
        """Whether text embeddings are read, instead of encoding the captions."""
        return TEXT in self.names

    def captions(self) -> list[str]:
        """All captions.

        Raises:
            UserError: for a row without one.
        """
        captions: list[str] = []
        for file in self.files:
            found = pq.read_table(file.path, columns=["caption"], partitioning=None)["caption"].to_pylist()
            if None in found:
                raise UserError(f"{file.path}, row {found.index(None)}: no caption")
            captions += found
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
        """The samples of those numbers: latents ``[B, C, F, H, W]`` normalised, extras by name, all float32.

        Raises:
            UserError: naming file and row, if a tensor's bytes do not fit its shape.
        """
        where = [self._locate(row) for row in rows]
        captions = tuple(table["caption"][i].as_py() or "" for _, _, table, i in where)
        extras = {name: self._stacked(name, where) for name in self.names if name != LATENT}
        latents = self._latents(where) if self.wanted.latents else None
        return RawBatch(captions, latents, extras)

    def _locate(self, row: int) -> tuple[FileIndex, int, pa.Table, int]:
        """File, row within it, table of the row group, row within that."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, _, start, _ = self._groups[number]
        offset = row - int(self._starts[number])
        return self.files[file], start + offset, self._group(number), offset

    def _group(self, number: int) -> pa.Table:
        if number not in self._cache:
            file, group, *_ = self._groups[number]
            columns = ["caption", *(f"{name}_bytes" for name in self.names)]
            with pq.ParquetFile(self.files[file].path) as opened:
                self._cache[number] = opened.read_row_group(group, columns=columns, use_threads=False)
            # Room first for every bucket's window; a single row group may be larger than the whole budget.
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _stacked(self, name: str, where: Sequence[tuple[FileIndex, int, pa.Table, int]]) -> Tensor:
        """One tensor of all rows; text embeddings are zero-padded to the longest."""
        arrays = [self._array(name, *place) for place in where]
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

    def _latents(self, where: Sequence[tuple[FileIndex, int, pa.Table, int]]) -> Tensor:
        latents = self._stacked(LATENT, where)
        raw = torch.tensor([is_raw(file.made) for file, *_ in where])
        if raw.any():
            assert self.wanted.normalise is not None
            latents[raw] = self.wanted.normalise(latents[raw])
        return latents
