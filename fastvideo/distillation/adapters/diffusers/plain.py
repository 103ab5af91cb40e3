"""A diffusers pipeline of one network, as it is: its call, and reading and writing its folder.

``adapter.py`` and ``folder.py`` add what most families can do beside: kernels, flow maps, files of other programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.base import DistillAdapter, ModelFolder
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, PipelineSpec, library_class
from fastvideo.distillation.noise import GuidanceValue


class PlainAdapter(DistillAdapter[ConfigT]):
    """A family whose weights are a diffusers pipeline folder; heavy parts are loaded on first use."""

    _spec: ClassVar[PipelineSpec]
    _folders: ClassVar[type[Pipeline[Any]]] = Pipeline

    def __init__(self, config: ConfigT, device: torch.device | str = "cpu", *, whole_forwards: bool = False) -> None:
        super().__init__(config, device, whole_forwards=whole_forwards)
        self._pipeline: Pipeline[ConfigT] = self._folders(self._spec, config, self.device)

    def _autocast(self, network: nn.Module, x_t: Tensor) -> AbstractContextManager[object]:
        """Autocast to bfloat16 for the call on ``x_t``, where :meth:`_casts` says so."""
        enabled = self._casts(network, x_t)
        if not enabled and not torch.is_autocast_enabled(self.device.type):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _casts(self, network: nn.Module, x_t: Tensor) -> bool:
        """True for a call that computes its matrix products in bfloat16 with weights of float32."""
        return self.config.precision == "bfloat16"

    def _input(self, network: nn.Module, value: Tensor) -> Tensor:
        """An input of a network in the dtype of its matrices; times are never cast, and autocast casts by itself."""
        return value


class PlainFolder(ModelFolder, Generic[ConfigT]):
    """Folder of a diffusers pipeline."""

    _written: ClassVar[tuple[str, ...]] = ("recipe.json",)
    """Files beside the parts that :meth:`save` writes anew."""

    def __init__(self, pipeline: Pipeline[ConfigT]) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.parts = self._parts_in(pipeline.source)
        self.published_guidance: GuidanceValue = pipeline.spec.published_guidance
        self.compute_dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    def _parts_in(self, source: str) -> tuple[str, ...]:
        """Subfolders of a pipeline folder that hold its network."""
        return self.pipeline.spec.parts

    @cached_property
    def _class(self) -> Any:
        return library_class("diffusers", self.pipeline.spec.network)

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode: published ones have no dropout."""
        source = self.pipeline.resolved(path)
        parts, load = self._parts_in(source), self.pipeline.component
        networks = [load(self._class, source, part, torch_dtype=dtype) for part in parts]
        return self._joined([self._ready(network, path) for network in networks], path).to(self.pipeline.device)

    def _ready(self, network: nn.Module, path: str | None) -> nn.Module:
        """A network of the folder behind ``path``, prepared for its calls."""
        return network.eval()

    def _joined(self, networks: Sequence[nn.Module], path: str | None) -> nn.Module:
        """One network of those in the parts of the folder behind ``path``."""
        (network,) = networks
        return network

    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """A folder that the pipeline's ``from_pretrained`` loads, with everything of the source but its network.

        With ``slim`` the text encoder, its tokenizer and the VAE are symbolic links to the source's folders.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for item in Path(self.pipeline.source).iterdir():
            if item.name in (*self.parts, *self._written):
                continue
            if item.is_dir() and slim and item.name != "scheduler":
                (folder / item.name).symlink_to(item.resolve(), target_is_directory=True)
            elif item.is_dir():
                shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
            else:
                shutil.copy2(item, folder / item.name)
        self._save_network(folder, network)
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")

    def _save_network(self, folder: Path, network: Any) -> None:
        network.save_pretrained(folder / self.parts[0])
