"""The manifest of a checkpoint: written last, so that it is there only if everything else is.

It holds the size and hash of every file, and a hash of itself: a change of any byte, in any file, is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastvideo.files import FileRecord, record_of, replace_file

MANIFEST = "manifest.json"
SCHEMA = 2
"""Version of the layout; a checkpoint of another one is refused by name."""
PREFIX = "step-"
NO_HASH = "0" * 64
"""Stands for the manifest's own hash while that is computed."""


class DamagedError(Exception):
    """Why a checkpoint cannot be used; its text is for the user."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    ``context`` is how many processes shared a sample; ``config_hash`` is that of the part of the config that a resumed
    run must keep; ``packages`` are versions.
    """

    step: int
    roles: tuple[str, ...]
    world_size: int
    context: int
    device: str
    config_hash: str
    packages: Mapping[str, str]
    saved_at: int
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema: int = SCHEMA
    sha256: str = NO_HASH

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def write(self, folder: Path) -> None:
        """Put it into its checkpoint, where it is either whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps(asdict(self), indent=2) + "\n"
        replace_file(folder / MANIFEST, text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest()))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint; the other files are not looked at.

        Raises:
            DamagedError: if there is none, or it is not what was written.
        """
        try:
            content = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"it has no {MANIFEST}: its save was not finished") from None
        except OSError as error:
            raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from error
        try:
            values = json.loads(content)
            own = values["sha256"]
            whole = hashlib.sha256(content.replace(own.encode(), NO_HASH.encode())).hexdigest() == own
            schema = values["schema"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{MANIFEST} is damaged") from None
        if not whole:
            raise DamagedError(f"{MANIFEST} is damaged")
        if schema != SCHEMA:
            raise DamagedError(f"it has layout {schema}, this version reads {SCHEMA}")
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return cls(**{**values, "roles": tuple(values["roles"])}, files=files)

    def check_files(self, folder: Path) -> None:
        """Compare every file with its record.

        Raises:
            DamagedError: naming each file that is missing or differs.
        """
        with ThreadPoolExecutor(4, "verify") as pool:
            problems = list(pool.map(lambda name: self._problem(folder, name), self.files))
        found = [problem for problem in problems if problem]
        if found:
            raise DamagedError("; ".join(found))

    def _problem(self, folder: Path, name: str) -> str | None:
        expected, file = self.files[name], folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        return None if record_of(file) == expected else f"{name} is damaged"


def verified(folder: Path) -> Manifest:
    """The manifest, after every file was compared with it.

    Raises:
        DamagedError: saying what is wrong.
    """
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    return manifest


def checkpoints_in(folder: Path) -> list[Path]:
    """Every checkpoint of a run, complete or not, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those of them that have their manifest, oldest first."""
    return [path for path in checkpoints_in(folder) if (path / MANIFEST).is_file()]


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; ``None`` for another folder."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else None


def newest_intact(candidates: Iterable[Path], passed_over: list[str]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose every byte is right; what was passed over on the way is appended, with the reason."""
    for folder in sorted(candidates, key=lambda path: step_of(path) or 0, reverse=True):
        try:
            return folder, verified(folder)
        except DamagedError as error:
            passed_over.append(f"{folder}: {error}")
    return None
