"""Snapshots of the student's averages while it trains, and any average of its updates out of them afterwards.

One safetensors file per update and stored profile, whole tensors under the student's names. Their number is bounded:
when there would be more than ``keep``, the distance doubles, and those between go.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.config.averages import PostHocConfig
from fastvideo.distillation.engine.checkpoint.manifest import step_of
from fastvideo.distillation.engine.ema import PowerAverages
from fastvideo.distillation.engine.optional.profiles import Fit, Profile, fit
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import full
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import tensors_of, training_of
from fastvideo.errors import RunError, UserError
from fastvideo.files import make_folder, replacing

FOLDER = "snapshots"
"""Folder of a run that holds them."""
STEP = "step"
"""Key of a file's metadata: finished steps of the run."""
NAME = re.compile(r"update-(\d+)-std-(0\.\d+)\.safetensors")


class Snapshots:
    """Hook that writes the student's averages as its updates pass.

    Args:
        folder: of the run's snapshots.
    """

    def __init__(self, student: RoleHandle, options: PostHocConfig, folder: Path, processes: Processes) -> None:
        self.student, self.options, self.folder, self.processes = student, options, folder, processes
        self.updates = self.step = self.written = 0

    def due(self, step: int) -> bool:
        """False: this hook always runs before the next update, with which alone averages change."""
        return False

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Count the student's updates, and write those that are due; all processes take part.

        Raises:
            RunError: if a file cannot be written, or an average is not finite or does not fit into float16.
        """
        if self.student.name not in active:
            return
        self.updates, self.step = self.updates + 1, step
        if self.updates % distance(self.updates, self.options) == 0:
            self.write()

    def finish(self) -> None:
        """Write the last update, for which averages are made."""
        if self.updates != self.written:  # no look at the files, which other processes may see later
            self.write()

    def write(self) -> None:
        """Write the averages as they are, then delete what is no longer kept."""
        self.written = self.updates
        for std in self.options.stds:
            tensors = self._whole(training_of(self.student).powers[f"{std:g}"])
            if self.processes.is_main:
                self._save(Profile(self.updates, std), tensors)
        if self.processes.is_main:
            step = distance(self.updates, self.options)
            self._delete(lambda update: update % step > 0 and update != self.updates)

    def _whole(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the files' precision on the main process's host, gathered one by one.

        Raises:
            RunError: for one that is not finite there.
        """
        dtype, found = getattr(torch, self.options.precision), dict[str, Tensor]()
        for name, tensor in average.items():
            own = tensor.to(self.processes.device)  # offloaded shards too: a device's processes gather there alone
            whole = full(own.to(dtype) if tensor.is_floating_point() else own)
            if not whole.isfinite().all():  # on every process alike
                raise self._not_finite(name, full(own))
            if self.processes.is_main:
                found[name] = whole.detach().cpu().contiguous()
        return found

    def _not_finite(self, name: str, average: Tensor) -> RunError:
        """The error of a snapshot: its average outgrew the files' precision, or is itself infinite or NaN."""
        begin = f"snapshots of update {self.updates} in {self.folder}: the average of {name}"
        if average.isfinite().all():
            return RunError(f"{begin} does not fit into {self.options.precision}; set ema.post_hoc.precision: float32")
        kind = "NaN" if average.isnan().any() else "infinite"
        return RunError(f"{begin} is {kind}: the student's weights diverged; go on from an earlier checkpoint")

    def _save(self, profile: Profile, tensors: Mapping[str, Tensor]) -> None:
        file = self.folder / file_name(profile)
        try:
            make_folder(self.folder)
            with replacing(file) as partial:
                save_file(dict(tensors), partial, metadata={STEP: str(self.step)})  # several keys have no order
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"snapshot {file} cannot be written: {error}. The run stops here: make room and go on with --resume"
            ) from error

    def _delete(self, unwanted: Callable[[int], bool]) -> None:
        for profile, file in snapshots_in(self.folder).items():
            if unwanted(profile.update):
                file.unlink(missing_ok=True)

    def resume(self, checkpoint: Path) -> tuple[str, ...]:
        """Go on from a checkpoint that was restored: later snapshots go, earlier ones of another run are copied.

        Returns:
            Lines about snapshots that are missing.
        """
        self.updates = int(training_of(self.student).powers[PowerAverages.COUNT][PowerAverages.COUNT])
        self.step = step_of(checkpoint) or 0
        if not self.processes.is_main:
            return ()
        self._delete(lambda update: update > self.updates)
        other = checkpoint.resolve().parent.parent / FOLDER
        if other != self.folder.resolve():
            make_folder(self.folder)
            for profile, file in snapshots_in(other).items():
                if profile.update <= self.updates:
                    with replacing(self.folder / file.name) as partial:
                        shutil.copyfile(file, partial)
        if self.updates < self.options.every or snapshots_in(self.folder):
            return ()
        return (f"no snapshots up to update {self.updates} are in {self.folder}: wide averages will be less exact",)


def begin(
    bundle: ModelBundle,
    options: PostHocConfig | None,
    tracker: Tracker,
    processes: Processes,
    source: Path | None,
) -> tuple[Snapshots, ...]:
    """The hook of a run that keeps snapshots, which goes on from a restored checkpoint if there is one."""
    if options is None:
        return ()
    hook = Snapshots(bundle["student"], options, tracker.folder / FOLDER, processes)
    for line in () if source is None else hook.resume(source):
        tracker.say(line)
    return (hook,)


def distance(updates: int, options: PostHocConfig) -> int:
    """Updates between two snapshots that are kept after ``updates``: ``every``, doubled until ``keep`` are enough."""
    found = options.every
    while updates // found > options.keep:
        found *= 2
    return found


def file_name(profile: Profile) -> str:
    """Name of a snapshot's file; names sort as updates do."""
    return f"update-{profile.update:08d}-std-{profile.std:g}.safetensors"


def snapshots_in(folder: Path) -> dict[Profile, Path]:
    """Snapshots of a run, by update and width."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    named = [(NAME.fullmatch(file.name), file) for file in files]
    return {Profile(int(found[1]), float(found[2])): file for found, file in named if found is not None}


def saved_step(file: Path) -> int:
    """Finished steps of the run when a snapshot was written.

    Raises:
        UserError: if its header cannot be read, or does not say it.
    """
    try:
        with safe_open(file, "pt") as opened:
            step = (opened.metadata() or {}).get(STEP, "")
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from error
    if not step.isdecimal():
        raise _unreadable(file, f"its metadata has no number {STEP!r}")
    return int(step)


def disk_bytes(student: RoleHandle, options: PostHocConfig | None) -> int:
    """Most bytes that a run's snapshots take; 0 for a run without any."""
    if options is None:
        return 0
    item = getattr(torch, options.precision).itemsize
    sizes = [t.numel() * (item if t.is_floating_point() else t.element_size()) for t in tensors_of(student).values()]
    return sum(sizes) * len(options.stds) * (options.keep + 1)


def averaged(folder: Path, wanted: Profile) -> tuple[dict[str, Tensor], Fit]:
    """The student's average under a profile, float32 on the CPU, and how near to it the snapshots come.

    Raises:
        UserError: if there are no snapshots up to that update, or a file is damaged.
    """
    stored = snapshots_in(folder)
    found = fit(list(stored), wanted)
    tensors = dict[str, Tensor]()
    for profile, coefficient in found.coefficients.items():
        for name, tensor in _read(stored[profile]).items():
            if not tensor.is_floating_point():
                tensors[name] = tensor  # files are in the order of updates: that of the last one
            elif name in tensors:
                tensors[name].add_(tensor.float(), alpha=coefficient)
            else:
                tensors[name] = tensor.float() * coefficient
    return tensors, found


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from error


def _unreadable(file: Path, reason: str) -> UserError:
    return UserError(f"snapshot {file} cannot be read: {reason}; delete it, and the others make the average")
