"""Reading and writing diffusers pipeline folders, with errors that a person can act on."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.flow_map import HEAD_FILE, save_head, without_head
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
        raise UserError(
            f"model {name!r} does not exist as a folder and is not to be had from the hub: {why}"
        ) from error


def load_config(cls: type[Any], source: str, subfolder: str) -> dict[str, Any]:
    """The config of one component, as its file says.

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
    """The part of a library's message that says what happened."""
    return str(error).strip().splitlines()[0]


def read_recipe(source: str) -> Mapping[str, Any]:
    """``recipe.json`` of a pipeline folder; empty if it has none."""
    file = Path(source) / "recipe.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_pipeline(source: str, folder: Path, transformer: nn.Module, recipe: Mapping[str, Any]) -> None:
    """The pipeline ``source`` under ``folder`` with another transformer and another ``recipe.json``.

    A flow map's head is written beside the transformer and not into it, which stock diffusers goes on to load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for item in Path(source).iterdir():
        if item.name in ("transformer", "recipe.json", HEAD_FILE):
            continue
        if item.is_dir():
            shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
        else:
            shutil.copy2(item, folder / item.name)
    with without_head(transformer) as head:
        transformer.save_pretrained(folder / "transformer")  # type: ignore[operator]
    if head is not None:
        save_head(head, folder)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def component_hash(config: Mapping[str, Any], module: nn.Module) -> str:
    """SHA-256 of a component's config (but for entries about its file) and weights."""
    kept = {key: value for key, value in config.items() if key[0] != "_"}  # no path, no version
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PromptCache:
    """Embeddings of prompts, each encoded once and alone: a result does not depend on what else a batch holds.

    Args:
        encode: the embedding ``[L, D]`` of one prompt.
        size: how many are kept, least recently used first out.
    """

    def __init__(self, encode: Callable[[str], Tensor], size: int) -> None:
        self._encode, self._size = encode, size
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The distinct prompts that are not kept."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings ``[B, L, D]`` on the device."""
        for prompt in self.missing(prompts):
            self._kept[prompt] = self._encode(prompt).cpu()
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        embeds = torch.stack([self._kept[prompt] for prompt in prompts]).to(device)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return embeds
