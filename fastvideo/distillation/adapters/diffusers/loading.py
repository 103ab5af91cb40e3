"""Components of diffusers pipeline folders, with errors that a person can act on."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from fastvideo.distillation.types import UserError

EMBEDDED = {"tiny": "tiny/weights/pipeline", "tiny_cogvideox": "tiny/weights/cogvideox"}
"""Pipelines that ship inside the package, by the name that stands for their path."""


EXPECTED = (
    "a diffusers pipeline folder, a hub id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers' "
    f"or one of {sorted(EMBEDDED)} is expected"
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_pipeline(path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The local folder behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    A path that does not exist and looks like a hub id (``owner/name``) is fetched, or found in the hub's local cache.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    if path in EMBEDDED:
        path = str(files("fastvideo").joinpath(EMBEDDED[path]))
    folder = Path(path)
    if not folder.exists() and HUB_ID.fullmatch(path):
        folder = _from_hub(path)
    index = folder / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise UserError(f"model folder {path!r} {what}: {EXPECTED}")
    content = json.loads(index.read_text())
    if content.get("_class_name") not in pipeline_classes:
        raise UserError(
            f"model folder {path!r} holds a {content.get('_class_name')}; "
            f"this family reads {' or '.join(pipeline_classes)}"
        )
    if (content.get("transformer_2") or [None])[0] is not None:
        raise UserError(f"model {path!r} has two transformers (Wan 2.2): this family runs pipelines with one")
    return str(folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        why = f"{first_line(error)}; {EXPECTED}"
        raise UserError(f"model {name!r} is neither a local folder nor a model on the Hub: {why}") from error


def library_class(library: str, name: str) -> Any:
    """A class of a library that takes seconds to import, so only when it is needed."""
    return getattr(import_module(library), name)


def load_config(cls: type[Any], source: str, subfolder: str) -> dict[str, Any]:
    """The config of one component, as in its file.

    Raises:
        UserError: if the component is not there or cannot be read.
    """
    try:
        return dict(cls.load_config(source, subfolder=subfolder))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {subfolder!r} in {source!r}: {first_line(error)}") from error


def full_config(cls: type[Any], source: str, subfolder: str) -> dict[str, Any]:
    """The config of one component, with diffusers' defaults for what an older checkpoint's file does not say.

    Raises:
        UserError: if the component is not there or cannot be read.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **load_config(cls, source, subfolder)}


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
        raise UserError(f"cannot load {subfolder!r} ({cls.__name__}) from {source!r}: {first_line(error)}") from error
    finally:
        transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """First line of a library's message."""
    return str(error).strip().splitlines()[0]


def component_hash(config: Mapping[str, Any], module: nn.Module) -> str:
    """SHA-256 of a component's config (but for entries about its file) and weights."""
    kept = {key: value for key, value in config.items() if key[0] != "_"}  # no path, no version
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
