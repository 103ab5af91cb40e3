"""Unreadable files and rows of a dataset: stop at the first one, or skip a bounded number of them.

A file or row is readable on all processes and at every reading, or on none. So the order of samples stays a pure
function of (seed, epoch), and the processes stay in step: a skipped row does not remove its batch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from fastvideo.errors import UserError
from fastvideo.storage import Place, StorageError

LIST = "skipped_data.jsonl"
"""The list, in the run's folder: ``file``, ``row`` (null for a whole file) and ``error``."""
UNREADABLE = (UserError, pa.ArrowException, OSError, UnicodeDecodeError)
"""Errors that reading a damaged row raises."""


class VideoError(Exception):
    """Reason to leave out a video or an image; it is listed."""


@dataclass(frozen=True)
class Fault:
    """A skipped file, or one skipped row of it."""

    file: str
    row: int | None
    error: str


class Faults:
    """Files and rows skipped so far.

    Args:
        policy: ``raise`` stops at the first fault, ``skip`` after more than ``bound``, counted by each process.
    """

    def __init__(self, policy: Literal["raise", "skip"] = "raise", bound: int = 0) -> None:
        self.bound = bound if policy == "skip" else 0
        self._found: dict[tuple[str, int | None], Fault] = {}
        self._list: Path | None = None
        self._listed: set[tuple[str, int | None]] = set()
        self._main = True

    def __len__(self) -> int:
        return len(self._found)

    def record(self, file: Place, row: int | None, error: Exception) -> None:
        """Skip a file (``row`` is ``None``) or a row.

        Raises:
            UserError: if the bound is reached, or the fault is not the file's: the next reading may be another's.
        """
        if isinstance(error, StorageError):
            raise error
        fault = Fault(str(file), row, str(error).splitlines()[0] if str(error) else type(error).__name__)
        if (fault.file, fault.row) in self._found:
            return
        self._found[fault.file, fault.row] = fault
        if len(self._found) > self.bound:
            raise UserError(self._message(fault)) from error
        self._write(fault)

    def _message(self, fault: Fault) -> str:
        row = "" if fault.row is None or f"row {fault.row}" in fault.error else f", row {fault.row}"
        where = "" if fault.file in fault.error else f"{fault.file}{row}: "
        listed = f", see {self._list}" if self._list else ""
        many = f" (after {self.bound} skipped before, data.max_faults{listed})" if self.bound else ""
        return f"{where}{fault.error}{many}"

    def attach(self, folder: Path, rank: int) -> None:
        """Append to the list in a run's folder from now on; entries from before a resume stay."""
        path, self._main = folder / LIST, rank == 0
        before = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        self._listed = {(line["file"], line["row"]) for line in before}
        self._list = path
        for fault in self._found.values():
            self._write(fault)

    def _write(self, fault: Fault) -> None:
        """Every process lists its own rows; the main one alone lists files, which all processes skip."""
        mine = (self._main or fault.row is not None) and (fault.file, fault.row) not in self._listed
        if self._list is not None and mine:
            with self._list.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(fault)) + "\n")
