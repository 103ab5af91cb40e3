"""Families whose network is a rectified flow on a sigma schedule: Qwen-Image, Z-Image, Flux and their kin.

A family says how its network is called (:meth:`FlowAdapter.network_call`) and how its stock pipeline is
(``StockCall``). Everything else comes from the checkpoint: the times of a teacher are those of its own scheduler,
with whatever shift, stretch and dependence on the size that has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow_config import FlowConfig, GuidedImageConfig, guiding
from fastvideo.distillation.adapters.diffusers.flow_texts import FlowTexts, embedded_guidance
from fastvideo.distillation.adapters.diffusers.packing import Packing
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT, Pipeline, library_class, load_config
from fastvideo.distillation.adapters.diffusers.stills import (
    TextsFolder,
    UnsplitScaling,
    check_whole_sample,
)
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import Condition, UserError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
Mu = Callable[[Mapping[str, Any], int, int], float]
"""``mu`` of a scheduler with this config, for a number of tokens of a sample and a number of steps."""


class FlowFolder(TextsFolder[ConfigT]):
    """A pipeline with a sigma schedule.

    Args:
        pipeline: the folder.
        tokens: of a sample, on which the schedule may depend.
        mu: how it does.
    """

    def __init__(self, pipeline: Pipeline[ConfigT], tokens: int, mu: Mu) -> None:
        super().__init__(pipeline)
        self.tokens, self._mu = tokens, mu
        self.distilled = bool(pipeline.index.get("is_distilled"))
        """The checkpoint is distilled already, and says so."""
        if self.distilled:
            self.published_guidance = 1.0

    def check_guidance(self, guidance: GuidanceValue) -> None:
        embedded, config, wanted = embedded_guidance(self.pipeline), self.config, guiding(guidance)
        if not wanted:
            return
        if self.distilled:
            raise UserError(
                f"guidance {wanted}: {config.path} is distilled (is_distilled in its index) and sampled without "
                f"it, 1; take a base checkpoint as the teacher"
            )
        if isinstance(config, GuidedImageConfig) and embedded is not None and not config.allow_cfg_on_distilled:
            raise UserError(
                f"guidance {wanted}: the network reads a guidance ({embedded:g}, model.guidance_embedded) and is "
                f"sampled without another, 1; allow_cfg_on_distilled: true in its model's section allows both"
            )

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Those of the checkpoint's scheduler, asked as its pipeline asks."""
        if steps == 1:  # a schedule that is stretched to its last time has none of one step
            return (1.0,)
        cls, source = library_class("diffusers", SCHEDULER), self.pipeline.source
        config = load_config(cls, source, "scheduler")
        if config.get("_class_name", SCHEDULER) != SCHEDULER:
            raise UserError(f"the scheduler of {source!r} is {config['_class_name']}; {SCHEDULER} is known")
        with _disable_current_modes():  # numbers, where planning computes without them
            scheduler = cls.from_config(config)
            scheduler.set_timesteps(**self.grid(steps), mu=self.mu(scheduler.config, steps))
            return tuple(scheduler.sigmas[:-1].tolist())

    def mu(self, scheduler: Mapping[str, Any], steps: int) -> float:
        """Shift of a schedule with this config, by the sample's size and the number of steps."""
        return self._mu(scheduler, self.tokens, steps)

    def grid(self, steps: int) -> dict[str, Any]:
        """Arguments with which the stock pipeline asks its scheduler for steps."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}


class FlowAdapter(DiffusersAdapter[ConfigT]):
    """A flow family. Its config class is a ``FlowConfig``."""

    _codec: ClassVar[type[DiffusersCodec]]
    _texts: ClassVar[type[FlowTexts[Any]]]
    _folder: ClassVar[type[FlowFolder[Any]]] = FlowFolder
    time_units: ClassVar[float] = 1.0
    """Time of pure noise, as the network takes it."""
    time_projection: ClassVar[tuple[str, float] | None] = None
    """The module that makes sines and cosines of the time, for networks that round the time before, and the time of
    pure noise there. It gets the exact one: bfloat16 knows 256 times in [0.5, 1]."""
    token_output: ClassVar[int] = 0
    """Place of the sample's own tokens in what a block answers."""

    @staticmethod
    def mu(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """:data:`Mu` of the family: here linear in the number of tokens, with the scheduler's own ends (FLUX.1)."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        ends = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return float(calculate_shift(tokens, *(scheduler.get(name, value) for name, value in ends.items())))

    @property
    def packing(self) -> Packing:
        """Layout of latents inside the network."""
        return cast(FlowConfig, self.config).packing

    @cached_property
    def codec(self) -> DiffusersCodec:
        return self._codec(self._pipeline)

    @cached_property
    def conditioner(self) -> FlowTexts[ConfigT]:
        return self._texts(self._pipeline)

    @cached_property
    def folder(self) -> FlowFolder[ConfigT]:
        return self._folder(self._pipeline, self.packing.tokens(self.codec.latent_shape), self.mu)

    @cached_property
    def scaling(self) -> UnsplitScaling:
        return UnsplitScaling(self._pipeline)

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        return cls.time_units * (1 - t if config.reversed_time else t)

    @abstractmethod
    def network_call(
        self, network: nn.Module, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        """The network's answer for packed latents ``x`` at its own ``time`` ``[B]``, packed.

        Args:
            own: the tensors of the condition; texts have the dtype of the network's matrices.
            shape: of the latents, ``(B, C, F, h, w)``.
        """

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        check_whole_sample(type(self).__name__, t)
        own = dict(condition.of(self.conditioner.key))
        own[TEXT] = self._input(network, own[TEXT])
        x = self._input(network, self.packing.pack(x_t))
        with (
            self._autocast(network, x_t),
            self._reading(network, None if r is None else t - r),
            exact_time(network, self.time_projection, t),
        ):
            answer = self.network_call(network, x, self.network_time(t, self.config), own, x_t.shape)
        u = self.packing.unpack(answer.float(), x_t.shape)
        return -u if self.config.reversed_time else u

    def _tokens(self, x_t: Tensor, output: Any) -> Tensor:
        value: Tensor = output if isinstance(output, Tensor) else output[self.token_output]
        return value


@contextmanager
def exact_time(network: nn.Module, projection: tuple[str, float] | None, t: Tensor) -> Iterator[None]:
    """The first call of the module ``projection`` inside gets ``t`` in float32, instead of what it was rounded to."""
    if projection is None:
        yield
        return
    name, units = projection
    exact = [units * t]

    def give(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (exact.pop(), *inputs[1:]) if exact else inputs

    with network.get_submodule(name).register_forward_pre_hook(give):
        yield


def parameters_of(network: nn.Module, modules: Iterable[str]) -> frozenset[str]:
    """Names of the parameters of some modules of a network."""
    prefixes = tuple(f"{module}." for module in modules)
    return frozenset(name for name, _ in network.named_parameters() if name.startswith(prefixes))


def image_grid(rows: int, columns: int, axes: int, device: torch.device, first: int = 1) -> Tensor:
    """Positions ``[rows columns, axes]`` of a picture's patches, row by row; row and column are on two axes that begin
    at ``first``, the others are 0."""
    found = torch.zeros(rows, columns, axes, device=device)
    found[..., first] = torch.arange(rows, device=device)[:, None]
    found[..., first + 1] = torch.arange(columns, device=device)[None]
    return found.view(-1, axes)


def text_line(count: int, axes: int, device: torch.device) -> Tensor:
    """Positions ``[count, axes]`` of a text's tokens, which are counted on the last axis."""
    found = torch.zeros(count, axes, device=device)
    found[:, -1] = torch.arange(count, device=device)
    return found
