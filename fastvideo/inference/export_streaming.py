"""Export of a streaming student for programs that stream: FastVideo (and SGLang), and Self-Forcing's own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.export.base import StreamingClasses, deviation
from fastvideo.distillation.adapters.export.streaming import (
    PUBLISHED_SHIFT,
    PUBLISHED_STEPS,
    TEXT_LENGTH,
    WHOLE_PAST,
    WarpedSteps,
    fastvideo_network,
    fastvideo_scheduler,
    self_forcing_config,
    warped_steps,
)
from fastvideo.distillation.chunks import STREAMING, Reach
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing_folder
from fastvideo.inference.export_source import ExportSource
from fastvideo.inference.exported import CLOSE, MARK, Export, edit_json, in_precision, ladder_text, without_path
from fastvideo.inference.loading import RECIPE, LoadedModel
from fastvideo.inference.model_card import CardFacts, model_card
from fastvideo.inference.recipe import reach_text

STREAMING_FORMATS = ("fastvideo", "self-forcing")
MOST_FRAMES, MOST_CALLS = 3, 4
"""Latent frames of a chunk, and calls for each, up to which FastVideo's causal pipeline is made."""
GENERATOR, CONFIG = "generator.pt", "config.yaml"
"""Files of an export for Self-Forcing's code: the network, and the config of its ``inference.py``."""
PUBLISHED_SIZE, PUBLISHED_BLOCKS = (480, 832), 30
"""Height and width, and blocks of the network, that are constants of Self-Forcing's ``inference.py``."""


@dataclass(frozen=True)
class Streamed:
    """A streaming student with everything that other programs ask of it."""

    to: str
    source: ExportSource
    model: LoadedModel
    spec: SamplerSpec
    reach: Reach
    classes: StreamingClasses

    @cached_property
    def steps(self) -> WarpedSteps:
        return warped_steps(self.spec.times)

    @property
    def frames(self) -> int:
        """Latent frames of its videos in training."""
        return int(self.model.adapter.codec.latent_shape[1])

    @property
    def options(self) -> dict[str, Any]:
        """The family's options in the recipe: sizes, lengths, the base model."""
        return dict(self.model.recipe.get("model", {}))

    @property
    def recipe(self) -> dict[str, Any]:
        return {**self.model.recipe, "ladder": list(self.spec.times), MARK: self.to}


def write_streaming(
    to: str, source: ExportSource, model: LoadedModel, out: Path, *, steps: int | None, dtype: str | None, slim: bool
) -> Export:
    """Write a streaming student as FastVideo or Self-Forcing's code loads it.

    Args:
        to: one of :data:`STREAMING_FORMATS`.
        source, model: the weights.
        out: the new folder.
        steps, dtype, slim: as for ``run_export``.

    Raises:
        UserError: for a student that does not stream, or that the program cannot sample; nothing is written then.
    """
    spec = model.sampler(steps)
    student = Streamed(to, source, model, spec, _reach(to, model, spec), _classes(to, model))
    _check_sampler(student)
    if to == "fastvideo":
        _check_fastvideo(student)
    elif slim:
        raise UserError(f"--slim: {to} holds the network alone already")
    warnings = tuple(_warnings(student))
    write = _write_fastvideo if to == "fastvideo" else _write_self_forcing
    with replacing_folder(out) as partial:
        summary = write(student, out.name, partial, dtype, slim, warnings)
    return Export(out, f"{out}: {summary}", warnings)


def _reach(to: str, model: LoadedModel, spec: SamplerSpec) -> Reach:
    if spec.reach is None:
        raise UserError(
            f"--to {to}: {model.source} is no streaming student ({RECIPE} has no `{STREAMING}`): --to diffusers "
            f"exports students of whole videos"
        )
    return spec.reach


def _classes(to: str, model: LoadedModel) -> StreamingClasses:
    classes = load_exporter(model.adapter.config).streaming
    if classes is None:
        raise UserError(f"--to {to}: no program but this one streams {type(model.adapter).__name__}'s networks")
    return classes


def _check_sampler(student: Streamed) -> None:
    kind, to, model = student.spec.kind, student.to, student.model
    if not model.is_student:
        raise UserError(f"--to {to}: {model.source} has no ladder: few-step students alone are sampled there")
    if kind != "renoise":
        raise UserError(f"--to {to}: sampler {kind!r} has no counterpart there: it re-noises between two calls")
    if of_frames(model.adapter.conditioner).needs_frames:
        raise UserError(f"--to {to}: this student goes on from frames; text-to-video alone is exported")
    if first := model.recipe[STREAMING].get("first_ladder"):
        raise UserError(
            f"--to {to}: the first chunk has a ladder of its own ({ladder_text(first)}), "
            f"and that program takes one for all chunks"
        )


def _check_fastvideo(student: Streamed) -> None:
    chunk, calls = student.reach.chunk, len(student.spec.times)
    if chunk > MOST_FRAMES:
        raise UserError(f"--to fastvideo: chunks of {chunk} latent frames; FastVideo takes {MOST_FRAMES} at most")
    if calls > MOST_CALLS:
        raise UserError(
            f"--to fastvideo: {calls} calls for each chunk; its causal pipeline is made for {MOST_CALLS} at most"
        )


def _warnings(student: Streamed) -> Iterator[str]:
    """Differences between the program's videos and those of ``fastvideo generate``."""
    yield from _shared_warnings(student)
    yield from _fastvideo_warnings(student) if student.to == "fastvideo" else _self_forcing_warnings(student)


def _shared_warnings(student: Streamed) -> Iterator[str]:
    off, reach, length = deviation(student.steps.times, student.spec.times), student.reach, student.options
    if off > CLOSE:
        yield f"its noise levels are whole steps of 1000, up to {off:.4f} from this ladder"
    if student.frames % reach.chunk:
        yield (
            f"chunks of {reach.chunk} do not divide the {student.frames} latent frames of the training: our first "
            f"chunk takes the remainder, that program takes whole chunks alone"
        )
    if length.get("max_sequence_length", TEXT_LENGTH) != TEXT_LENGTH:
        yield (
            f"prompts were padded to {length['max_sequence_length']} tokens in training, and that program pads them to "
            f"{TEXT_LENGTH}: its videos differ"
        )


def _fastvideo_warnings(student: Streamed) -> Iterator[str]:
    if student.spec.context_time:
        yield f"finished chunks carry noise {student.spec.context_time:g} in training; FastVideo keeps them clean"


def _self_forcing_warnings(student: Streamed) -> Iterator[str]:
    if noise := student.spec.context_time:
        yield (
            f"finished chunks carry noise {noise:g} in training; its inference.py tells the network that time, and "
            f"keeps the chunks clean"
        )
    reach, size = student.reach, (student.options.get("height"), student.options.get("width"))
    blocks = student.model.network.config.num_layers  # type: ignore[union-attr]
    if (*size, blocks) != (*PUBLISHED_SIZE, PUBLISHED_BLOCKS):
        yield (
            f"its inference.py is written for {PUBLISHED_SIZE[0]}x{PUBLISHED_SIZE[1]} and {PUBLISHED_BLOCKS} blocks "
            f"(here {size[0]}x{size[1]} and {blocks} blocks): change those constants in a copy of it"
        )
    if reach.window is None and student.frames > WHOLE_PAST:
        yield f"its cache ends at {WHOLE_PAST} latent frames, and this student was trained on {student.frames}"
    if reach.sink and reach.positions == "window":
        yield (
            "it numbers frames from the start of the video, and this student was trained with positions that move "
            "along with its window: videos longer than the window drift from ours. FastVideo can do both"
        )


def _write_fastvideo(
    student: Streamed, name: str, folder: Path, dtype: str | None, slim: bool, warnings: tuple[str, ...]
) -> str:
    classes = student.classes
    network = in_precision(student.model.network, dtype)
    without_path(network)
    student.model.adapter.folder.save(folder, network, student.recipe, slim=slim)
    (part,) = student.model.adapter.folder.parts
    fields = fastvideo_network(classes, student.reach, student.frames)
    edit_json(folder / part / "config.json", lambda config: config | fields)
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    (folder / "scheduler").mkdir()
    scheduler = json.dumps(fastvideo_scheduler(classes, student.steps.shift), indent=2) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler, encoding="utf-8")
    named = {part: ["diffusers", classes.network], "scheduler": ["diffusers", classes.scheduler]}
    edit_json(folder / "model_index.json", lambda index: index | {"_class_name": classes.pipeline} | named)
    _write_card(student, folder, name, dtype, warnings, _fastvideo_use(student, name))
    return f"{classes.pipeline}, {reach_text(student.reach)}; README.md has the lines for FastVideo and SGLang"


def _write_self_forcing(
    student: Streamed, name: str, folder: Path, dtype: str | None, slim: bool, warnings: tuple[str, ...]
) -> str:
    original = load_exporter(student.model.adapter.config).original_name
    state = in_precision(student.model.network, dtype).state_dict()
    key = "generator_ema" if student.source.weights == "ema" else "generator"
    tensors = {f"model.{original(name)}": value.contiguous() for name, value in state.items()}
    torch.save({key: tensors}, folder / GENERATOR)
    config = self_forcing_config(student.reach, student.frames, student.steps, student.spec.context_time)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / RECIPE).write_text(json.dumps(student.recipe, indent=2) + "\n", encoding="utf-8")
    _write_card(student, folder, name, dtype, warnings, _self_forcing_use(student, name, key))
    return f"{GENERATOR} with {len(tensors)} tensors under {key!r}, {reach_text(student.reach)}; {CONFIG} and README.md"


def _write_card(
    student: Streamed, folder: Path, name: str, dtype: str | None, warnings: tuple[str, ...], use: list[str]
) -> None:
    facts = CardFacts(name, student.source, student.model, student.recipe, student.spec, None, dtype, warnings)
    (folder / "README.md").write_text(model_card(facts, use), encoding="utf-8")


def _fastvideo_use(student: Streamed, name: str) -> list[str]:
    published = (student.steps.steps, student.steps.shift) == (PUBLISHED_STEPS, PUBLISHED_SHIFT)
    steps = "" if published else f", dmd_denoising_steps={list(student.steps.steps)}"
    size = "".join(
        f", {key}={student.options[key]}" for key in ("height", "width", "num_frames") if key in student.options
    )
    return [
        "FastVideo (github.com/hao-ai-lab/FastVideo) has the package name of FastVideo Distillation: install it in an "
        "environment of its own. SGLang reads the same folder.",
        "",
        "```text",
        "from fastvideo import VideoGenerator",
        "",
        f"generator = VideoGenerator.from_pretrained({json.dumps(name)}, num_gpus=1{steps})",
        f'generator.generate_video("a prompt", save_video=True, output_path="videos"{size})',
        "```",
    ]


def _self_forcing_use(student: Streamed, name: str, key: str) -> list[str]:
    flag = " --use_ema" if key == "generator_ema" else ""
    return [
        f"In a checkout of Self-Forcing (github.com/guandeh17/Self-Forcing), which keeps the base model's original "
        f"weights under `wan_models/`; LongLive, Causal-Forcing and others that read its files take `{key}` from "
        f"`{GENERATOR}` too.",
        "",
        "```text",
        f"python inference.py --config_path {name}/{CONFIG} --checkpoint_path {name}/{GENERATOR}{flag} \\",
        f"    --data_path prompts.txt --output_folder videos --num_output_frames {student.frames}",
        "```",
    ]
