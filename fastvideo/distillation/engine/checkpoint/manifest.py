"""The manifest of a checkpoint: written last, so that it exists only if everything else does.

It holds the size and hash of every file, and a hash of itself: a change of any byte, in any file, is detected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.files import FileRecord, record_of, replace_file

MANIFEST = "manifest.json"
SCHEMA = 2
"""Version of the layout; checkpoints of other versions are refused."""
PREFIX = "step-"
NO_HASH = "0" * 64
"""Placeholder for the manifest's own hash while that is computed."""


class DamagedError(Exception):
    """A checkpoint that cannot be used; the text tells the user why."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    ``context`` processes shared a sample; ``config_hash`` covers the part of the config that a resumed run must keep;
    ``packages`` are versions.
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
        """Write it into its checkpoint, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps(asdict(self), indent=2) + "\n"
        replace_file(folder / MANIFEST, text.replace(NO_HASH, hashlib.sha256(text.encode()).hexdigest()))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest alone; :meth:`check_files` checks the other files.

        Raises:
            DamagedError: if it is missing or damaged.
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
            whole = False
        if not whole:
            raise DamagedError(f"{MANIFEST} is damaged")
        if schema != SCHEMA:
            raise DamagedError(f"it has layout {schema}, this version reads {SCHEMA}")
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return cls(**{**values, "roles": tuple(values["roles"])}, files=files)

    def check_files(self, folder: Path, rank: int = 0, processes: int = 1) -> None:
        """Compare every file with its record, or those that fall to one of several processes.

        A process has what it wrote itself, which it reads next: on its machine, what is read once is in memory.

        Raises:
            DamagedError: naming each file that is missing or differs.
        """
        own = [name for name in self.files if (writer_of(name) or 0) % processes == rank]
        with ThreadPoolExecutor(4, "verify") as pool:
            found = pool.map(lambda name: self._problem(folder, name), own)
        if problems := list(filter(None, found)):
            raise DamagedError("; ".join(problems))

    def _problem(self, folder: Path, name: str) -> str | None:
        expected, file = self.files[name], folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        return None if record_of(file) == expected else f"{name} is damaged"


def writer_of(file: str) -> int | None:
    """Number of the process that writes a file of a checkpoint; ``None`` for those that the main process writes."""
    number = file.partition(".")[0].removeprefix("process-")
    return int(number) if number.isdecimal() else None


def verified(folder: Path) -> Manifest:
    """Read the manifest and compare every file with it.

    Raises:
        DamagedError: with the reason.
    """
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    return manifest


def checkpoints_in(folder: Path) -> list[Path]:
    """Every checkpoint of a run, complete or not, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their manifest, oldest first."""
    return [path for path in checkpoints_in(folder) if (path / MANIFEST).is_file()]


def kept_steps(complete: Sequence[int], options: CheckpointConfig) -> set[int]:
    """Steps to keep of complete checkpoints, oldest first: the newest ones, and those kept permanently."""
    milestones = {step for step in complete if options.keep_every and step % options.keep_every == 0}
    return milestones | set(complete[-options.keep :])


def step_of(folder: Path) -> int | None:
    """Step in a checkpoint's name; ``None`` for another folder."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else None
