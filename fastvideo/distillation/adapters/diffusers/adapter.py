"""The network call that families over diffusers share: precision, features of blocks, flow maps, split tokens.

Features are read through forward hooks: no network is forked and no forward copied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cached_property, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fastvideo.distillation.adapters.diffusers.flow_map import reading
from fastvideo.distillation.adapters.diffusers.folder import repeated_blocks
from fastvideo.distillation.adapters.diffusers.gguf_file import is_readable
from fastvideo.distillation.adapters.diffusers.packed import check_installed, freeze, pack
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline
from fastvideo.distillation.adapters.diffusers.plain import PlainAdapter
from fastvideo.distillation.adapters.diffusers.sources import FetchedPipeline
from fastvideo.distillation.experts import networks_of
from fastvideo.distillation.features import Taps, Tokens, check_taps
from fastvideo.distillation.scaling import Quantise, Storage
from fastvideo.distillation.types import Condition


class DiffusersAdapter(PlainAdapter[ConfigT]):
    """A family over diffusers, with all that its networks share."""

    supports = frozenset({"features", "flow_map", "jvp"})
    _folders = FetchedPipeline

    @classmethod
    def reads_gguf(cls) -> bool:
        """True for a family whose network can come from a ``.gguf`` file."""
        return is_readable(cls._spec.network)

    @cached_property
    def scaling(self) -> DiffusersScaling:
        return DiffusersScaling(self._pipeline)

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        """Heads times head width, for every layer: how diffusers' transformers name it."""
        config = self._pipeline.network_config()
        return (int(config["num_attention_heads"]) * int(config["attention_head_dim"]),) * int(config["num_layers"])

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps, *, whole: bool = False
    ) -> tuple[Tensor | None, Tokens]:
        check_taps(taps, self.feature_widths, type(self).__name__)
        through = whole or self._whole_forwards
        blocks, read = self._blocks(network), partial(self._tokens, x_t)
        u, tokens = tapped(lambda: self.velocity(network, x_t, t, condition), blocks, taps, through, read)
        if u is None or not through:
            return None, tokens
        tokens = self.scaling.join_tokens(network, tokens)
        if self._whole_forwards:
            # In backward a split network is gathered when the gradient of its prediction comes, so one has to come.
            tokens = (tokens[0] + 0.0 * u.mean(), *tokens[1:])
        return (u if whole else None), tokens

    def _blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The blocks that can be tapped."""
        return getattr(network, self._spec.blocks)  # type: ignore[no-any-return]

    def _tokens(self, x_t: Tensor, output: Any) -> Tensor:
        """Tokens ``[B, L, D]`` of the sample ``x_t`` in what a block answers: all of it, or the first of several."""
        value: Tensor = output if isinstance(output, Tensor) else output[0]
        return value if value.ndim == 3 else value.flatten(2).mT  # a map [B, D, h, w] of a UNet

    def _reading(self, network: nn.Module, span: Tensor | None) -> AbstractContextManager[None]:
        """Calls inside read ``span`` = ``t - r`` beside their times."""
        return reading(network, self._spec.time_embedding, span)

    def _casts(self, network: nn.Module, x_t: Tensor) -> bool:
        """Not for a network of bfloat16 matrices, which needs no autocast.

        Not for a derivative either: bfloat16 would leave mostly noise of it (arXiv 2410.11081).
        """
        derived = unpack_dual(x_t).tangent is not None  # type: ignore[no-untyped-call]
        return super()._casts(network, x_t) and not derived and not self.scaling.computes_directly(network)

    def _input(self, network: nn.Module, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16) if self.scaling.computes_directly(network) else value


class _Reached(Exception):
    """Raised at the door of the first block that no tap needs."""


def tapped(
    call: Callable[[], Tensor],
    blocks: Sequence[nn.Module],
    taps: Taps,
    through: bool,
    read: Callable[[Any], Tensor],
) -> tuple[Tensor | None, Tokens]:
    """``call()`` and the tokens that the blocks ``taps`` give during it, which ``read`` finds in their output.

    Unless ``through`` it ends, with ``None``, at the door of the block after the last tap. Activation checkpointing
    inside the call is fine: the hooks are gone when it runs the blocks again.
    """
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[index] = read(output)

        return hook

    def leave(module: nn.Module, inputs: Any) -> None:
        raise _Reached

    u = None
    with ExitStack() as hooks:
        for index in taps:
            hooks.enter_context(blocks[index].register_forward_hook(keep(index)))
        if not through and max(taps) + 1 < len(blocks):
            # Before any hook of the block, such as one that gathers its weights.
            hooks.enter_context(blocks[max(taps) + 1].register_forward_pre_hook(leave, prepend=True))
        with suppress(_Reached):
            u = call()
    return u, tuple(found[index].float() for index in taps)


class DiffusersScaling:
    """``Scaling`` of a diffusers network."""

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        self.pipeline = pipeline
        self._direct: WeakSet[nn.Module] = WeakSet()

    def compute_directly(self, network: nn.Module) -> None:
        """As diffusers' own pipelines compute in bfloat16; nothing to do in float32."""
        if self.pipeline.config.precision == "bfloat16":
            self._direct.add(network)

    def computes_directly(self, network: nn.Module) -> bool:
        """True for a network of bfloat16 matrices, which is called without autocast and on bfloat16 inputs."""
        return network in self._direct

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return repeated_blocks(network)

    def recompute(self, network: Any, checkpoint: Callable[..., Any]) -> None:
        network.enable_gradient_checkpointing(checkpoint)

    def matrices(self, network: nn.Module) -> Mapping[str, nn.Linear]:
        inside = {part for block in self.blocks(network) for part in block.modules()}
        kept = {name for one in networks_of(network) for name in one._keep_in_fp32_modules or ()}
        named = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and m in inside}
        return {name: layer for name, layer in named.items() if not kept & set(name.split("."))}

    def check_packing(self, kind: Quantise, where: str) -> None:
        check_installed(kind, where)

    def pack(self, network: nn.Module, kind: Storage, device: torch.device, where: str) -> None:
        if kind == "gguf":
            freeze(network, device, where)
        else:
            pack(network, self.matrices(network), kind, device, where)

    def context_counts(self, path: str | None, latent_shape: Sequence[int]) -> Mapping[str, int]:
        config = self.pipeline.network_config(path)
        patches = zip(latent_shape[1:], config["patch_size"], strict=True)
        tokens = math.prod(size // patch for size, patch in patches)
        return {"attention heads": config["num_attention_heads"], "tokens": tokens}

    def plan(self) -> Mapping[str, Any] | None:
        """Tensors that are split and gathered, by module; ``None`` for diffusers' own plan of the class."""
        return None

    def split_tokens(self, network: Any, mesh: Any) -> None:
        """Through diffusers' own ``enable_parallelism``, with Ulysses attention."""
        from diffusers import ContextParallelConfig

        # One says that the interface may change (the version is pinned), the other that times per sample stay whole.
        for name in ("diffusers.models.modeling_utils", "diffusers.hooks.context_parallel"):
            logging.getLogger(name).setLevel(logging.ERROR)
        config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
        network.enable_parallelism(config=config, cp_plan=self.plan())

    def join_tokens(self, network: Any, tokens: Tokens) -> Tokens:
        """Tokens of all processes of a sample, from inside a network whose tokens are split."""
        from diffusers.hooks.context_parallel import EquipartitionSharder

        if network._parallel_config is None:
            return tokens
        mesh = network._parallel_config.context_parallel_config._flattened_mesh
        return tuple(EquipartitionSharder.unshard(token, 1, mesh) for token in tokens)
