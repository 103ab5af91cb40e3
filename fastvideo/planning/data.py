"""Data of a planned run: a plan of data that are not there would promise a run that cannot start."""

from __future__ import annotations

from pathlib import Path

from fastvideo.data.index import dataset_files, has_tars
from fastvideo.data.prompts import read_prompts
from fastvideo.distillation.config.schema import DataConfig
from fastvideo.errors import UserError
from fastvideo.storage import is_remote
from fastvideo.tiny.world import WORLDS


def check_there(data: DataConfig) -> None:
    """Check that prompts and datasets on this machine's disks exist; no bucket is asked.

    Raises:
        UserError: for a file or folder that does not, with the flag for a plan of another machine.
    """
    place = data.prompts or data.path
    if is_remote(place) or (data.prompts is None and data.path in WORLDS):
        return
    try:
        if data.prompts is not None:
            read_prompts(place)
        elif not (Path(place).exists() and has_tars(place)):
            dataset_files(place)
    except UserError as error:
        raise UserError(f"{error}. To plan for another machine, where they are: --elsewhere") from error
