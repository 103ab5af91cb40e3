"""How networks of diffusers are held by several processes, or with less memory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.flow_map import load_head
from fastvideo.distillation.adapters.kernels import repeated_blocks
from fastvideo.distillation.adapters.loading import full_config
from fastvideo.distillation.types import UserError

INDEX, WHOLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"
"""Where diffusers says which file has which weights, and the file of weights that are in one."""


class DiffusersScaling:
    """``Scaling`` of a diffusers network.

    Args:
        transformer_class: its class in diffusers.
        time_embedding: the module that gives its time embedding, by name.
        resolve: the pipeline folder behind a path, ``None`` being the run's own.
        set_kernels: chooses what a network is computed with.
    """

    def __init__(
        self,
        transformer_class: str,
        time_embedding: str,
        resolve: Callable[[str | None], str],
        set_kernels: Callable[[nn.Module], None],
    ) -> None:
        self._class_name, self._time_embedding = transformer_class, time_embedding
        self._resolve, self._set_kernels = resolve, set_kernels

    @property
    def _class(self) -> Any:
        return getattr(import_module("diffusers"), self._class_name)

    def config(self, path: str | None) -> dict[str, Any]:
        """The network's config, with diffusers' defaults for what its file does not say."""
        return full_config(self._class, self._resolve(path), "transformer")

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """Parameters on the meta device; buffers (tables of positions) and a flow map's head are real."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            network = self._class.from_config(self._class.load_config(self._resolve(path), subfolder="transformer"))
        kept = set(network._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        self._set_kernels(network)
        load_head(network, self._time_embedding, Path(self._resolve(path)))
        return network.eval()  # type: ignore[no-any-return]

    def files(self, path: str | None) -> Mapping[str, Path]:
        """Of one file or of several with an index.

        Raises:
            UserError: if there are no safetensors, or a weight is in no file.
        """
        folder = Path(self._resolve(path)) / "transformer"
        if (folder / INDEX).is_file():
            found = json.loads((folder / INDEX).read_text())["weight_map"]
            return {name: folder / file for name, file in found.items()}
        if not (folder / WHOLE).is_file():
            raise UserError(f"{folder} has neither {WHOLE} nor {INDEX}: split networks are read from safetensors alone")
        from safetensors import safe_open

        with safe_open(folder / WHOLE, "pt") as stored:
            return dict.fromkeys(stored.keys(), folder / WHOLE)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """What diffusers never splits over devices (``_no_split_modules``)."""
        return repeated_blocks(network)

    def recompute(self, network: Any, checkpoint: Callable[..., Any]) -> None:
        """Through diffusers' own switch."""
        network.enable_gradient_checkpointing(checkpoint)

    def context_counts(self, path: str | None, latent_shape: Sequence[int], text_length: int) -> Mapping[str, int]:
        config = self.config(path)
        patches = zip(latent_shape[1:], config["patch_size"], strict=True)
        tokens = math.prod(size // patch for size, patch in patches)
        return {"attention heads": config["num_attention_heads"], "tokens": tokens}

    def plan(self) -> Mapping[str, Any] | None:
        """Which tensors are split and gathered where; ``None`` for what diffusers has for the class."""
        return None

    def join_tokens(self, network: Any, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tokens ``[B, L, D]`` of all processes of a sample, from what is inside a network whose tokens are split."""
        from diffusers.hooks.context_parallel import EquipartitionSharder

        if network._parallel_config is None:
            return tokens
        mesh = network._parallel_config.context_parallel_config._flattened_mesh
        return tuple(EquipartitionSharder.unshard(token, 1, mesh) for token in tokens)

    def split_tokens(self, network: Any, mesh: Any) -> None:
        """Through diffusers' own ``enable_parallelism``, with Ulysses attention."""
        from diffusers import ContextParallelConfig

        # One says that the interface may change (the version is pinned), the other that times per sample stay whole.
        for name in ("diffusers.models.modeling_utils", "diffusers.hooks.context_parallel"):
            logging.getLogger(name).setLevel(logging.ERROR)
        config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
        network.enable_parallelism(config=config, cp_plan=self.plan())
