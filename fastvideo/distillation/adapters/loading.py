"""Reading diffusers pipeline folders, with errors that a person can act on."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastvideo.distillation.types import UserError

EMBEDDED = {"tiny": "tiny/weights/pipeline"}
"""Pipelines that ship inside the package, by the name that stands for their path."""


def resolve_pipeline(path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The folder (or hub id) behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    A path that exists, or that cannot be a hub id (``owner/name``), is read locally.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    if path in EMBEDDED:
        path = str(files("fastvideo").joinpath(EMBEDDED[path]))
    folder = Path(path)
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~", "outputs/")):
        return path
    index = folder / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"model folder {path!r} {what}: a diffusers pipeline folder, a hub id such as "
            f"'Wan-AI/Wan2.1-T2V-1.3B-Diffusers' or one of {sorted(EMBEDDED)} is expected"
        )
    found = json.loads(index.read_text()).get("_class_name")
    if found not in pipeline_classes:
        raise UserError(f"model folder {path!r} holds a {found}; this family reads {' or '.join(pipeline_classes)}")
    return str(folder)


def load_component(cls: type[Any], source: str, subfolder: str, **options: Any) -> Any:
    """``cls.from_pretrained(source, subfolder=...)``.

    Raises:
        UserError: if the component is not there or cannot be read.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return cls.from_pretrained(source, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {subfolder!r} ({cls.__name__}) from {source!r}: {reason}") from error
    finally:
        transformers_logging.enable_progress_bar()
