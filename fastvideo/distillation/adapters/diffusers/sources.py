"""Model folders wherever they are: on this machine, on the Hub, or behind a URL (``s3://``)."""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from fastvideo.distillation.adapters.diffusers.attention import MODELS, without_warnings
from fastvideo.distillation.adapters.diffusers.pipeline import (
    EMBEDDED,
    EXPECTED,
    ConfigT,
    Pipeline,
    checked_pipeline,
    first_line,
    local_path,
)
from fastvideo.distillation.adapters.diffusers.single_file import OTHER_CONFIG, check_names, is_single_file
from fastvideo.distillation.types import UserError
from fastvideo.storage import is_remote, local_folder

INDEX = "model_index.json"
ADAPTER_HINT = "it holds a LoRA, which goes into a role's `loras` or `lora.init_from`, or into `fastvideo merge`"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class FetchedPipeline(Pipeline[ConfigT]):
    """A pipeline wherever it is; the folder behind a single file of weights is the run's own."""

    def resolve(self, path: str) -> str:
        return resolve_pipeline(path, self.config.pipelines)

    def resolved(self, path: str | None) -> str:
        return super().resolved(None if is_single_file(path) else path)

    def config_place(self, path: str | None, part: str) -> tuple[str, str]:
        """The one beside a single file, if it is of this network's class, or else the run's own."""
        if path is not None and is_single_file(path):
            beside = Path(path).with_name("config.json")
            if beside.is_file() and read_object(beside).get("_class_name") == self.spec.network:
                return str(beside.parent), ""
        return super().config_place(path, part)

    def component(self, cls: type[Any], source: str, subfolder: str, **options: Any) -> Any:
        """A component with its weights, refused if some are missing, or unknown to diffusers' class.

        Those of transformers' classes may have others beside them, such as the head of a CLIP encoder.
        """
        with without_warnings(MODELS):
            part, info = super().component(cls, source, subfolder, output_loading_info=True, **options)
        unknown = info["unexpected_keys"] if cls.__module__.startswith("diffusers.") else ()
        check_names(cls, info["missing_keys"], unknown, str(Path(source, subfolder)), OTHER_CONFIG)
        return part


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: if it cannot be read or holds anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: an object is expected, found {type(found).__name__}")
    return found


def resolve_pipeline(path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The local folder behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    A path that does not exist and looks like a hub id (``owner/name``) is fetched, or found in the hub's local cache. A
    folder at a URL (``s3://``) is fetched once per machine.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    folder = fetched(path)
    _check_links(folder)
    if folder.is_dir() and not (folder / INDEX).exists():
        if (folder / "student" / INDEX).exists():
            raise UserError(f"{path!r} is a run's folder: give {path.rstrip('/')}/student, the model that it made")
        if _holds_adapter(folder):
            raise UserError(f"model folder {path!r} has no {INDEX}: {EXPECTED}; {ADAPTER_HINT}")
    return checked_pipeline(folder, path, pipeline_classes)


def fetched(path: str) -> Path:
    """The folder behind a path, a name, a hub id or a URL; it may not exist."""
    if is_remote(path):
        return local_folder(path)
    if path not in EMBEDDED and not Path(path).exists() and HUB_ID.fullmatch(path):
        return _from_hub(path)
    return local_path(path)


def _check_links(folder: Path) -> None:
    """Refuse a slim folder whose links lead nowhere, as on another machine than that which made it."""
    for item in folder.iterdir() if folder.is_dir() else ():
        if item.is_symlink() and not item.exists():
            raise UserError(
                f"model folder {folder}: {item.name} is a link to {item.readlink()}, which is not there. The folder "
                f"was saved slim, without what training does not change: copy it with its links followed (`cp -rL`, "
                f"`rsync -aL`) from where it was made, or let {item.name} link to the same folder of its base model"
            )


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or any(folder.glob("*lora*.safetensors"))


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
