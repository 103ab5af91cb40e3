"""Saving: a new directory per checkpoint, its manifest written last; a run resumes from the newest intact one.

Every process writes its own tensors and random streams, as safetensors and JSON. Training waits for the copy to host
memory alone if ``asynchronous`` is set: a thread then does the writing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.engine.checkpoint.manifest import (
    MANIFEST,
    PREFIX,
    Manifest,
    checkpoints_in,
    complete_checkpoints,
    kept_steps,
    step_of,
)
from fastvideo.distillation.engine.checkpoint.state import PerProcess, RoleState, Stateful, split_state
from fastvideo.distillation.engine.checkpoint.storage import (
    HostCopy,
    copy_to_host,
    index_text,
    safetensors_bytes,
)
from fastvideo.distillation.engine.optional.mirror import HURRY, Mirror
from fastvideo.distillation.engine.parallel.collective import Agreement
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.errors import RunError
from fastvideo.files import FileRecord, make_folder, remove_tree, replace_file, sync_folder, write_file

CONFIG, INDEX, SHARED = "config.yaml", "tensors.json", "shared.json"
OTHERS_TIMEOUT = 3600.0
"""Seconds that the main process waits for the files of the others."""


@dataclass(frozen=True)
class RunFacts:
    """Facts in a checkpoint about its run: the config as YAML, the hash of what a resumed run must keep, versions."""

    config: str
    config_hash: str
    packages: Mapping[str, str]


@dataclass(frozen=True)
class Parts:
    """State of a run: trained roles, parts that all processes hold alike, and parts of each process."""

    roles: Mapping[str, RoleState]
    shared: Mapping[str, Stateful]
    own: Mapping[str, PerProcess]

    @property
    def everywhere(self) -> dict[str, Stateful]:
        """Parts that all processes hold alike, or in shards."""
        return {**self.roles, **self.shared}


class CheckpointHook:
    """Saves when due, and removes old checkpoints.

    Args:
        folder: parent of the ``step-N`` directories.
        over: true after the last step, which is saved too.
        mirror: of the main process, if checkpoints are uploaded.
    """

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        processes: Processes,
        options: CheckpointConfig,
        over: Callable[[], bool],
        facts: RunFacts,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.parts, self.processes = folder, parts, processes
        self.options, self.over, self.facts = options, over, facts
        self.mirror = mirror
        self._thread = ThreadPoolExecutor(1, "checkpoint") if options.asynchronous else None
        self._in_flight: Future[None] | None = None

    def due(self, step: int) -> bool:
        """True after every ``options.every`` steps, and after the last."""
        every = self.options.every
        return bool(every) and (step % every == 0 or self.over())

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Save if this step is due.

        Raises:
            RunError: if this save, or an earlier one that ran in the thread, failed.
        """
        if self._in_flight is not None and self._in_flight.done():
            self.wait()
        if self.due(step):
            self.save(step)

    def save(self, step: int) -> Path:
        """Write ``step-N``, or let the thread write it; it counts once its manifest is there.

        Raises:
            RunError: if it cannot be written.
        """
        self.wait()
        target = self.folder / f"{PREFIX}{step}"
        with _as_run_error(target):
            if self.processes.is_main:
                make_folder(self.folder)
                remove_tree(target, first=[MANIFEST])
                os.mkdir(target)
                sync_folder(self.folder)
        Agreement().wait()  # another process may be in a long validation still
        write = partial(self._write, target, step, *self._snapshot())
        if self._thread is None:
            write()
        else:
            self._in_flight = self._thread.submit(write)
        return target

    def save_for_stop(self, step: int) -> str:
        """Save a run that a signal stops, unless this step is saved already; returns an addition to the message.

        Raises:
            RunError: if it cannot be written.
        """
        target = self.folder / f"{PREFIX}{step}"
        if not (self.due(step) or target in complete_checkpoints(self.folder)):
            self.save(step)
        self.wait()
        return f"; saved {target}"

    def wait(self) -> None:
        """Wait for the thread.

        Raises:
            RunError: if a save in the thread failed.
        """
        running, self._in_flight = self._in_flight, None
        if running is not None:
            running.result()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Surround the run: at its end wait for the thread and the mirror, not for long if it is stopped or fails."""
        patience = HURRY
        try:
            yield
            patience = self.options.mirror_wait
        finally:
            try:
                self.wait()
            finally:
                if self.mirror is not None:
                    self.mirror.close(patience)

    def _snapshot(self) -> tuple[HostCopy, dict[str, str]]:
        """Copy the state to host memory, where it does not change while it is written: tensors, and texts by file."""
        rank = f"process-{self.processes.rank}"
        own, own_rest = split_state({rank: {name: part.state_dict() for name, part in self.parts.own.items()}})
        shared, rest = split_state({name: part.state_dict() for name, part in self.parts.everywhere.items()})
        copy = HostCopy(f"{rank}.safetensors")
        copy_to_host({**shared, **own}, copy)
        texts = {f"{rank}.json": json.dumps(own_rest[rank])}
        if self.processes.is_main:
            texts |= {SHARED: json.dumps(rest), CONFIG: self.facts.config}
        return copy, texts

    def _write(self, target: Path, step: int, copy: HostCopy, texts: Mapping[str, str]) -> None:
        with _as_run_error(target):
            rank = f"process-{self.processes.rank}"
            tensors = f"{rank}.safetensors"
            files = {tensors: write_file(target / tensors, safetensors_bytes(copy.tensors))}
            files |= {name: write_file(target / name, [text.encode()]) for name, text in texts.items()}
            if not self.processes.is_main:
                replace_file(target / f"{rank}.files", json.dumps({n: asdict(r) for n, r in files.items()}))
                return
            files[INDEX] = write_file(target / INDEX, [index_text(copy.index).encode()])
            files |= self._written_by_others(target)
            sync_folder(target)
            self._manifest(step, files).write(target)
            self._tidy(step)
            if self.mirror is not None:
                self.mirror.changed()

    def _written_by_others(self, target: Path) -> dict[str, FileRecord]:
        """File records of the other processes, read from files: no collective runs in a thread."""
        files: dict[str, FileRecord] = {}
        deadline = time.monotonic() + OTHERS_TIMEOUT
        for rank in range(1, self.processes.world_size):
            report = target / f"process-{rank}.files"
            while not report.is_file():
                if time.monotonic() > deadline:
                    raise RunError(f"checkpoint {target}: process {rank} has not written its part")
                time.sleep(0.01)
            files |= {
                name: FileRecord(**record) for name, record in json.loads(report.read_text(encoding="utf-8")).items()
            }
            os.unlink(report)
        return files

    def _manifest(self, step: int, files: Mapping[str, FileRecord]) -> Manifest:
        return Manifest(
            step=step,
            roles=tuple(self.parts.roles),
            world_size=self.processes.world_size,
            context=self.processes.context,
            device=self.processes.device.type,
            config_hash=self.facts.config_hash,
            packages=self.facts.packages,
            saved_at=int(time.time()),
            files=files,
        )

    def _tidy(self, newest: int) -> None:
        """Remove old checkpoints, only now that the newest is on the disk."""
        complete = [step_of(path) or 0 for path in complete_checkpoints(self.folder)]
        kept = kept_steps(complete, self.options)
        for path in checkpoints_in(self.folder):
            step = step_of(path) or 0
            if step not in kept and step < newest:
                remove_tree(path, first=[MANIFEST])


@contextmanager
def _as_run_error(target: Path) -> Iterator[None]:
    """Turn an OSError into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"checkpoint {target} cannot be written: {error.strerror}. The run stops here; earlier checkpoints are "
            f"untouched: make room and go on with --resume"
        ) from error
