"""A copy of a run's newest checkpoints in a bucket, for machines whose disks go with them.

A thread of the main process uploads each complete checkpoint, its manifest last, so that the copy of a checkpoint is
whole or does not count. No failure of the bucket stops a running training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.engine.checkpoint.manifest import (
    MANIFEST,
    PREFIX,
    DamagedError,
    Manifest,
    complete_checkpoints,
    kept_steps,
    step_of,
    verified,
)
from fastvideo.errors import RunError, UserError
from fastvideo.files import replacing_folder
from fastvideo.storage import Remote, StorageError, download, place
from fastvideo.wording import counted

FOLDER = "checkpoints"
"""Folder below the mirror's URL, as in a run's own folder."""
PAUSES = (1.0, 60.0)
"""Seconds before the first try after a failure, and at most before a later one: each pause is twice the last."""
HURRY = 20.0
"""Most seconds that a stopped or failed run waits for its mirror."""
Listing = Mapping[int, frozenset[str]]
"""Names of files by step."""


def checkpoints_at(url: str) -> Remote:
    """Folder of the checkpoints below a mirror's URL.

    Raises:
        UserError: if the text is no URL.
    """
    root = place(url)
    if not isinstance(root, Remote):
        raise UserError(f"checkpoint.mirror: {url!r} is no URL; one such as s3://bucket/run is expected")
    return root / FOLDER


def listed(root: Remote) -> Listing:
    """Files of every checkpoint at a mirror, complete or not."""
    found: dict[int, set[str]] = {}
    for name in root.found():
        step = step_of(Path(PurePosixPath(name).parts[0]))
        if step is not None:
            found.setdefault(step, set()).add(PurePosixPath(name).name)
    return {step: frozenset(names) for step, names in sorted(found.items())}


def complete(listing: Listing) -> list[int]:
    """Steps of the checkpoints that have their manifest, oldest first."""
    return [step for step, names in listing.items() if MANIFEST in names]


def remove(root: Remote, step: int, names: Iterable[str]) -> None:
    """Delete a checkpoint at a mirror, its manifest first."""
    for name in sorted(names, key=lambda name: name != MANIFEST):
        (root / f"{PREFIX}{step}" / name).call("rm_file")


def set_aside(root: Remote, after: int | None, say: Callable[[str], None]) -> int:
    """Make a mirror ready for a run: move checkpoints later than the one it resumes from, and check that it can write.

    Returns the number of moved ones.

    Args:
        after: step of the checkpoint; ``None`` for a new run.
        say: prints a line for each.

    Raises:
        UserError: if the bucket cannot be written, or holds checkpoints and the run is new.
        RunError: if the bucket cannot be reached.
    """
    probe = root / ".probe"
    probe.call("pipe_file", b"")
    probe.call("rm_file")
    listing = listed(root)
    if after is None and complete(listing):
        raise UserError(
            f"checkpoint.mirror: {root} holds checkpoints of another run: go on from them with --resume, or choose "
            f"another URL"
        )
    later = [step for step in listing if after is not None and step > after]
    for step in later:
        for name in listing[step]:
            source, target = root / f"{PREFIX}{step}" / name, root / f"abandoned-{PREFIX}{step}" / name
            source.call("copy", target.path)
        remove(root, step, listing[step])
        say(f"{PREFIX}{step} of {root} is later than the one asked for: kept as abandoned-{PREFIX}{step}")
    return len(later)


def fetch_newest(root: Remote, folder: Path, after: int | None = None) -> tuple[int | None, list[str]]:
    """Download the newest checkpoint at a mirror that is intact and later than ``after``.

    Returns its step, if there is one, and a line for each damaged one.

    Raises:
        UserError: if the bucket cannot be read.
        RunError: if it cannot be reached.
    """
    skipped: list[str] = []
    for step in reversed([step for step in complete(listed(root)) if after is None or step > after]):
        try:
            fetch(root, step, folder)
        except DamagedError as error:
            skipped.append(f"{root / f'{PREFIX}{step}'}: {error}")
        else:
            return step, skipped
    return None, skipped


def fetch(root: Remote, step: int, folder: Path) -> None:
    """Download one checkpoint, whole or not at all, and compare every file with its hash.

    Raises:
        DamagedError: if it is incomplete or damaged.
    """
    source = root / f"{PREFIX}{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder / source.name) as partial:
        download(source, [MANIFEST], partial)
        names = Manifest.read(partial).files
        if any(PurePosixPath(name).name != name for name in names):
            raise DamagedError(f"{MANIFEST} names files outside the checkpoint")
        present = listed(root)[step]
        download(source, [name for name in names if name in present], partial)
        verified(partial)


class Mirror:
    """Uploads in a thread; see the module.

    Args:
        root: of the checkpoints in the bucket.
        folder: of the local ones.
        options: numbers of checkpoints that are kept, in the bucket as locally.
        say: prints a line.
    """

    def __init__(self, root: Remote, folder: Path, options: CheckpointConfig, say: Callable[[str], None]) -> None:
        self.root = replace(root, patience=0.0)  # the thread itself tries again, later
        self.folder, self.options, self.say = folder, options, say
        self.problem = ""
        self._there: dict[int, bytes] = {}
        self._sent: set[tuple[str, str]] = set()
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._wake.set()  # an earlier launch may have left something to upload
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Look for new checkpoints, soon."""
        self._wake.set()

    @property
    def behind(self) -> list[int]:
        """Steps of complete local checkpoints, later than the newest in the bucket, that are not there yet."""
        newest = max(self._there, default=-1)
        return [step for step in map(step_of, complete_checkpoints(self.folder)) if step is not None and step > newest]

    def figures(self) -> dict[str, float]:
        """Number of checkpoints that the bucket lacks."""
        return {"mirror/checkpoints_behind": float(len(self.behind))}

    def close(self, patience: float) -> None:
        """Finish the uploads, for at most ``patience`` seconds; says what is missing then."""
        self._closing.set()
        self._wake.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            self._given_up.set()
            missing, why = counted(len(self.behind), "checkpoint"), self.problem or "the upload takes longer"
            self.say(f"mirror {self.root}: {missing} not there ({why}); --resume uploads what is in {self.folder}")

    def _work(self) -> None:
        pause = PAUSES[0]
        while not self._given_up.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._synchronise()
            except (UserError, RunError, OSError) as error:
                self._report(str(error))
                self._given_up.wait(pause)
                pause = min(2 * pause, PAUSES[1])
                self._wake.set()
            else:
                if self.problem:
                    self.say(f"mirror {self.root} is up to date again")
                self.problem, pause = "", PAUSES[0]
                if self._closing.is_set() and not self._wake.is_set():
                    return

    def _report(self, problem: str) -> None:
        if problem != self.problem and not self._given_up.is_set():
            self.say(f"mirror: {problem}; the run goes on, {counted(len(self.behind), 'checkpoint')} behind")
        self.problem = problem

    def _synchronise(self) -> None:
        while (folder := self._next()) is not None:
            self._upload(folder)
        self._tidy()

    def _next(self) -> Path | None:
        """The newest local checkpoint that is not in the bucket."""
        for folder in reversed(complete_checkpoints(self.folder)):
            with suppress(FileNotFoundError):  # removed meanwhile
                if self._there.get(step_of(folder) or 0) != (folder / MANIFEST).read_bytes():
                    return folder
        return None

    def _upload(self, folder: Path) -> None:
        step, target = step_of(folder) or 0, self.root / folder.name
        try:
            manifest, names = (folder / MANIFEST).read_bytes(), Manifest.read(folder).files
            if self._is_there(step, manifest):
                return
            for name in names:
                self._send(folder / name, target / name, names[name].sha256)
        except (DamagedError, FileNotFoundError, StorageError):
            if (folder / MANIFEST).is_file():
                raise
            return  # removed as an old one meanwhile; the bucket's part of it goes with the next tidying
        (target / MANIFEST).call("pipe_file", manifest)
        self._there[step] = manifest

    def _is_there(self, step: int, manifest: bytes) -> bool:
        """True for the same checkpoint; one of the same step with other contents loses its manifest."""
        file = self.root / f"{PREFIX}{step}" / MANIFEST
        if MANIFEST not in listed(self.root).get(step, ()):
            return False
        if file.read_bytes() == manifest:
            self._there[step] = manifest
            return True
        file.call("rm_file")
        return False

    def _send(self, source: Path, target: Remote, sha256: str) -> None:
        """Upload a file, unless a try before did."""
        if (target.url, sha256) not in self._sent:
            target.upload(source)
            self._sent.add((target.url, sha256))

    def _tidy(self) -> None:
        """Remove old checkpoints, only now that newer ones are there."""
        listing = listed(self.root)
        there = complete(listing)
        kept = kept_steps(there, self.options)
        for step in [step for step in listing if step not in kept and step < max(there, default=0)]:
            remove(self.root, step, listing[step])
            self._there.pop(step, None)
            self._sent = {entry for entry in self._sent if not entry[0].startswith(f"{self.root / f'{PREFIX}{step}'}/")}
