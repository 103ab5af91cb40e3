"""``Pipeline``: a diffusers pipeline folder with a run's options, and the reading of its components."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from torch import nn

from fastvideo.distillation.adapters.diffusers.single_file import is_single_file
from fastvideo.distillation.config.base import RESUMABLE, AdapterConfig
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Frames, NonNegativeInt, Pixels, Tokens
from fastvideo.storage import is_remote, local_folder

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
ADAPTER_HINT = "it holds a LoRA, which goes into a role's `loras` or `lora.init_from`, or into `fastvideo merge`"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
        ValueError: for the first that is not, as pydantic's validators want it.
    """
    for name, size in (("height", config.height), ("width", config.width)):
        if size % side:
            raise ValueError(f"{name} must be a multiple of {side} (VAE factor {side // 2}, patch 2), got {size}")
    if config.num_frames % frames != 1:
        raise ValueError(f"num_frames must be one more than a multiple of {frames}, got {config.num_frames}")


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
    second: str | None = None
    """Subfolder that holds a second network in some of the family's pipelines, an expert of low noise."""


class Pipeline(Generic[ConfigT]):
    """One pipeline folder with the options of a run.

    Raises:
        UserError: if ``config.path`` is no pipeline of the family.
    """

    def __init__(self, spec: PipelineSpec, config: ConfigT, device: torch.device) -> None:
        self.spec, self.config, self.device = spec, config, device
        self.source = resolve_pipeline(config.path, config.pipelines)
        self.parts = self.parts_of(self.source)
        self._read = cache(full_config)

    def resolved(self, path: str | None) -> str:
        """The pipeline folder behind ``path``; ``None``, or a single file of weights, is the run's own."""
        if path is None or is_single_file(path):
            return self.source
        return resolve_pipeline(path, self.config.pipelines)

    def parts_of(self, source: str) -> tuple[str, ...]:
        """Subfolders of a pipeline folder that hold its network, or its two experts."""
        second = self.spec.second
        held = second is not None and (read_index(source).get(second) or [None])[0] is not None
        return (*self.spec.parts, second) if held and second else self.spec.parts

    def network_config(self, path: str | None = None) -> Mapping[str, Any]:
        """The network's config, with diffusers' defaults for what its file lacks."""
        return self._read(self.spec.network, self.resolved(path), self.spec.parts[0])

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """Components and options of the pipeline, from its ``model_index.json``."""
        return json.loads((Path(self.source) / "model_index.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    @property
    def vae_config(self) -> Mapping[str, Any]:
        """The autoencoder's config, with diffusers' defaults for what its file lacks."""
        return self._read(self.spec.vae, self.source, "vae")

    def frozen(self, cls: type[Any], subfolder: str, **options: Any) -> Any:
        """A component that is never trained, on the device."""
        module: nn.Module = load_component(cls, self.source, subfolder, **options)
        return module.to(self.device).eval().requires_grad_(False)


def resolve_pipeline(path: str, pipeline_classes: tuple[str, ...]) -> str:
    """The local folder behind ``path``, checked to be a diffusers pipeline of one of the given classes.

    A path that does not exist and looks like a hub id (``owner/name``) is fetched, or found in the hub's local cache. A
    folder at a URL (``s3://``) is fetched once per machine.

    Raises:
        UserError: if there is no such folder, it is not a diffusers pipeline, or one of another family.
    """
    if path in EMBEDDED:
        path = str(files("fastvideo").joinpath(EMBEDDED[path]))
    folder = local_folder(path) if is_remote(path) else Path(path)
    if not folder.exists() and HUB_ID.fullmatch(path):
        folder = _from_hub(path)
    _check_links(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        there = "has no model_index.json" if folder.is_dir() else "is a file"
        what = there if folder.exists() else "does not exist"
        lora = f"; {ADAPTER_HINT}" if folder.is_dir() and _holds_adapter(folder) else ""
        raise UserError(f"model folder {path!r} {what}: {EXPECTED}{lora}")
    content = json.loads(index.read_text(encoding="utf-8"))
    if content.get("_class_name") not in pipeline_classes:
        raise UserError(
            f"model folder {path!r} holds a {content.get('_class_name')}; "
            f"this family reads {' or '.join(pipeline_classes)}"
        )
    return str(folder)


def read_index(source: str) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder."""
    return dict(json.loads((Path(source) / "model_index.json").read_text(encoding="utf-8")))


def _check_links(folder: Path) -> None:
    """Refuse a slim folder whose links lead nowhere, as on another machine than that which made it."""
    for item in folder.iterdir() if folder.is_dir() else ():
        if item.is_symlink() and not item.exists():
            raise UserError(
                f"model folder {folder}: {item.name} is a link to {item.readlink()}, which is not there. The folder "
                f"was saved slim, without what training does not change: copy it with its links followed (`cp -rL`, "
                f"`rsync -aL`) from where it was made, or let {item.name} link to the same folder of its base model"
            )


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or any(folder.glob("*lora*.safetensors"))


@cache
def _from_hub(name: str) -> Path:
    """Folder of a model on the Hub in its local cache; of a machine's processes one downloads, the others wait."""
    from huggingface_hub import snapshot_download

    try:
        with _one_download(name):
            return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        why = f"{_first_line(error)}; {EXPECTED}"
        raise UserError(f"model {name!r} is neither a local folder nor a model on the Hub: {why}") from error


def _one_download(name: str) -> AbstractContextManager[object]:
    """Lock of a model in the Hub's cache; none in a cache that is read-only, into which nothing is downloaded."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    cache = Path(constants.HF_HUB_CACHE)
    if cache.exists() and not os.access(cache, os.W_OK):
        return nullcontext()
    locks = cache / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(locks / f"{name.replace('/', '--')}.lock")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def library_class(library: str, name: str) -> Any:
    """A class of a library that takes seconds to import, so only when it is needed."""
    return getattr(import_module(library), name)


def pipeline_library_class(name: str) -> Any:
    """A stock pipeline's class, imported without transformers' remarks on image processors that nobody asked for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return library_class("diffusers", name)
    finally:
        logging.set_verbosity(level)


@contextmanager
def _or_user_error(failed: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{failed}: {_first_line(error)}") from error


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


def component_hash(config: Mapping[str, Any], module: nn.Module) -> str:
    """SHA-256 of a component's config (but for entries about its file) and weights."""
    kept = {key: value for key, value in config.items() if key[0] != "_"}  # no path, no version
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
