"""``fastvideo export --to lora-diffusers|lora-comfy``: a student's adapter alone, for programs that have the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.distillation.engine.checkpoint.restore import role_weights
from fastvideo.distillation.engine.lora import ADAPTER_FILE, DIFFUSERS_PREFIX, is_adapter, portable
from fastvideo.distillation.types import UserError
from fastvideo.inference.export_source import PARTS, Source, adapter_scaling, source_adapter
from fastvideo.inference.loading import RECIPE, load_recipe

LORA_FORMATS = ("lora-diffusers", "lora-comfy")
COMFY_FILE = "comfyui_lora.safetensors"


def write_adapter(source: Source, out: Path, layout: str, mark: str) -> str:
    """Write the adapter in a layout, with the recipe that samples from it; one line for the terminal.

    ``alpha`` is part of the weights, so a reader that knows none is right.

    Raises:
        UserError: if the student was trained whole, or the layout has no names for its layers.
    """
    tensors = read_adapter(source)
    config = source.config
    if layout == "lora-comfy":
        tensors, name = in_comfy(tensors, source_adapter(source).folder.comfy_layer), COMFY_FILE
    else:
        name = ADAPTER_FILE
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / name, metadata={"format": "pt"})
    recipe = (load_recipe(str(source.folder)) if source.folder else {}) | {mark: layout}
    (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
    if out.is_dir():
        shutil.rmtree(out)
    partial.rename(out)
    return f"{out / name}: {len(tensors) // 2} layers, for {config['roles']['student'].get('path') or 'the model'}"


def read_adapter(source: Source) -> dict[str, Tensor]:
    """The adapter in diffusers' layout.

    Raises:
        UserError: if there is none.
    """
    if source.checkpoint is None:
        file = (source.folder or Path()) / ADAPTER_FILE
        if not file.is_file():
            raise UserError(f"export: {source.folder} has no adapter ({ADAPTER_FILE}): the student was trained whole")
        return load_file(file)
    state = role_weights(source.checkpoint, "student", PARTS[source.weights])  # type: ignore[index]
    if not is_adapter(state):
        raise UserError(f"export: {source.checkpoint} has no adapter: the student is trained whole")
    return portable(state, adapter_scaling(source))


def in_comfy(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The adapter under ComfyUI's names, which ``rename`` gives for a layer.

    Raises:
        UserError: for a family, or a layer, that has none.
    """
    renamed = {}
    for name, tensor in tensors.items():
        layer, kind, weight = name.removeprefix(DIFFUSERS_PREFIX).rsplit(".", 2)
        renamed[f"{rename(layer)}.{kind}.{weight}"] = tensor
    return renamed
