"""Export of a student's adapter alone, for programs that have the base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.data.model import pipeline_class
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED, resolve_pipeline
from fastvideo.distillation.engine.checkpoint.restore import role_weights
from fastvideo.distillation.engine.lora import ADAPTER_FILE, DIFFUSERS_PREFIX, is_adapter, portable
from fastvideo.distillation.registry import families, load_exporter, load_method
from fastvideo.distillation.types import UserError
from fastvideo.errors import counted
from fastvideo.files import replacing_folder
from fastvideo.inference.export_source import PARTS, ExportSource, adapter_scaling
from fastvideo.inference.loading import RECIPE, load_recipe

LORA_FORMATS = ("lora-diffusers", "lora-comfy")
COMFY_FILE = "comfyui_lora.safetensors"


def write_adapter(source: ExportSource, out: Path, layout: str, mark: str) -> str:
    """Write the adapter in a layout with its sampling recipe; returns a line for the terminal.

    The weights include ``alpha``, so that readers need not know it.

    Raises:
        UserError: if the student was trained whole, or the layout has no names for its layers.
    """
    tensors = read_adapter(source)
    config = source.config
    if layout == "lora-comfy":
        tensors, name = in_comfy(tensors, load_exporter(source.run_config.model).comfy_layer), COMFY_FILE
    else:
        name = ADAPTER_FILE
    base = config["roles"]["student"].get("path") or config["model"]["path"]
    recipe = (load_recipe(str(source.folder)) if source.folder else {}) | {mark: layout}
    with replacing_folder(out) as partial:
        save_file(tensors, partial / name, metadata={"format": "pt"})
        (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        scheduler = _save_scheduler(source, partial)
        (partial / "README.md").write_text(_read_me(source, base, name, out.name, scheduler), encoding="utf-8")
    return f"{out / name}: {len(tensors) // 2} layers, over the base model {base}; README.md beside it loads both"


def _save_scheduler(source: ExportSource, folder: Path) -> str | None:
    """Write the stock scheduler of the student's ladder; returns its class name, ``None`` for a flow map."""
    config = source.run_config
    kind = load_method(config.distill_method).sampler
    if kind == "flow_map":
        return None
    scheduler = load_exporter(config.model).stock_sampler(config.ladder.times, kind).scheduler
    scheduler.save_pretrained(folder / "scheduler")
    return type(scheduler).__name__


def _read_me(source: ExportSource, base: str, file: str, name: str, scheduler: str | None) -> str:
    """README with the lines that load the adapter into its stock pipeline."""
    model = source.config["model"]
    folder = source.folder or resolve_pipeline(model["path"], tuple(families()))
    pipeline = pipeline_class(str(folder))
    imports, load = [f"from diffusers import {pipeline}"], f"pipe = {pipeline}.from_pretrained({base!r})"
    if base in EMBEDDED:  # no name that diffusers knows
        imports.append("from fastvideo.distillation.adapters.diffusers.pipeline import resolve_pipeline")
        load = f"pipe = {pipeline}.from_pretrained(resolve_pipeline({base!r}, ({pipeline!r},)))"
    lines = [load, f"pipe.load_lora_weights({name!r}, weight_name={file!r})"]
    if scheduler:
        imports.insert(0, f"from diffusers import {scheduler}")
        lines.append(f"pipe.scheduler = {scheduler}.from_pretrained({name!r}, subfolder='scheduler')")
    steps = len(source.config["ladder"]["times"])
    sizes = "".join(f", {key}={model[key]}" for key in ("height", "width", "num_frames") if key in model)
    lines.append(f"video = pipe(prompt, num_inference_steps={steps}, guidance_scale=1.0{sizes})")
    head = f"# {name}\n\nAn adapter (LoRA) over `{base}`: with it that model samples in {counted(steps, 'step')}."
    return "\n".join([head, "", "```python", *imports, "", *lines, "```", ""])


def read_adapter(source: ExportSource) -> dict[str, Tensor]:
    """The adapter in diffusers' layout.

    Raises:
        UserError: if the student was trained whole.
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
    """The adapter under ComfyUI's names; ``rename`` maps a layer.

    Raises:
        UserError: for a family or a layer without such names.
    """
    renamed = {}
    for name, tensor in tensors.items():
        layer, kind, weight = name.removeprefix(DIFFUSERS_PREFIX).rsplit(".", 2)
        renamed[f"{rename(layer)}.{kind}.{weight}"] = tensor
    return renamed
