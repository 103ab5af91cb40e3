"""Samples in files, whatever their format: which files are usable, buckets by shape, and rows to a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from fastvideo.data.faults import UNREADABLE, Faults
from fastvideo.data.fits import DataRequirements, check_fits, is_raw
from fastvideo.data.index import FileIndex, latent_shape
from fastvideo.data.order import Bucket
from fastvideo.data.schema import LATENT, TEXT, Floats, is_text
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.stopping import unit_done
from fastvideo.storage import Place


@dataclass(frozen=True)
class Sample:
    """One row as read."""

    file: FileIndex
    caption: str
    arrays: dict[str, Floats]


class StoredSource(ABC):
    """The samples of a dataset in files.

    Args:
        path: a file, or a folder with files in it or below, local or a URL.
        wanted: tensors to read.
        faults: bound on skipped files and rows; none may be skipped by default.

    Raises:
        UserError: naming the file, if one is not readable or lacks a tensor.
    """

    def __init__(self, path: str, wanted: DataRequirements, faults: Faults | None = None) -> None:
        self.wanted, self.faults = wanted, Faults() if faults is None else faults
        self.files = list(self._usable(path))
        self.names = [*wanted.required, *filter(self._is_stored, self._text_columns)]
        self._file_starts = np.cumsum([0, *(file.rows for file in self.files)])

    @abstractmethod
    def _paths(self, path: str) -> Sequence[Place]:
        """Files of the dataset, in order."""

    @abstractmethod
    def _index(self, file: Place, optional: Sequence[str]) -> FileIndex:
        """Rows and tensors of a file: the wanted ones, which it must have, and the optional ones."""

    @abstractmethod
    def _blocks(self) -> Tensor | None:
        """Block of each row, as in :class:`Bucket`."""

    @abstractmethod
    def _window(self, buckets: int) -> int:
        """Blocks that are shuffled into one another."""

    @abstractmethod
    def _load(self, number: int, file: FileIndex, row: int) -> Sample:
        """Read one sample."""

    @abstractmethod
    def captions(self) -> list[str]:
        """All readable captions."""

    def _usable(self, path: str) -> Iterator[FileIndex]:
        """Readable files that fit."""
        first: UserError | None = None
        count = 0
        for file in self._paths(path):
            unit_done()
            try:
                indexed = self._index(file, self._text_columns)
                check_fits(indexed, self.wanted)
            except UserError as error:
                first = first or error
                self.faults.record(file, None, error)
            else:
                count += 1
                yield indexed
        if not count:
            raise UserError(f"data.path: no file of {path} can be used; the first: {first}")

    @property
    def _text_columns(self) -> list[str]:
        return [name for name in self.wanted.extras if is_text(name)]

    def _is_stored(self, column: str) -> bool:
        """True if every row has that text; refuses a dataset in which only some have one."""
        missing = [(file, file.tensors[column].missing if column in file.tensors else file.rows) for file in self.files]
        total = sum(count for _, count in missing)
        if total in (0, len(self)):
            return total == 0
        file = next(file for file, count in missing if count)
        raise UserError(f"data: {total} of {len(self)} rows have no text embedding, the first of them in {file.path}")

    def __len__(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def has_text(self) -> bool:
        """True if stored text embeddings replace encoded captions of the model's own."""
        return TEXT in self.texts

    @property
    def texts(self) -> list[str]:
        """Names in a batch of the stored texts."""
        return [self.wanted.named(name) for name in self.names if is_text(name)]

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        """Rows by latent shape; one bucket if latents are not read."""
        blocks = self._blocks()
        if not self.wanted.latents:
            return (Bucket("all", torch.arange(len(self)), blocks, self._window(1)),)
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
        named = {"x".join(map(str, shape)): own for shape, own in members.items()}
        return tuple(Bucket(name, own, None if blocks is None else blocks[own], window) for name, own in named.items())

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
        extras = {self.wanted.named(name): self._stacked(name, samples) for name in self.names if name != LATENT}
        latents = self._latents(samples) if self.wanted.latents else None
        return RawBatch(tuple(row.caption for row in samples), latents, extras)

    def _row(self, number: int) -> Sample | None:
        """One sample, or ``None`` for a skipped row."""
        file, row = self._locate(number)
        try:
            return self._load(number, file, row)
        except UNREADABLE as error:
            self.faults.record(file.path, row, error)
            return None

    def _locate(self, number: int) -> tuple[FileIndex, int]:
        """File, and row within it."""
        file = int(np.searchsorted(self._file_starts, number, side="right")) - 1
        return self.files[file], number - int(self._file_starts[file])

    def _stacked(self, name: str, rows: Sequence[Sample]) -> Tensor:
        """One tensor of all rows; text embeddings are zero-padded to the longest."""
        arrays = [row.arrays[name] for row in rows]
        if not is_text(name):
            return torch.from_numpy(np.stack(arrays))
        longest = max(len(array) for array in arrays)
        padded = np.zeros((len(arrays), longest, arrays[0].shape[1]), dtype=np.float32)
        for out, array in zip(padded, arrays, strict=True):
            out[: len(array)] = array
        return torch.from_numpy(padded)

    def _latents(self, rows: Sequence[Sample]) -> Tensor:
        latents = self._stacked(LATENT, rows)
        raw = torch.tensor([is_raw({"latents": self.wanted.unmarked, **row.file.made}) for row in rows])
        if raw.any():
            assert self.wanted.normalise is not None
            latents[raw] = self.wanted.normalise(latents[raw])
        return latents
