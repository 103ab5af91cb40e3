"""Preprocessed datasets in Parquet, read by row group; see :mod:`fastvideo.data.schema` for the columns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastvideo.data.columns import plain
from fastvideo.data.faults import UNREADABLE, Faults
from fastvideo.data.fits import DataRequirements, sample_shape
from fastvideo.data.index import (
    FileIndex,
    check_bytes,
    dataset_files,
    index_file,
    iter_row_groups,
    open_parquet,
)
from fastvideo.data.schema import Floats, byte_count, floats
from fastvideo.data.stored import Sample, StoredSource
from fastvideo.distillation.types import UserError
from fastvideo.storage import Place

CACHE_BYTES = 512 * 2**20
"""Memory for row groups; it bounds the window within which rows are shuffled."""


class ParquetSource(StoredSource):
    """The samples of Parquet files.

    Reads the required columns only, a row group at a time; a tensor's bytes are copied once, into its batch.
    """

    def __init__(self, path: str, wanted: DataRequirements, faults: Faults | None = None) -> None:
        super().__init__(path, wanted, faults)
        self._groups = list(iter_row_groups(self.files))
        self._starts = np.cumsum([0, *(rows for *_, rows in self._groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def captions(self) -> list[str]:
        """All readable captions.

        Raises:
            UserError: for a row without one that may not be skipped.
        """
        captions: list[str] = []
        for file in self.files:
            with open_parquet(file.path) as opened:
                column = plain(opened.read(columns=["caption"]))["caption"]
            for row, value in enumerate(column):
                try:
                    caption = value.as_py()
                    if caption is None:
                        raise UserError(f"{file.path}, row {row}: no caption")
                    captions.append(caption)
                except UNREADABLE as error:
                    self.faults.record(file.path, row, error)
        return captions

    def _paths(self, path: str) -> Sequence[Place]:
        return dataset_files(path)

    def _index(self, file: Place, optional: Sequence[str]) -> FileIndex:
        return index_file(file, self.wanted.required, optional)

    def _blocks(self) -> Tensor:
        """Row group of each row."""
        sizes = torch.tensor([count for *_, count in self._groups])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

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

    def _load(self, number: int, file: FileIndex, row: int) -> Sample:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        table, offset = self._group(group), number - int(self._starts[group])
        caption = table["caption"][offset].as_py() or ""
        return Sample(file, caption, {name: self._array(name, file, row, table, offset) for name in self.names})

    def _group(self, number: int) -> pa.Table:
        if number not in self._cache:
            file, group, *_ = self._groups[number]
            columns = ["caption", *(f"{name}_bytes" for name in self.names)]
            with open_parquet(self.files[file].path) as opened:
                self._cache[number] = plain(opened.read_row_group(group, columns=columns, use_threads=False))
            # Room first for every bucket's window; a single row group may be larger than the whole budget.
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _array(self, name: str, file: FileIndex, row: int, table: pa.Table, offset: int) -> Floats:
        index = file.tensors[name]
        kind = index.kinds[index.codes[row]]
        data = table[f"{name}_bytes"][offset].as_buffer()
        check_bytes(file.path, row, name, data, kind)
        return floats(data, sample_shape(name, kind, self.wanted), kind[1])
