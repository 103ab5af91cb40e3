"""Export of a student's adapter alone, for programs that have the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.data.model import pipeline_class
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.adapters.diffusers.sources import HUB_ID, resolve_pipeline
from fastvideo.distillation.adapters.export.base import Exporter, StockSampler
from fastvideo.distillation.adapters.export.lora import LAYOUTS, PEFT_CONFIG
from fastvideo.distillation.engine.checkpoint.restore import role_weights
from fastvideo.distillation.engine.lora import ADAPTER_FILE, is_adapter, portable
from fastvideo.distillation.experts import SIDES, boundary_between, by_expert, side_file
from fastvideo.distillation.registry import families, load_adapter, load_exporter, load_method
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing_folder
from fastvideo.inference.export_source import PARTS, ExportSource, adapter_scaling, source_recipe
from fastvideo.inference.licences import OTHER_MODELS, licence_lines, licence_name, licence_of, read_front_matter
from fastvideo.inference.loading import RECIPE
from fastvideo.wording import counted

LORA_FORMATS = tuple(f"lora-{name}" for name in LAYOUTS)
Factors = dict[str, tuple[Tensor, Tensor]]
"""``A`` and ``B`` of each layer, under diffusers' names."""


@dataclass(frozen=True)
class AdapterFacts:
    """Everything that the files beside an adapter say of it.

    ``experts``: factors of each expert by its side, see :func:`by_expert`.
    """

    source: ExportSource
    layout: str
    experts: Mapping[str, Factors]
    name: str

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The run's config."""
        return self.source.config

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the student."""
        return source_recipe(self.source)

    @cached_property
    def base_path(self) -> str:
        """Base model, as the run names it."""
        return str(self.config["roles"]["student"].get("path") or self.config["model"]["path"])

    @cached_property
    def base(self) -> str:
        """Public name of the base model; a local folder's is what its card names, else its own without the path."""
        if self.base_path in EMBEDDED or HUB_ID.fullmatch(self.base_path):
            return self.base_path
        named = read_front_matter(Path(self.base_path)).get("base_model")
        return named if isinstance(named, str) else Path(self.base_path).name

    @property
    def times(self) -> Sequence[float]:
        """The student's ladder."""
        return self.config["ladder"]["times"]  # type: ignore[no-any-return]

    @property
    def kind(self) -> str:
        """The student's sampler."""
        return load_method(self.config["distill_method"]).sampler

    @property
    def rank(self) -> int:
        return max(down.shape[0] for factors in self.experts.values() for down, _ in factors.values())

    @property
    def files(self) -> dict[str, str]:
        """File of each side."""
        return {side: side_file(side, LAYOUTS[self.layout].file) for side in self.experts}

    @cached_property
    def boundary(self) -> float | None:
        """Time between two experts, half-way between the steps beside it; ``None`` for one network."""
        if "" in self.experts:
            return None
        options = self.source.run_config.model.model_copy(update={"path": self.base_path})
        boundary = of_folder(load_adapter(self.config["distill_model"])(options).folder).boundary()
        return None if boundary is None else boundary_between(tuple(self.times), boundary)

    @property
    def header(self) -> dict[str, str]:
        """Metadata of the safetensors files: what a player needs to sample as trained."""
        sampling: dict[str, Any] = {
            "steps": len(self.times),
            "sigmas": [*self.times, 0.0],
            "sampler": self.kind,
            "guidance": 1.0,
        }
        if self.boundary is not None:
            sampling["boundary_ratio"] = self.boundary
        named = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in sampling.items()}
        origin = {"base_model": self.base, "rank": str(self.rank), "method": self.config["distill_method"]}
        return {"format": "pt", **origin, **named, "license": self.licences}

    @property
    def licences(self) -> str:
        """Licence of the base model, and those of the models beside it by their names."""
        others = self.recipe.get(OTHER_MODELS, [])
        own = licence_name(licence_of(self.base_path))
        named = [f"{model['name']}: {licence_name(model)}" for model in others]
        return "; ".join([f"{self.base}: {own}", *named]) if others else own


def write_adapter(source: ExportSource, out: Path, layout: str, mark: str) -> str:
    """Write the adapter in a layout with its sampling recipe; returns a line for the terminal.

    The weights include ``alpha``, so that readers need not know it.

    Raises:
        UserError: if the student was trained whole, or the layout's program does not have the family.
    """
    facts = AdapterFacts(source, layout.removeprefix("lora-"), read_adapter(source), out.name)
    exporter = load_exporter(source.run_config.model)
    able = [name for name in exporter.lora_layouts if "" in facts.experts or name != "peft"]  # one network has one file
    if facts.layout not in able:
        programs = ", ".join(f"lora-{name}" for name in able)
        raise UserError(f"export: {layout}: {source.config['distill_model']} has the layouts {programs}")
    recipe = facts.recipe | {mark: layout}
    with replacing_folder(out) as partial:
        for side, file in facts.files.items():
            tensors = LAYOUTS[facts.layout].write(facts.experts[side], exporter.original_name, exporter.network_part)
            save_file(tensors, partial / file, metadata=facts.header)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        if facts.layout == "peft":
            (partial / PEFT_CONFIG).write_text(json.dumps(_peft_config(facts), indent=2) + "\n", encoding="utf-8")
        stock = _stock_sampler(facts)
        for name, part in _parts(exporter, stock).items():
            part.save_pretrained(partial / name)
        (partial / "README.md").write_text(_read_me(facts, stock), encoding="utf-8")
    layers = counted(sum(map(len, facts.experts.values())), "layer")
    files = " and ".join(str(out / file) for file in facts.files.values())
    return f"{files}: {layers} of rank {facts.rank}, over the base model {facts.base}; README.md loads both"


def _parts(exporter: Exporter, stock: StockSampler | None) -> dict[str, Any]:
    """Components of the stock pipeline that sample the student, by name."""
    scheduler = {} if stock is None else {"scheduler": stock.scheduler}
    return {**scheduler, **exporter.stock_parts(1.0)}


def _peft_config(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": facts.base,
        "r": facts.rank,
        "lora_alpha": facts.rank,  # alpha / rank is in the weights
        "target_modules": sorted(facts.experts[""]),
        "inference_mode": True,
    }


def _stock_sampler(facts: AdapterFacts) -> StockSampler | None:
    """The stock scheduler of the student's ladder; ``None`` for a flow map."""
    if facts.kind == "flow_map":
        return None
    config = facts.source.run_config
    return load_exporter(config.model).stock_sampler(config.ladder.times, facts.kind)


def _read_me(facts: AdapterFacts, stock: StockSampler | None) -> str:
    """README of the folder: how the program that reads this layout takes it."""
    steps = counted(len(facts.times), "step")
    head = f"# {facts.name}\n\nAn adapter (LoRA) over `{facts.base}`: with it that model samples in {steps}."
    usage = {"comfy": _comfy, "kohya": _comfy, "lightx2v": _lightx2v, "peft": _peft}.get(facts.layout)
    lines = usage(facts) if usage else _diffusers(facts, stock)
    licence = ["", f"Licence of the base model: {licence_name(licence_of(facts.base_path))}."]
    return "\n".join([head, "", *lines, *licence, *licence_lines(facts.recipe), ""])


def _diffusers(facts: AdapterFacts, stock: StockSampler | None) -> list[str]:
    """Lines that load the adapter into its stock pipeline."""
    model, exporter = facts.config["model"], load_exporter(facts.source.run_config.model)
    folder = facts.source.folder or resolve_pipeline(model["path"], tuple(families()))
    pipeline = pipeline_class(str(folder))
    imports, load = [f"from diffusers import {pipeline}"], f"pipe = {pipeline}.from_pretrained({facts.base!r})"
    if facts.base in EMBEDDED:  # no name that diffusers knows
        imports.append("from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline")
        load = f"pipe = {pipeline}.from_pretrained(resolve_pipeline({facts.base!r}, ({pipeline!r},)))"
    lines = [load]
    for side, file in facts.files.items():
        second = ", load_into_transformer_2=True" if side == SIDES["transformer_2"] else ""
        lines.append(f"pipe.{exporter.lora_loader}({facts.name!r}, weight_name={file!r}{second})")
    if facts.boundary is not None:
        lines.append(f"pipe.register_to_config(boundary_ratio={facts.boundary})")
    for name, part in _parts(exporter, stock).items():
        kind = type(part).__name__
        imports.insert(0, f"from diffusers import {kind}")
        lines.append(f"pipe.{name} = {kind}.from_pretrained({facts.name!r}, subfolder={name!r})")
    call = exporter.call_arguments(len(facts.times), 1.0, () if stock is None else stock.sigmas)
    call |= {key: model[key] for key in exporter.call_options if key in model}
    made, options = "image" if exporter.makes_images else "video", (f"{key}={value!r}" for key, value in call.items())
    lines.append(f"{made} = pipe(prompt=prompt, {', '.join(options)})")
    return ["```python", *imports, "", *lines, "```"]


def _peft(facts: AdapterFacts) -> list[str]:
    base = json.dumps(facts.base)
    lines = ["from peft import PeftModel", "", "network = ...  # the transformer of the pipeline of " + base]
    return ["```python", *lines, f"network = PeftModel.from_pretrained(network, {facts.name!r})", "```"]


def _comfy(facts: AdapterFacts) -> list[str]:
    sampler = "lcm" if facts.kind == "renoise" else "euler"
    sigmas = ", ".join(f"{time:g}" for time in (*facts.times, 0.0))
    over = {side: f" over the {side} model" if side else "" for side in facts.files}
    rows = {
        "LoRA": "; ".join(f"`{file}`{over[side]}, strength 1" for side, file in facts.files.items()),
        "steps": len(facts.times),
        "cfg": "1 (no negative prompt)",
        "sampler": sampler,
        "sigmas": f"{sigmas} (ManualSigmas)",
    }
    return ["| ComfyUI | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _lightx2v(facts: AdapterFacts) -> list[str]:
    config = {
        "infer_steps": len(facts.times),
        "denoising_step_list": [round(1000 * time) for time in facts.times],
        "sample_shift": 1,  # the times are the shifted ones already
        "sample_guide_scale": 1,
        "enable_cfg": False,
        "lora_configs": [
            {**({"name": f"{side}_model"} if side else {}), "path": file, "strength": 1.0}
            for side, file in facts.files.items()
        ],
    }
    if facts.boundary is not None:
        config["boundary_step_index"] = sum(time >= facts.boundary for time in facts.times)
    return ["In LightX2V's config:", "", "```json", json.dumps(config, indent=2), "```"]


def read_adapter(source: ExportSource) -> dict[str, Factors]:
    """The adapter, with ``alpha / rank`` in ``B``, or those of both experts by side.

    Raises:
        UserError: if the student was trained whole.
    """
    return {side: _factors(tensors) for side, tensors in _tensors(source).items()}


def _tensors(source: ExportSource) -> dict[str, dict[str, Tensor]]:
    """Tensors of :func:`portable`, by side."""
    if source.checkpoint is None:
        folder = source.folder or Path()
        found = {side: folder / side_file(side, ADAPTER_FILE) for side in ("", *SIDES.values())}
        if not any(file.is_file() for file in found.values()):
            raise UserError(f"export: {source.folder} has no adapter ({ADAPTER_FILE}): the student was trained whole")
        return {side: load_file(file) for side, file in found.items() if file.is_file()}
    state = role_weights(source.checkpoint, "student", PARTS[source.weights])  # type: ignore[index]
    if not is_adapter(state):
        raise UserError(f"export: {source.checkpoint} has no adapter: the student is trained whole")
    scaling = adapter_scaling(source)
    return {side: portable(own, scaling, "network") for side, own in by_expert(state).items()}


def _factors(tensors: Mapping[str, Tensor]) -> Factors:
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    layers = {name: name.partition(".")[2].removesuffix(".lora_A.weight") for name in downs}
    return {layer: (tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]) for name, layer in layers.items()}
