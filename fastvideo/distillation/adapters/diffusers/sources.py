"""Model folders wherever they are: on this machine, on the Hub, or behind a URL (``s3://``)."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

from fastvideo.distillation.adapters.diffusers.pipeline import (
    EMBEDDED,
    EXPECTED,
    ConfigT,
    Pipeline,
    checked_pipeline,
    first_line,
    local_pipeline,
)
from fastvideo.distillation.adapters.diffusers.single_file import is_single_file
from fastvideo.distillation.types import UserError
from fastvideo.storage import is_remote, local_folder

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class FetchedPipeline(Pipeline[ConfigT]):
    """A pipeline wherever it is; the folder behind a single file of weights is the run's own."""

    def resolve(self, path: str) -> str:
        return resolve_pipeline(path, self.config.pipelines)

    def resolved(self, path: str | None) -> str:
        return super().resolved(None if is_single_file(path) else path)


def resolve_pipeline(path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The local folder behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    A path that does not exist and looks like a hub id (``owner/name``) is fetched, or found in the hub's local cache. A
    folder at a URL (``s3://``) is fetched once per machine.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    if is_remote(path):
        return checked_pipeline(local_folder(path), path, pipeline_classes)
    if path not in EMBEDDED and not Path(path).exists() and HUB_ID.fullmatch(path):
        return checked_pipeline(_from_hub(path), path, pipeline_classes)
    return local_pipeline(path, pipeline_classes)


@cache
def _from_hub(name: str) -> Path:
    """Folder of a model on the Hub in its local cache; of a machine's processes one downloads, the others wait."""
    from huggingface_hub import snapshot_download

    try:
        with _one_download(name):
            return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        why = f"{first_line(error)}; {EXPECTED}"
        raise UserError(f"model {name!r} is neither a local folder nor a model on the Hub: {why}") from error


def _one_download(name: str) -> AbstractContextManager[object]:
    """Lock of a model in the Hub's cache; none in a cache that is read-only, into which nothing is downloaded."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    cache = Path(constants.HF_HUB_CACHE)
    if cache.exists() and not os.access(cache, os.W_OK):
        return nullcontext()
    locks = cache / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(locks / f"{name.replace('/', '--')}.lock")
