"""Networks of diffusers over several processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.kernels import repeated_blocks
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline


class DiffusersScaling:
    """``Scaling`` of a diffusers network.

    Args:
        pipeline: its folder.
        text_length: text tokens that it reads.
    """

    def __init__(self, pipeline: Pipeline[Any], text_length: int) -> None:
        self.pipeline, self.text_length = pipeline, text_length

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The blocks that diffusers never splits over devices (``_no_split_modules``)."""
        return repeated_blocks(network)

    def recompute(self, network: Any, checkpoint: Callable[..., Any]) -> None:
        """Through diffusers' own switch."""
        network.enable_gradient_checkpointing(checkpoint)

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        config = self.pipeline.network_config(path)
        patches = zip(latent_shape[1:], config["patch_size"], strict=True)
        tokens = math.prod(size // patch for size, patch in patches)
        return {"attention heads": config["num_attention_heads"], "tokens": tokens}

    def plan(self) -> Mapping[str, Any] | None:
        """Tensors that are split and gathered, by module; ``None`` for diffusers' own plan of the class."""
        return None

    def join_tokens(self, network: Any, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tokens ``[B, L, D]`` of all processes of a sample, from inside a network whose tokens are split."""
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
