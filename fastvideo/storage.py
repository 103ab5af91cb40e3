"""Files by URL, such as ``s3://bucket/name``, ``gs://``, ``hf://`` and every protocol of fsspec, beside local paths.

A failure that may pass (a lost connection, a busy server) is tried again for :data:`PATIENCE` seconds, then it is a
:class:`RunError`. One that does not pass (no bucket, no permission, no package) is a :class:`StorageError` at once. So
neither is ever taken for a damaged file.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fastvideo.errors import RunError, UserError
from fastvideo.files import make_folder, replacing_folder

PATIENCE = 60.0
"""Seconds for which a failure that may pass is tried again."""
URL = re.compile(r"([a-z][a-z0-9+.-]+)://.+")
INSTALL = {"s3": "[s3]", "s3a": "[s3]", "gs": "[gcs]", "gcs": "[gcs]"}
"""Protocol to the extra that brings its package."""
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)
"""Errors that another try does not mend; so are those of credentials, whose types depend on the protocol."""
CHECKSUMS = ("ETag", "etag", "md5Hash", "mtime")
"""Keys under which file systems give a file's checksum or, failing that, its time."""
T = TypeVar("T")


class StorageError(UserError):
    """A failure that lasts: no such bucket, no permission. It says nothing about the file behind it."""


@dataclass(frozen=True)
class Remote:
    """A file or folder by its URL.

    Attributes:
        patience: seconds for which a failure that may pass is tried again; ``None`` for :data:`PATIENCE`.
    """

    url: str
    patience: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}", self.patience)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rpartition("/")[0], self.patience)

    @property
    def system(self) -> Any:
        """The file system of fsspec behind the URL."""
        return _system(self.url.partition("://")[0])

    @property
    def path(self) -> str:
        """Name within the file system."""
        return str(self.system._strip_protocol(self.url))

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system on this path, with patience.

        Raises:
            StorageError: for a failure that lasts.
            RunError: for one that did not pass.
        """
        return patiently(self.url, lambda: getattr(self.system, name)(self.path, *arguments, **options), self.patience)

    def upload(self, file: Path) -> None:
        """Copy a local file here."""
        patiently(self.url, lambda: self.system.put_file(str(file), self.path), self.patience)

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes from ``start`` to before ``end``, or all."""
        return bytes(self.call("cat_file", start=start, end=end))

    def found(self) -> dict[str, dict[str, Any]]:
        """Facts of every file here and below (``size`` and what the server says), by name relative to this folder.

        Empty for a folder that does not exist: object stores have no folders. A file is found under its own name.
        """
        self.system.invalidate_cache()
        try:
            listed = self.call("find", detail=True)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and "bucket" not in str(error.__cause__).lower():
                return {}
            raise
        above = f"{self.path.rstrip('/')}/"
        return {name.removeprefix(above) if name != self.path else self.name: facts for name, facts in listed.items()}


Place = Path | Remote


def is_remote(path: str) -> bool:
    """True for a URL."""
    return URL.fullmatch(path) is not None


def place(path: str) -> Place:
    """A local path or a URL.

    Raises:
        UserError: for a URL whose protocol is unknown, or whose package is not installed.
    """
    if not is_remote(path):
        return Path(path)
    _system(path.partition("://")[0])
    return Remote(path)


@lru_cache
def _system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = f"fastvideo-distillation{INSTALL[protocol]}" if protocol in INSTALL else str(error)
        raise UserError(f"{protocol}:// needs a package that is not installed: pip install '{package}'") from error
    except ValueError as error:
        known = "s3://, gs://, hf://, https:// and other protocols of fsspec"
        raise UserError(f"{protocol}://: unknown protocol; {known} are possible") from error


def patiently(url: str, action: Callable[[], T], patience: float | None = None) -> T:
    """Call ``action`` until it succeeds; ``patience`` in seconds, by default :data:`PATIENCE`.

    Raises:
        StorageError: for a failure that lasts.
        RunError: for one that did not pass.
    """
    deadline, pause = time.monotonic() + (PATIENCE if patience is None else patience), 0.1
    while True:
        try:
            return action()
        except (StorageError, RunError):
            raise
        except Exception as error:  # every protocol has exceptions of its own
            if lasts(error):
                raise StorageError(f"{url}: {reason(error)}") from error
            if time.monotonic() + pause > deadline:
                raise RunError(f"{url} cannot be reached: {reason(error)}") from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def lasts(error: BaseException) -> bool:
    """True for an error that another try does not mend."""
    name = type(error).__name__
    return isinstance(error, LASTING) or "Credential" in name or "Token" in name or name == "ParamValidationError"


def reason(error: BaseException) -> str:
    """The first line of an error, with advice for credentials."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(error, FileNotFoundError):
        return text if " " in text else f"{text} does not exist"
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return f"access denied ({text}); renew the credentials (environment or profile), or the bucket's permissions"
    return text


class RangeFile(io.RawIOBase):
    """A remote file for reading: each read is one request for just those bytes, with patience."""

    def __init__(self, remote: Remote, size: int | None = None) -> None:
        super().__init__()
        self.remote, self._position = remote, 0
        self.size = int(remote.call("info")["size"]) if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self.size)
        if end <= self._position:
            return 0
        data = self.remote.read_bytes(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_bytes(path: str | Place) -> bytes:
    """A whole file.

    Raises:
        OSError: for a local file that cannot be read.
        StorageError: for a remote one; see :func:`patiently`.
    """
    return (place(path) if isinstance(path, str) else path).read_bytes()


def state_of(file: Place) -> str:
    """Text that differs for another file, and for the same one after a change.

    Raises:
        OSError: for a local file that cannot be read.
        StorageError: for a remote one; see :func:`patiently`.
    """
    if isinstance(file, Path):
        facts = file.stat()
        return repr([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    return repr([file.url, fingerprint({"": file.call("info")})])


@contextmanager
def at_hand(file: Place) -> Iterator[Path]:
    """A local path of a file; of a remote one, a copy that goes with the context.

    Raises:
        StorageError: for a remote one; see :func:`patiently`.
    """
    if isinstance(file, Path):
        yield file
        return
    with TemporaryDirectory() as folder:
        download(file.parent, [file.name], Path(folder))
        yield Path(folder) / file.name


def files_below(folder: Place, suffix: str) -> list[Place]:
    """Files in a folder and below whose names end in ``suffix`` and begin with no dot, in the order of their names.

    The order is the same for a local folder and its copy elsewhere.
    """
    if isinstance(folder, Path):
        return [*sorted(file for file in folder.rglob(f"*{suffix}") if file.name[0] != ".")]
    names = [PurePosixPath(name) for name in folder.found()]
    return [folder / str(name) for name in sorted(names) if name.name.endswith(suffix) and name.name[0] != "."]


def is_file(at: Place) -> bool:
    """True for a file. The name of a remote one must have a suffix: others count as folders."""
    if isinstance(at, Path):
        return at.is_file()
    return bool(at.suffix) and bool(at.call("isfile"))


def cache_folder() -> Path:
    """Folder for what is fetched or computed once per machine: ``FASTVIDEO_CACHE``, else ``~/.cache/fastvideo``."""
    return Path(os.environ.get("FASTVIDEO_CACHE", "~/.cache/fastvideo")).expanduser()


def local_folder(url: str) -> Path:
    """Fetch a remote folder into the cache, once per machine and content; its processes wait for the first.

    Raises:
        UserError: if there is no file, or it is one file.
        StorageError: if it cannot be read.
        RunError: if the download was not complete.
    """
    from filelock import FileLock

    remote = place(url)
    assert isinstance(remote, Remote)
    found = remote.found()
    if not found:
        raise UserError(f"{url} does not exist: no file is there")
    if list(found) == [remote.name]:
        raise UserError(f"{url} is a file, a folder is expected; single files of weights are read from a disk alone")
    key = hashlib.sha256(repr([url.rstrip("/"), fingerprint(found)]).encode()).hexdigest()[:16]
    folder = cache_folder() / "folders" / f"{remote.name}-{key}"
    sizes = {name: int(entry["size"]) for name, entry in found.items()}
    make_folder(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not _holds(folder, sizes):
            with replacing_folder(folder) as partial:
                download(remote, list(sizes), partial)
                if not _holds(partial, sizes):
                    raise RunError(f"{url}: the download is not complete; start it again")
    return folder


def fingerprint(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Name, size and the server's checksum of files, in order: equal while nothing was changed."""
    return sorted([name, *(str(facts.get(key)) for key in ("size", *CHECKSUMS))] for name, facts in found.items())


def _holds(folder: Path, sizes: dict[str, int]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def download(remote: Remote, names: Sequence[str], folder: Path) -> None:
    """Copy files below ``remote`` into a local folder, under the same names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).call("get_file", str(folder / name))
