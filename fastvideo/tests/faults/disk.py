"""The calls that change the file system: counted, stopped or refused at any of them; what a power cut leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
Fault = Callable[[str, tuple[Any, ...]], None]
"""What happens instead of a call, or before it; it may raise, or end the process."""


def kill(name: str, arguments: tuple[Any, ...]) -> None:
    """The process is gone before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_half_way(name: str, arguments: tuple[Any, ...]) -> None:
    """The process is gone in the middle of a write."""
    REAL["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
    kill(name, arguments)


def refuse(code: int) -> Fault:
    """The file system refuses with an error number."""

    def fault(name: str, arguments: tuple[Any, ...]) -> None:
        raise OSError(code, os.strerror(code))

    return fault


REAL = {name: getattr(os, name) for name in CALLS}


def ignore(name: str, arguments: tuple[Any, ...], result: Any) -> None:
    """Nothing to note after a call."""


@contextmanager
def interposed(
    before: Callable[[int, str, tuple[Any, ...]], None],
    after: Callable[[str, tuple[Any, ...], Any], None] = ignore,
) -> Iterator[None]:
    """Call ``before(number, name, arguments)`` before every call that changes the file system, and ``after`` it.

    Numbers start at 0; what ``before`` and ``after`` do to the file system themselves is not counted.
    """
    count, noting = 0, False

    def patched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count, noting
            if noting or (name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return REAL[name](*arguments, **options)
            number, count, noting = count, count + 1, True
            try:
                before(number, name, arguments)
                result = REAL[name](*arguments, **options)
                after(name, arguments, result)
            finally:
                noting = False
            return result

        return call

    for name in CALLS:
        setattr(os, name, patched(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, REAL[name])


@contextmanager
def faulty(at: int, fault: Fault, *, ever_after: bool = False) -> Iterator[None]:
    """The fault at one call, or from it on."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == at or (ever_after and number > at):
            fault(name, arguments)

    with interposed(before):
        yield


@dataclass
class Platter:
    """What a disk would hold after a power cut, from the calls that were made.

    The contents of a file are those of its last ``fsync``; the entries of a folder those of its last ``fsync``. With
    ``entries_at_once`` names reach the disk with their call, and contents still do not: files of zero length.
    """

    root: Path
    entries_at_once: bool
    durable: dict[str, bytes | None] = field(default_factory=dict)
    """Path to contents; ``None`` for a folder."""
    named: dict[str, int | None] = field(default_factory=dict)
    """Path to the file behind it, as a running system sees it; ``None`` for a folder."""
    contents: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    opened: dict[int, int] = field(default_factory=dict)
    """Descriptor to file."""

    def load(self) -> None:
        """Begin with what is there, all of it on the disk."""
        for path in sorted(self.root.rglob("*")):
            name = str(path)
            if path.is_dir():
                self.named[name] = self.durable[name] = None
            else:
                number = len(self.contents)
                self.named[name], self.durable[name] = number, path.read_bytes()
                self.contents[number] = self.synced[number] = path.read_bytes()

    def after(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Take note of a call that was made."""
        getattr(self, f"_{name}")(*arguments, result)
        if self.entries_at_once:
            self._sync_entries(None)

    def _open(self, path: Any, flags: int, mode: int, descriptor: int) -> None:
        number = len(self.contents)
        self.contents[number], self.synced[number] = b"", b""
        self.named[str(path)] = self.opened[descriptor] = number

    def _write(self, descriptor: int, data: Any, written: int) -> None:
        self.contents[self.opened[descriptor]] += bytes(data[:written])

    def _fsync(self, descriptor: int, result: None) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(target):
            self._sync_entries(target)
        else:
            number = self.opened[descriptor]
            self.synced[number] = self.contents[number]
            for name, held in self.named.items():
                if held == number and name in self.durable:
                    self.durable[name] = self.synced[number]

    def _replace(self, source: Any, target: Any, result: None) -> None:
        self.named[str(target)] = self.named.pop(str(source))

    _rename = _replace

    def _mkdir(self, path: Any, *rest: Any) -> None:
        self.named[str(path)] = None

    def _unlink(self, path: Any, *rest: Any) -> None:
        self.named.pop(str(path), None)

    _rmdir = _unlink

    def _sync_entries(self, folder: str | None) -> None:
        def within(name: str) -> bool:
            return folder is None or os.path.dirname(name) == folder

        for name in [name for name in self.durable if within(name) and name not in self.named]:
            del self.durable[name]
        for name, number in self.named.items():
            if within(name):
                self.durable[name] = None if number is None else self.synced[number]

    def materialise(self, root: Path) -> None:
        """Write what the disk holds under another root."""
        for name, content in sorted(self.durable.items()):
            path = root / Path(name).relative_to(self.root)
            if not path.parent.is_dir():
                continue  # its folder's own name was lost
            if content is None:
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(content)
