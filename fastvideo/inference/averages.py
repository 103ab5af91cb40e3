"""Averages of a run's student that are made after the run, out of the snapshots that it left (docs/averages.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastvideo.distillation.engine.lora import adapter_files, is_adapter
from fastvideo.distillation.engine.optional.profiles import DEFAULT_STDS, Fit, Profile, fit
from fastvideo.distillation.engine.optional.snapshots import FOLDER, averaged, saved_step, snapshots_in
from fastvideo.distillation.registry import load_adapter
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing_folder
from fastvideo.inference.export import check_new_folder
from fastvideo.inference.export_source import RUN_CONFIG, ExportSource, adapter_scaling, with_weights
from fastvideo.inference.exported import without_path
from fastvideo.inference.loading import LoadedModel

MARK = "post_hoc"
"""Key in the recipe of such a result: width, update and exactness of its average; only those may be overwritten."""
RESULT = "averaged"
"""Name of the result in the run's folder."""
LARGEST_ERROR = 0.2
"""Largest error of a profile, relative to it; an average that misses more is another one."""


@dataclass(frozen=True)
class Average:
    """The student with an average, on the CPU: its model, its trained tensors alone, and how they were found."""

    model: LoadedModel
    tensors: dict[str, Tensor]
    fit: Fit


@dataclass(frozen=True)
class Snapshotted:
    """A run with snapshots: its config, its start weights, and the update that averages are made for."""

    source: ExportSource
    folder: Path
    update: int

    def fit(self, std: float) -> Fit:
        """Least-squares fit of the average of this width by the snapshots."""
        return fit(list(snapshots_in(self.folder)), Profile(self.update, std))

    @property
    def widths(self) -> list[float]:
        """Widths to choose from: those that the run stored, and the usual ones."""
        return sorted({*DEFAULT_STDS, *(profile.std for profile in snapshots_in(self.folder))})

    def average(self, std: float) -> Average:
        """The average of this width.

        Raises:
            UserError: for a damaged snapshot, or one of another network.
        """
        tensors, found = averaged(self.folder, Profile(self.update, std))
        model = with_weights(self.source, tensors, self.folder)
        facts = {"std": std, "update": self.update, "error": round(found.error, 5)}
        return Average(replace(model, recipe={**model.recipe, MARK: facts}), tensors, found)


def find_snapshots(run: Path, update: int | None = None) -> Snapshotted:
    """Find the snapshots of a run up to an update of the student; by default the last one.

    Raises:
        UserError: if the folder is no run, its family has no pipeline, or there are no snapshots.
    """
    if not (run / RUN_CONFIG).is_file():
        raise UserError(f"average: {run} is no run's folder (no {RUN_CONFIG})")
    source, folder = ExportSource(run, None, None, "ema", 0), run / FOLDER
    family = source.config.get("distill_model", "")
    if not load_adapter(family).Config.pipelines:
        raise UserError(f"average: {run} is a run of the family {family!r}, which has no pipeline to save")
    stored = snapshots_in(folder)
    updates = sorted({profile.update for profile in stored})
    if not updates:
        raise UserError(f"average: {run} holds no snapshots; a run keeps them with `ema: {{post_hoc: {{}}}}`")
    if update is not None and update not in updates:
        held = ", ".join(map(str, updates))
        raise UserError(f"--update {update}: an average is made for an update with a snapshot: {held}")
    update = updates[-1] if update is None else update
    step = max(saved_step(file) for profile, file in stored.items() if profile.update == update)
    return Snapshotted(replace(source, step=step), folder, update)


def write_averages(run: Snapshotted, stds: Sequence[float], out: Path | None, overwrite: bool) -> list[str]:
    """Write the student once for each width; returns a line for each.

    Args:
        out: folder of a single one; by default they go beside the run's own result.

    Raises:
        UserError: for a width that the snapshots do not give, or a folder in use; writes nothing then.
    """
    if out is not None and len(stds) > 1:
        raise UserError("--out is the folder of one average; give one --std, or leave --out out")
    folders = {std: out or beside(run, f"{RESULT}-{std:g}") for std in stds}
    for std, folder in folders.items():
        check_fit(run, std)
        check_free(folder, overwrite)
    return [_write(run, std, folder) for std, folder in folders.items()]


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a result can be written to a folder.

    Raises:
        UserError: if it is in use.
    """
    check_new_folder(folder, None, overwrite, MARK, "average")


def beside(run: Snapshotted, name: str) -> Path:
    """A folder beside a run's own result."""
    return run.folder.parent / name


def check_fit(run: Snapshotted, std: float) -> None:
    """Check that the snapshots give the average of a width.

    Raises:
        UserError: with the error of their nearest sum.
    """
    if (found := run.fit(std)).error > LARGEST_ERROR:
        raise UserError(
            f"--std {std:g}: {run.folder} gives this average with an error of {found.error:.0%}, and "
            f"{LARGEST_ERROR:.0%} is the most: take one nearer to ema.post_hoc.stds, or train with a larger "
            f"ema.post_hoc.keep"
        )


def _write(run: Snapshotted, std: float, folder: Path) -> str:
    average = run.average(std)
    model = average.model
    without_path(model.network)
    try:
        with replacing_folder(folder) as partial:
            slim = run.source.run_config.trainer.slim_result
            model.adapter.folder.save(partial, model.network, model.recipe, slim=slim)
            if is_adapter(average.tensors):  # beside the network that it is merged into, as in a run's result
                _write_adapter(average, adapter_scaling(run.source), partial)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from error
    return f"{folder}: the average of std {std:g} at update {run.update}, error {average.fit.error:.1%}"


def _write_adapter(average: Average, scaling: float, folder: Path) -> None:
    files = adapter_files(average.tensors, scaling, average.model.adapter.folder.parts[0])
    for name, own in files.items():
        save_file(own, folder / name, metadata={"format": "pt"})
