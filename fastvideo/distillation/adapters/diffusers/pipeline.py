"""``Pipeline``: a diffusers pipeline folder with a run's options, and the reading of its components."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from torch import nn

from fastvideo.distillation.config.base import RESUMABLE
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Frames, NonNegativeInt, Pixels, Tokens

EMBEDDED = {
    "tiny": "tiny/weights/pipeline",
    "tiny_cogvideox": "tiny/weights/cogvideox",
    "tiny_stream": "tiny/weights/stream",
    "tiny_soft": "tiny/weights/soft",
    "tiny_stills": "tiny/weights/stills",
}
"""Pipelines that ship inside the package, by the name that stands for their path."""
EXPECTED = (
    "a diffusers pipeline folder, a hub id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers' "
    f"or one of {sorted(EMBEDDED)} is expected"
)


class PipelineConfig(AdapterConfig):
    """Options of every family over a diffusers pipeline."""

    height: Pixels = 32
    """Video height in pixels."""
    width: Pixels = 32
    """Video width in pixels."""
    num_frames: Frames = 9
    """Video frames."""
    max_sequence_length: Tokens = 16
    """Tokens that a prompt may have."""
    prompt_for_negative: str = ""
    """The negative prompt, used wherever guidance is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the network's matrix products; trained weights, times, losses and differences stay float32. Frozen and
    split networks hold bfloat16 matrices while they compute, whole trained ones are cast by autocast."""
    attention_backend: str = "native"
    """Attention kernel, by its name in diffusers' dispatcher: `native` is torch's own, `flash` or `sage` need a
    package. It is printed at the start and never replaced by another."""
    compile_blocks: bool = False
    """Compile the network's repeated blocks (torch.compile): the first steps take a minute, the others less time."""
    prompt_cache_mib: Annotated[NonNegativeInt, RESUMABLE] = 512
    """MiB of host memory for embeddings of prompts, least recently used first out."""


def check_divisible(config: PipelineConfig, side: int, frames: int) -> None:
    """Check that sides are multiples of ``side`` and frames one more than a multiple of ``frames``.

    Raises:
        ValueError: with the nearest sizes, as pydantic's validators want it.
    """
    for name, step, more in (("height", side, 0), ("width", side, 0), ("num_frames", frames, 1)):
        if (size := getattr(config, name)) % step != more:
            below = max(size - more, step) // step * step + more
            kind = f"one more than a multiple of {step}" if more else f"a multiple of {step} (VAE factor x patch)"
            raise ValueError(f"{name} must be {kind}, such as {below} or {below + step}, got {size}")


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


@dataclass(frozen=True)
class PipelineSpec:
    """Class names and module names of one family's pipelines."""

    network: str
    """Class of the denoising network, in diffusers."""
    vae: str
    """Class of the autoencoder, in diffusers."""
    text_encoder: str
    """Class of the text encoder, in transformers."""
    time_embedding: str
    """Module of the network whose output is the time embedding: a flow map's second time goes in here."""
    blocks: str
    """Attribute of the network that lists its repeated blocks."""
    published_guidance: float
    """Guidance that the family's authors sample with."""
    parts: tuple[str, ...] = ("transformer",)
    """Subfolders that hold the network."""


class Pipeline(Generic[ConfigT]):
    """One pipeline folder with the options of a run.

    Raises:
        UserError: if ``config.path`` is no pipeline of the family.
    """

    def __init__(self, spec: PipelineSpec, config: ConfigT, device: torch.device) -> None:
        self.spec, self.config, self.device = spec, config, device
        self.source = self.resolve(config.path)
        self._read = cache(full_config)

    def resolve(self, path: str) -> str:
        """The folder of a pipeline of the family."""
        return checked_pipeline(local_path(path), path, self.config.pipelines)

    def resolved(self, path: str | None) -> str:
        """The pipeline folder behind ``path``; ``None`` is the run's own."""
        return self.source if path is None else self.resolve(path)

    def network_config(self, path: str | None = None) -> Mapping[str, Any]:
        """The network's config, with diffusers' defaults for what its file lacks."""
        return self._read(self.spec.network, *self.config_place(path, self.spec.parts[0]))

    def config_place(self, path: str | None, part: str) -> tuple[str, str]:
        """Folder and subfolder of the ``config.json`` of one part of the network behind ``path``."""
        return self.resolved(path), part

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """Components and options of the pipeline, from its ``model_index.json``."""
        return read_index(self.source)

    @property
    def vae_config(self) -> Mapping[str, Any]:
        """The autoencoder's config, with diffusers' defaults for what its file lacks."""
        return self._read(self.spec.vae, self.source, "vae")

    def frozen(self, cls: type[Any], subfolder: str, **options: Any) -> Any:
        """A component that is never trained, on the device."""
        module: nn.Module = self.component(cls, self.source, subfolder, **options)
        return module.to(self.device).eval().requires_grad_(False)

    def component(self, cls: type[Any], source: str, subfolder: str, **options: Any) -> Any:
        """A component of the pipeline folder ``source`` with its weights, as :func:`load_component`."""
        return load_component(cls, source, subfolder, **options)


def local_path(path: str) -> Path:
    """``path`` itself, or the folder that ships under this name."""
    return Path(str(files("fastvideo").joinpath(EMBEDDED[path]))) if path in EMBEDDED else Path(path)


def checked_pipeline(folder: Path, path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The folder behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        there = "has no model_index.json" if folder.is_dir() else "is a file"
        what = there if folder.exists() else "does not exist"
        raise UserError(f"model folder {path!r} {what}: {EXPECTED}")
    content = read_index(str(folder))
    if content.get("_class_name") not in pipeline_classes:
        raise UserError(
            f"model folder {path!r} holds a {content.get('_class_name')}; this family reads "
            f"{' or '.join(pipeline_classes)} (a role names another as `model: {{family: NAME, path: ...}}`)"
        )
    return str(folder)


def read_index(source: str) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder."""
    index = Path(source) / "model_index.json"
    with _or_user_error(f"cannot read {index}"):
        found = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{index}: a JSON object is expected, found {type(found).__name__}")
    return found


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]


def library_class(library: str, name: str) -> Any:
    """A class of a library that takes seconds to import, so only when it is needed."""
    return getattr(import_module(library), name)


@contextmanager
def _or_user_error(failed: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{failed}: {first_line(error)}") from error


def load_config(cls: type[Any], source: str, subfolder: str) -> dict[str, Any]:
    """The config of one component, as in its file.

    Raises:
        UserError: if the component is not there or cannot be read; so do the next two.
    """
    with _or_user_error(f"cannot read the config of {subfolder!r} in {source!r}"):
        return dict(cls.load_config(source, subfolder=subfolder))


def full_config(name: str, source: str, subfolder: str) -> dict[str, Any]:
    """:func:`load_config` of a class of diffusers, with its defaults for what an older checkpoint's file lacks."""
    cls = library_class("diffusers", name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **load_config(cls, source, subfolder)}


def load_component(cls: type[Any], source: str, subfolder: str, **options: Any) -> Any:
    """``cls.from_pretrained(source, subfolder=...)``, without transformers' progress bar."""
    failed = f"cannot load {subfolder!r} ({cls.__name__}) from {source!r}"
    with without_progress_bar(), _or_user_error(failed):
        return cls.from_pretrained(source, subfolder=subfolder, **options)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal; those that somebody turned off before stay off."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
