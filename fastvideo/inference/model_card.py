"""The model card of an exported student: summary, code to load it, ladder, figures, versions, licence."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastvideo.data.model import pipeline_class
from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.adapters.diffusers.sources import HUB_ID
from fastvideo.distillation.adapters.export.base import Exporter, StockSampler
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.sample import SamplerSpec, guidance_text
from fastvideo.evaluation.report_run import METRICS, mismatch, read_object, trained
from fastvideo.inference.export_source import ExportSource
from fastvideo.inference.licences import (
    OTHER_MODELS,
    PACKAGE_LICENSE,
    licence_lines,
    public_name,
    read_front_matter,
    shared_licence,
)
from fastvideo.inference.loading import LoadedModel
from fastvideo.inference.recipe import reach_text
from fastvideo.wording import counted

PROMPTS = dict.fromkeys(EMBEDDED, "a green seven moving up and left")
PROMPT = "A cat walks on the grass, realistic style."
SAMPLERS = {
    "renoise": "re-noising (after each call the clean estimate is noised again, with fresh noise, to the next time)",
    "euler": "Euler (deterministic steps along the velocity)",
    "flow_map": "flow map (deterministic jumps along the mean velocity of each step)",
}
SAVED_VIDEO = (
    ").frames[0]",
    'video[0].save("video.gif", save_all=True, append_images=video[1:], duration=125, loop=0)',
)
SAVED_IMAGE = (").images[0]", 'image.save("image.png")')
"""Ends of the code that calls a pipeline."""
UNKNOWN_LICENSE = {"license": "other", "license_name": "same-as-base-model"}


@dataclass(frozen=True)
class CardFacts:
    """Contents of a card.

    ``name``: of the folder; ``recipe``: of the export; ``stock``: the exported scheduler, ``None`` if the base model's
    was kept.
    """

    name: str
    source: ExportSource
    model: LoadedModel
    recipe: Mapping[str, Any]
    spec: SamplerSpec
    stock: StockSampler | None
    dtype: str | None
    warnings: Sequence[str]

    @property
    def image(self) -> bool:
        """True for image-to-video."""
        return of_frames(self.model.adapter.conditioner).needs_frames

    @cached_property
    def exporter(self) -> Exporter:
        """Conventions of the diffusers pipeline."""
        return load_exporter(self.model.adapter.config)

    @property
    def pipeline(self) -> str:
        """Diffusers class to sample with; an index may name the text-to-video one."""
        name = pipeline_class(self.model.source)
        return name.replace("Pipeline", "ImageToVideoPipeline") if self.image and "ImageToVideo" not in name else name

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The run's config; empty without a run."""
        return self.source.config

    @cached_property
    def base_card(self) -> Mapping[str, Any]:
        """Front matter of the base model's README."""
        return read_front_matter(Path(self.model.source))

    def run_file(self, name: str) -> dict[str, Any]:
        """JSON object in a file of the run; empty without one."""
        return read_object(self.source.run / name) if self.source.run else {}

    @property
    def base(self) -> str:
        """The base model's public name: a local path without its folders."""
        return public_name(str(self.recipe.get("model", {}).get("path", "unknown")))

    @property
    def base_license(self) -> dict[str, Any]:
        """Licence keys of the base model's card: a student is derived from its weights."""
        found = {key: value for key, value in self.base_card.items() if key.startswith("license")}
        return found or (PACKAGE_LICENSE if self.base in EMBEDDED else UNKNOWN_LICENSE)

    @property
    def license(self) -> dict[str, Any]:
        """Licence keys of the card, for the base model and those beside it."""
        return shared_licence([self.base_license, *self.recipe.get(OTHER_MODELS, [])])


def model_card(facts: CardFacts, use: Sequence[str] = ()) -> str:
    """Text of ``README.md`` with the hub's front matter; ``use`` are the lines for another program than diffusers."""
    lines = use or (_stream_usage(facts) if facts.spec.reach else _usage(facts))
    usage = "\n".join(["## Use", "", *lines, ""])
    parts = [_front_matter(facts), _head(facts), usage, _ladder(facts), _recipe(facts)]
    parts += [_figures(facts), _versions(facts), _license(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    method, family = facts.recipe.get("method"), facts.recipe.get("distill_model")
    task = "text-to-image" if facts.exporter.makes_images else "image-to-video" if facts.image else "text-to-video"
    library = "fastvideo" if facts.spec.reach else "diffusers"
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": task, **facts.license}
    base = facts.base if HUB_ID.fullmatch(facts.base) else facts.base_card.get("base_model")
    if base:
        values["base_model"] = base
    kind = ("distillation", "few-step") if facts.stock is not None or facts.spec.reach else ()
    values["tags"] = [*kind, *(str(name).rpartition(":")[2] for name in (family, method) if name)]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _head(facts: CardFacts) -> str:
    recipe, count = facts.recipe, len(facts.spec.times)
    first = _streams(facts) if facts.spec.reach else f"{facts.pipeline} that samples in {counted(count, 'step')}."
    text = f"# {facts.name}\n\n{first}"
    if "method" in recipe:
        made = f"Made from `{facts.base}` by `{recipe['method']}` with FastVideo Distillation"
        text += f" {made}: {trained(recipe)}."
    return text + "".join(f"\n\n> **Warning:** {warning}" for warning in facts.warnings)


def _streams(facts: CardFacts) -> str:
    """First line of the card of a student that streams."""
    assert facts.spec.reach is not None
    calls = counted(len(facts.spec.times), "call")
    return (
        f"**Stock `{facts.pipeline}` is not its sampler**: it loads this folder without a word and samples all frames "
        f"at once, which this network was not trained for. It streams {reach_text(facts.spec.reach)}, each in {calls} "
        f"and one more that remembers it."
    )


def call_options(facts: CardFacts) -> dict[str, Any]:
    """Arguments of the pipeline's call, beside the prompt."""
    model, sigmas = facts.recipe.get("model", {}), () if facts.stock is None else facts.stock.sigmas
    options = facts.exporter.call_arguments(len(facts.spec.times), facts.spec.guidance, sigmas)
    return options | {name: model[name] for name in facts.exporter.call_options if name in model}


def _prompt(facts: CardFacts) -> str:
    """A prompt of the run as a string of Python."""
    prompts = facts.config.get("validation", {}).get("prompts") or [PROMPTS.get(facts.base, PROMPT)]
    return json.dumps(prompts[0], ensure_ascii=False)


def _stream_usage(facts: CardFacts) -> list[str]:
    """Lines that stream with this package."""
    frames = facts.recipe.get("model", {}).get("num_frames", 81)
    lines = [
        "from fastvideo.inference.streaming import Streamer",
        "",
        f"streamer = Streamer.load({json.dumps(facts.name)}, seed=0)",
        f"with streamer.open({_prompt(facts)}) as stream:",
        "    for index, frames in zip(range(40), stream):  # uint8 [n, height, width, 3]; it has no end",
        "        print(index, frames.shape)",
    ]
    name = shlex.quote(facts.name)
    command = f"fastvideo generate {name} --prompt {_prompt(facts)} --frames {frames} --out video.mp4"
    return ["```bash", command, "```", "", "```python", *lines, "```"]


def _usage(facts: CardFacts) -> list[str]:
    dtype, stills = f", torch_dtype=torch.{facts.dtype}" if facts.dtype else "", facts.exporter.makes_images
    lines = [
        "import torch",
        f"from diffusers import {facts.pipeline}",
        *(["from diffusers.utils import load_image"] if facts.image else []),
        "",
        f"pipe = {facts.pipeline}.from_pretrained({json.dumps(facts.name)}{dtype})",
        "torch.manual_seed(0)",
        "image = pipe(" if stills else "video = pipe(",
        *(['    image=load_image("first_frame.png"),'] if facts.image else []),
        f"    prompt={_prompt(facts)},",
        *(f"    {name}={value!r}," for name, value in call_options(facts).items()),
        '    output_type="pil",',
        *(SAVED_IMAGE if stills else SAVED_VIDEO),
    ]
    return ["```python", *lines, "```", "", *_notes(facts)]


def _notes(facts: CardFacts) -> list[str]:
    """Effects of other arguments."""
    steps, model = len(facts.spec.times), facts.recipe.get("model", {})
    notes = [
        "* `torch.manual_seed` repeats a video; a pipeline's `generator` need not reach the noise between two calls."
    ]
    if facts.stock is not None:
        notes.append(f"* The scheduler is made for `num_inference_steps={steps}`, which the student was trained for.")
    if facts.stock is not None and facts.stock.sigmas:
        notes.append("* `sigmas` are the noise levels of the student's steps: without them the pipeline takes others.")
    if facts.stock is not None and facts.stock.scheduler.config.get("shift_terminal") is not None:
        notes.append(
            "* One call alone needs another scheduler (this one divides by zero): `pipe.scheduler = "
            "type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None)`."
        )
    if "max_sequence_length" in model and "max_sequence_length" in facts.exporter.call_options:
        length = model["max_sequence_length"]
        notes.append(
            f"* Prompts were padded to {length} tokens in training; another `max_sequence_length` changes the video."
        )
    return notes


def _ladder(facts: CardFacts) -> str:
    title = f"## Sampler\n\n{SAMPLERS[facts.spec.kind]}, guidance {guidance_text(facts.spec.guidance)} (1 = none)."
    if facts.spec.reach:
        times = ", ".join(f"{time:.6f}" for time in facts.spec.times)
        return f"{title} Noise levels of every chunk: {times}."
    if facts.stock is None:
        return f"{title} The scheduler is the base model's own."
    rows = enumerate(zip(facts.spec.times, facts.stock.times, strict=True))
    table = [f"| {i} | {own:.6f} | {stock:.6f} |" for i, (own, stock) in rows]
    head = [
        f"| call | share of noise in our sampler | in stock `{type(facts.stock.scheduler).__name__}` |",
        "|---|---|---|",
    ]
    return "\n".join([title, "", *head, *table])


def _recipe(facts: CardFacts) -> str:
    sections = {key: facts.config[key] for key in ("method", "ladder", "trainer", "ema") if key in facts.config}
    if not sections:
        return ""
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(sections, sort_keys=False, default_flow_style=None)}```"


def _figures(facts: CardFacts) -> str:
    """Table with a column per measured model and a line per shared number; only a sentence if they are of others."""
    metrics, folder = facts.run_file(METRICS), facts.source.folder
    note = mismatch(metrics, facts.recipe, folder.name if folder else "student")
    if note and "students" in metrics:
        return f"## Figures\n\n{note}"
    models = {name: row for name, row in metrics.items() if isinstance(row, Mapping) and "network_calls" in row}
    if not models:
        return ""
    first = next(iter(models.values()))
    names = [name for name in first if all(isinstance(row.get(name), int | float) for row in models.values())]
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[name]:.4g}' for row in models.values())} |" for name in names]
    return "\n".join(["## Figures", "", *([note, ""] if note else []), *lines])


def _versions(facts: CardFacts) -> str:
    trained = ", ".join(f"{name} {version}" for name, version in facts.run_file("environment.json").items())
    with_ = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "torch", "transformers"))
    return "## Versions\n\n" + (f"* trained with: {trained}\n" if trained else "") + f"* exported with: {with_}"


def _license(facts: CardFacts) -> str:
    text = "The student is derived from the base model's weights, so the base model's licence applies to it"
    others = "\n".join(licence_lines(facts.recipe))
    if facts.base_license == UNKNOWN_LICENSE:
        return f"## Licence\n\n{text}. Its folder does not say which; look it up before you publish this one.{others}"
    named = ", ".join(map(str, facts.base_license.values()))
    return f"## Licence\n\n{text}: {named}. The training data may add terms of its own.{others}"
