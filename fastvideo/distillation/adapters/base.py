"""``DistillAdapter``: everything that is particular to one model family, behind a handful of primitives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.taps import FeatureTaps
from fastvideo.distillation.config.base import AdapterConfig
from fastvideo.distillation.scaling import Scaling
from fastvideo.distillation.types import Batch, Condition, Need, RawBatch, Trajectory, UserError

ConfigT = TypeVar("ConfigT", bound=AdapterConfig)


@dataclass(frozen=True)
class StockSampler:
    """What stock diffusers needs to sample a student.

    ``scheduler`` is a diffusers scheduler that calls the network at rectified-flow times ``times`` when it is asked for
    ``len(times)`` steps, and goes from one to the next as the student's own sampler does. ``times`` may differ from the
    student's ladder, where no scheduler yields that ladder.
    """

    scheduler: Any
    times: tuple[float, ...]


class DistillAdapter(FeatureTaps, ABC, Generic[ConfigT]):
    """One model family.

    Latents are ``[B, C, F, H, W]``, normalised to about unit variance; videos are ``[B, 3, T, H, W]`` in ``[-1, 1]``.
    A call of :meth:`velocity` depends on its arguments alone, so that autograd and activation checkpointing just work.

    Args:
        config: the family's options.
        device: where networks and tensors live.
    """

    Config: ClassVar[type[AdapterConfig]]
    summary: ClassVar[str]
    """One line: the family and its parameterisation."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipeline classes (``_class_name`` in ``model_index.json``) whose folders this family reads."""
    per_frame_times: ClassVar[bool] = True
    """Whether :meth:`velocity` takes times per frame ``[B, F]``; a family without them refuses with a ``UserError``."""
    published_guidance: ClassVar[float] = 1.0
    """Guidance that the family's authors sample with, for a model folder that names none."""
    frames_first: ClassVar[bool] = False
    """Whether the diffusers pipeline has its latents as ``[B, F, C, H, W]``."""
    supports: ClassVar[frozenset[Need]] = frozenset()
    """What :meth:`velocity` does beyond the velocity; a method that needs more is refused before anything is loaded."""

    def __init__(self, config: ConfigT, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample."""

    @abstractmethod
    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times, from 1 down, at which the family's own scheduler calls a teacher for that many steps."""

    @abstractmethod
    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with weights from ``path`` or ``config.path``, in ``dtype`` but for what has to be float32."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products of the network are computed in."""
        return torch.float32

    @cached_property
    def scaling(self) -> Scaling | None:
        """How networks of the family are held by several processes; ``None`` for one that has to be whole."""
        return None

    def add_flow_map(self, network: nn.Module) -> None:
        """Make a flow map of a network: one that reads ``r``, and at first answers as before whatever ``r`` is.

        Raises:
            UserError: for a family that has none (``supports``).
        """
        raise UserError(f"{type(self).__name__} has no flow maps: its networks take one time, not two")

    @abstractmethod
    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        """Float32 ``E[noise - x0 | x_t]`` ``[B, C, F, H, W]``.

        ``t`` are rectified-flow times, float32 ``[B]`` or per frame ``[B, F]``.

        A family that predicts something else, or on another schedule, converts here (``noise.Interpolant``). With ``r``
        (shape of ``t``, ``r <= t``; families that support ``flow_map``) it is the mean velocity over ``[r, t]``:
        ``x_r = x_t - (t - r) u``.
        """

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        """What the network's time embedding is given at rectified-flow times ``t``; :meth:`velocity` passes this.

        A class method, so that a schedule can be shown without the model where the model does not matter.
        """
        return t

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check prompts before a run starts on them; a family without a limit takes all.

        Raises:
            UserError: for the first prompt that the text encoder cannot take whole.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt.

        Raises:
            UserError: for a prompt that the text encoder cannot take whole.
        """

    @property
    def kernels(self) -> str:
        """One line for the start of a run: what the network is computed with."""
        return "torch"

    @property
    @abstractmethod
    def codec_key(self) -> str:
        """Changes with all that the latents of a video depend on: cached latents are never stale."""

    @abstractmethod
    def encode(self, videos: Tensor) -> Tensor:
        """Normalised latents of videos, without gradient."""

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalised latents of what the VAE gives, on the same device: published datasets hold raw latents.

        Raises:
            UserError: for a family that reads no such datasets.
        """
        raise UserError(f"{type(self).__name__} cannot normalise raw latents: preprocess the videos with this project")

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Videos of normalised latents, without gradient."""

    @abstractmethod
    def save_pipeline(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        """Write a complete model folder with ``network`` in it and ``recipe`` beside it as ``recipe.json``."""

    @property
    def text_length(self) -> int | None:
        """Tokens of the longest text embedding that the network takes; ``None`` if it has no such limit."""
        return None

    @property
    def extra_shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        """Shape of one sample of everything but latents that can be computed beforehand, by name; ``None``: any size.

        ``text_embedding`` is optional in a dataset (captions are encoded instead), all others are not.
        """
        return {}

    def encode_extras(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Everything that :attr:`extra_shapes` names, for videos ``[B, 3, T, H, W]`` and their captions, batched."""
        return {}

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """The scheduler with which stock diffusers comes closest to a student's ladder ``times``.

        Args:
            times: the ladder.
            kind: the student's sampler, ``renoise`` or ``euler``.

        Raises:
            UserError: for a family that has no diffusers pipeline.
        """
        raise UserError(f"{type(self).__name__} has no diffusers pipeline to export to")

    @property
    def source_recipe(self) -> Mapping[str, Any]:
        """``recipe.json`` of the model that the run starts from; empty if it has none."""
        return {}

    def ensure_negative_conditioning(self, made: Condition | None = None) -> None:
        """Make the condition of the unguided prediction, once, unless it is ``made`` (one row) already."""
        if self._negative is None:
            self._negative = made or self.encode_prompts([self.negative_prompt])

    @property
    def negative_prompt(self) -> str:
        """The prompt of the unguided prediction."""
        return ""

    _negative: Condition | None = None

    def negative(self, count: int) -> Condition:
        """The negative condition for ``count`` samples.

        Raises:
            RuntimeError: before :meth:`ensure_negative_conditioning`.
        """
        if self._negative is None:
            raise RuntimeError("call ensure_negative_conditioning() before a batch is prepared")
        tensors = {key: value.expand(count, *value.shape[1:]) for key, value in self._negative.tensors.items()}
        return Condition(tensors)

    @property
    def first_frames(self) -> tuple[int, ...]:
        """How many frames of a video may be given, for the model to go on from.

        ``(0,)`` is text alone, ``(1,)`` always an image, ``(0, 1)`` either.
        """
        return (0,)

    @property
    def needs_frames(self) -> bool:
        """Whether there is nothing to generate, or to train on, without given frames."""
        return 0 not in self.first_frames

    def condition_on(self, frames: Tensor | None) -> Condition:
        """What given frames ``[B, 3, T, H, W]`` in ``[-1, 1]`` add to every condition, the negative one too.

        Raises:
            UserError: if the model does not take this number of frames; ``None`` is 0.
        """
        count = 0 if frames is None else frames.shape[2]
        if count not in self.first_frames:
            wanted = " or ".join(map(str, self.first_frames))
            raise UserError(f"the model goes on from {wanted} given frames, got {count}")
        return Condition({}) if frames is None else self.encode_frames(frames)

    def encode_frames(self, frames: Tensor) -> Condition:
        """:meth:`condition_on`, for a number of frames that is in :attr:`first_frames`."""
        raise NotImplementedError(f"{type(self).__name__}.first_frames promises it")

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """What :meth:`condition_on` is for the first frames of the data; asked if :attr:`needs_frames`.

        Raises:
            UserError: if the data does not hold them.
        """
        raise NotImplementedError(f"{type(self).__name__}.first_frames promises it")

    def text_of(self, raw: RawBatch) -> Condition:
        """The condition of the captions; a family reads ``text_embedding`` here where the data holds it.

        Raises:
            UserError: for a caption that the text encoder cannot take whole, or an embedding that does not fit.
        """
        return self.encode_prompts(raw.captions)

    def prepare(self, raw: RawBatch, *, any_size: bool = False) -> Batch:
        """Captions and first frames to conditions, latents to the device in float32.

        Args:
            raw: from the data source.
            any_size: take latents of every number of frames, height and width, as a dataset with buckets has them.

        Raises:
            UserError: if the latents do not have :attr:`latent_shape`, or the data lacks what conditions are made of.
        """
        shape, x0 = self.latent_shape, None
        if raw.latents is not None:
            found = tuple(raw.latents.shape[1:])
            if found != shape and not (any_size and found[0] == shape[0] and len(found) == len(shape)):
                raise UserError(f"data: latents have shape {found} (C, F, H, W), the model expects {shape}")
            x0 = raw.latents.to(self.device, torch.float32, non_blocking=True)
            shape = (found[0], found[1], found[2], found[3])
        count = len(raw.captions)
        first = self.first_frames_of(raw) if self.needs_frames else Condition({})
        return Batch(
            shape=(count, *shape),
            condition=self.text_of(raw) | first,
            negative=self.negative(count) | first,
            x0=x0,
            trajectory=Trajectory.of(raw.extras, self.device),
        )
