"""Export of a student as a model folder that stock diffusers samples alike."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.export.base import StockSampler, deviation
from fastvideo.distillation.experts import by_expert, side_file
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.stream_recipe import streaming_of
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing_folder
from fastvideo.inference.export_lora import LORA_FORMATS, write_adapter
from fastvideo.inference.export_source import ExportSource, find_source, load_source, source_recipe
from fastvideo.inference.export_streaming import STREAMING_FORMATS, write_streaming
from fastvideo.inference.exported import CLOSE, MARK, Export, edit_json, in_precision, ladder_text, without_path
from fastvideo.inference.loading import RECIPE, LoadedModel
from fastvideo.inference.model_card import CardFacts, call_options, model_card
from fastvideo.inference.recipe import Weights, reach_text
from fastvideo.wording import did_you_mean

FORMATS = ("diffusers", "comfy", *STREAMING_FORMATS, *LORA_FORMATS)
ONE_FILE = "diffusion_model.safetensors"


def run_export(
    source: str,
    out: Path,
    *,
    to: str = "diffusers",
    steps: int | None = None,
    weights: Weights | None = None,
    dtype: str | None = None,
    slim: bool = False,
    overwrite: bool = False,
) -> Export:
    """Find the weights, fit the scheduler, write the folder.

    Args:
        source: a run's folder, or a model folder.
        out: the new folder.
        to: one of :data:`FORMATS`.
        steps: steps of the scheduler; the whole ladder by default.
        weights: averaged or live; prefers the averaged ones by default.
        dtype: precision of the network's weights, such as ``bfloat16``; as trained by default.
        slim: link text encoder and VAE instead of storing them again.
        overwrite: replace an earlier export in ``out``.

    Raises:
        UserError: for an unknown format, an output folder in use or not writable, missing weights, or steps that the
            student was not trained for; writes nothing then.
    """
    _check_format(to)
    if slim and to in LORA_FORMATS:
        raise UserError(f"--slim: {to} holds the adapter alone already")
    found = find_source(source, weights)
    folder = Path(os.path.abspath(out))
    check_new_folder(folder, found.folder, overwrite, MARK, "export")
    _check_whole_videos(to, found)
    if to in LORA_FORMATS:
        return Export(folder, write_adapter(found, folder, to, MARK), ())
    model = load_source(found)
    if to == "comfy":
        return Export(folder, write_one_file(model, folder, dtype, steps), ())
    _check_apart(folder, Path(model.source))
    if to in STREAMING_FORMATS:
        return write_streaming(to, found, model, folder, steps=steps, dtype=dtype, slim=slim)
    spec = model.sampler(steps)
    stock = _fitted(model, spec, steps)
    warnings = (*_stock_warnings(spec, stock), *_image_warnings(model))
    facts = CardFacts(folder.name, found, model, _recipe(model, spec, stock), spec, stock, dtype, warnings)
    _write(folder, model, facts, slim=slim)
    return Export(folder, _summary(out, found, facts), (*warnings, *_slim_warnings(folder, model, slim)))


def _check_whole_videos(to: str, source: ExportSource) -> None:
    """Refuse a streaming student to programs that sample all frames at once."""
    if to in ("diffusers", "lora-peft", *STREAMING_FORMATS) or not streaming_of(source_recipe(source)):
        return
    raise UserError(
        f"--to {to}: this student streams chunk by chunk, and what reads that format samples all frames at once; "
        f"--to {' or '.join(STREAMING_FORMATS)} is for programs that stream"
    )


def _fitted(model: LoadedModel, spec: SamplerSpec, steps: int | None) -> StockSampler | None:
    """The stock scheduler of a model; ``None`` keeps the base model's own.

    A teacher has no ladder: it keeps its own unless the caller asks for steps. No stock scheduler tells a flow map
    where its step ends, and none streams.
    """
    if not (model.is_student or steps is not None) or spec.kind == "flow_map" or spec.reach:
        return None
    return load_exporter(model.adapter.config).stock_sampler(spec.times, spec.kind)


def write_one_file(model: LoadedModel, out: Path, dtype: str | None, steps: int | None) -> str:
    """Write the network alone, in one file under the authors' names, as ComfyUI and LightX2V load it.

    Raises:
        UserError: for a flow map, whose head other programs do not know, and a family without the authors' names.
    """
    spec, exporter = model.sampler(steps), load_exporter(model.adapter.config)
    if spec.kind == "flow_map":
        raise UserError("--to comfy: this student is a flow map, whose second time only `fastvideo generate` passes on")
    if "comfy" not in exporter.lora_layouts:
        raise UserError(
            f"--to comfy: {type(model.network).__name__} is not written under its authors' names: --to diffusers"
        )
    network = in_precision(model.network, dtype)
    sampling = {"sigmas": json.dumps([*spec.times, 0.0]), "sampler": spec.kind, "guidance": str(spec.guidance)}
    recipe = {**model.recipe, MARK: "comfy"}
    with replacing_folder(out) as partial:
        for side, state in by_expert(network.state_dict()).items():
            tensors = {exporter.original_name(name): value.contiguous() for name, value in state.items()}
            header = {"format": "pt", "steps": str(len(spec.times)), **sampling}
            save_file(tensors, partial / side_file(side, ONE_FILE), metadata=header)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    files = " and ".join(str(out / side_file(side, ONE_FILE)) for side in by_expert(network.state_dict()))
    return f"{files}: {len(network.state_dict())} tensors under the authors' names; sigmas {ladder_text(spec.times)} 0"


def _check_format(name: str) -> None:
    if name not in FORMATS:
        hint = did_you_mean(name.lower(), FORMATS)
        raise UserError(f"--to {name!r}: unknown format, one of {', '.join(FORMATS)} is expected{hint}")


def check_new_folder(out: Path, source: Path | None, overwrite: bool, mark: str, noun: str) -> None:
    """Check that a folder can be written: new, empty, or an earlier result with ``mark`` in its recipe.

    Args:
        source: folder that is read, which must be apart.
        noun: name of such a result, for the message.

    Raises:
        UserError: if it cannot.
    """
    if out.is_file():
        raise UserError(f"--out {out} is a file; a new folder is expected")
    if source:
        _check_apart(out, source)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"output folder {out} is in use: choose another with --out, or replace it: --overwrite")
    if not _is_marked(out, mark):
        raise UserError(f"--overwrite: {out} is no earlier {noun}; delete it yourself")


def _check_apart(out: Path, folder: Path) -> None:
    read = folder.resolve()
    if out.is_relative_to(read) or read.is_relative_to(out):
        raise UserError(f"--out {out}: it and the source folder ({folder}) must not contain each other")


def _is_marked(folder: Path, mark: str) -> bool:
    recipe = folder / RECIPE
    return recipe.is_file() and f'"{mark}"' in recipe.read_text(encoding="utf-8")


def _ladder_warnings(spec: SamplerSpec, stock: StockSampler | None) -> tuple[str, ...]:
    if stock is None or deviation(stock.times, spec.times) <= CLOSE:
        return ()
    return (
        f"no stock scheduler yields this ladder. Trained: {ladder_text(spec.times)}; stock diffusers uses "
        f"{ladder_text(stock.times)} instead (largest difference {deviation(stock.times, spec.times):.4f}), so its "
        f"videos differ from those of `fastvideo generate`. To train on what it yields: ladder.times "
        f"{[round(time, 7) for time in stock.times]}",
    )


def _stock_warnings(spec: SamplerSpec, stock: StockSampler | None) -> tuple[str, ...]:
    if spec.reach:
        return (
            "this student streams chunk by chunk: stock diffusers loads it, and samples all frames at once, which it "
            "was not trained for. Sample it with `fastvideo generate`",
        )
    return (*_ladder_warnings(spec, stock), *_flow_map_warnings(spec))


def _flow_map_warnings(spec: SamplerSpec) -> tuple[str, ...]:
    if spec.kind != "flow_map":
        return ()
    return (
        "this student is a flow map: a head in the folder tells its network where a step ends, and stock diffusers "
        "ignores it (it then samples like an undistilled model). Sample it with `fastvideo generate`",
    )


def _image_warnings(model: LoadedModel) -> tuple[str, ...]:
    counts = of_frames(model.adapter.conditioner).first_frames
    if not of_frames(model.adapter.conditioner).needs_frames or 1 in counts:
        return ()
    wanted = " or ".join(map(str, counts))
    return (
        f"this student takes {wanted} conditioning frames, and stock diffusers gives one image: it cannot sample it",
    )


def _recipe(model: LoadedModel, spec: SamplerSpec, stock: StockSampler | None) -> dict[str, Any]:
    recipe = {**model.recipe, "guidance": spec.guidance, "sampler": spec.kind, MARK: "diffusers"}
    # The ladder is as long as the scheduler's.
    if stock is None:
        return recipe
    call = load_exporter(model.adapter.config).call_arguments(len(spec.times), spec.guidance, stock.sigmas)
    return recipe | {"ladder": list(spec.times), "stock_call": call}


def _slim_warnings(folder: Path, model: LoadedModel, slim: bool) -> tuple[str, ...]:
    if not slim:
        return ()
    return (
        f"{folder} links to text encoder and VAE in {Path(model.source).resolve()}: it is whole on this machine "
        f"alone. To move it: cp -rL or rsync -aL, which follow the links",
    )


def _write(out: Path, model: LoadedModel, facts: CardFacts, *, slim: bool) -> None:
    """Write the folder whole or not at all."""
    network = in_precision(model.network, facts.dtype)
    without_path(network)
    try:
        with replacing_folder(out) as partial:
            model.adapter.folder.save(partial, network, facts.recipe, slim=slim)
            parts = {} if facts.stock is None else {"scheduler": facts.stock.scheduler}
            for name, part in {**parts, **facts.exporter.stock_parts(facts.spec.guidance)}.items():
                _replace_part(partial, name, part)
            (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error


def _replace_part(folder: Path, name: str, part: Any) -> None:
    """A component without weights; a link, as in a slim folder, is taken away and not followed."""
    if (folder / name).is_symlink():
        (folder / name).unlink()
    shutil.rmtree(folder / name, ignore_errors=True)
    part.save_pretrained(folder / name)
    named = ["diffusers", type(part).__name__]
    edit_json(folder / "model_index.json", lambda components: components | {name: named})


def _summary(out: Path, source: ExportSource, facts: CardFacts) -> str:
    weights = f"{source.weights} weights of step {source.step}" if source.weights else "weights as they are"
    lines = [f"{out}: {facts.pipeline}, {weights}"]
    lines += [f"  our sampler      {ladder_text(facts.spec.times)}"] if facts.recipe.get("ladder") else []
    if facts.spec.reach is not None:
        return "\n".join(
            [
                *lines,
                f"  streams {reach_text(facts.spec.reach)}",
                f"  fastvideo generate {shlex.quote(str(out))} --prompt ...",
            ]
        )
    if facts.stock is not None:
        lines.append(f"  stock diffusers  {ladder_text(facts.stock.times)}  {type(facts.stock.scheduler).__name__}")
    lines.append(f"  pipe = {facts.pipeline}.from_pretrained({str(out)!r})")
    options = ", ".join(f"{name}={value!r}" for name, value in call_options(facts).items())
    return "\n".join([*lines, f"  pipe(prompt=prompt, {options})"])
