"""``DistillAdapter``: one model family, as its network call and three parts (codec, conditioner, model folder)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.config.base import AdapterConfig
from fastvideo.distillation.scaling import Scaling
from fastvideo.distillation.types import Condition, Need, RawBatch, UserError

ConfigT = TypeVar("ConfigT", bound=AdapterConfig)
Tokens = tuple[Tensor, ...]
"""Token features, one ``[B, L, D]`` per tap, in the order of the taps."""
Shape = tuple[int | None, ...]
"""Shape of one stored sample; ``None`` fits any size."""


class Codec(ABC):
    """Videos ``[B, 3, T, H, W]`` in ``[-1, 1]`` to latents ``[B, C, F, H, W]`` of about unit variance, and back."""

    device: torch.device
    """Device of everything that the codec returns."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample."""

    @property
    @abstractmethod
    def latent_key(self) -> str:
        """Hash of all that the latents of a video depend on: cached latents are never stale."""

    def encode(self, videos: Tensor, *, gradient: bool = False) -> Tensor:
        """Normalised latents of videos; ``gradient`` keeps the graph, for a bridge between latent spaces."""
        with nullcontext() if gradient else torch.no_grad():
            return self._encode(videos.to(self.device))

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """Videos of normalised latents; ``gradient`` keeps the graph."""
        with nullcontext() if gradient else torch.no_grad():
            return self._decode(latents)

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalised latents of the VAE's raw ones, on the same device: published datasets hold raw latents.

        Raises:
            UserError: for a family that reads no such datasets.
        """
        raise UserError(f"{type(self).__name__} cannot normalise raw latents: preprocess the videos with this project")

    @abstractmethod
    def _encode(self, videos: Tensor) -> Tensor:
        """:meth:`encode`, for videos on the device."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """:meth:`decode`."""


class Conditioner(ABC):
    """Prompts, and conditioning frames, to a :class:`Condition`."""

    device: torch.device
    """Device of everything that the conditioner returns."""
    _negative: Condition | None = None

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of this conditioner's tensors in a condition (``Condition.of``); equal only if their tensors are."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt.

        Raises:
            UserError: for a prompt that the text encoder cannot take whole.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check prompts before a run starts on them; a family without a limit takes all.

        Raises:
            UserError: for the first prompt that the text encoder cannot take whole.
        """
        return None

    @property
    def text_length(self) -> int | None:
        """Tokens of the longest text embedding that the network takes; ``None`` for no limit."""
        return None

    @property
    def negative_prompt(self) -> str:
        """The prompt of the unguided prediction."""
        return ""

    def ensure_negative_conditioning(self, made: Condition | None = None) -> None:
        """Make the condition of the unguided prediction once; ``made`` (one row) replaces encoding the prompt."""
        if self._negative is None:
            self._negative = made or self.encode_prompts([self.negative_prompt])

    def negative(self, count: int) -> Condition:
        """The negative condition for ``count`` samples.

        Raises:
            RuntimeError: before :meth:`ensure_negative_conditioning`.
        """
        if self._negative is None:
            raise RuntimeError("call ensure_negative_conditioning() before a batch is prepared")
        return self._negative.map(lambda value: value.expand(count, *value.shape[1:]))

    @property
    def first_frames(self) -> tuple[int, ...]:
        """Numbers of conditioning frames that the model takes.

        ``(0,)`` is text alone, ``(1,)`` always an image, ``(0, 1)`` either.
        """
        return (0,)

    @property
    def needs_frames(self) -> bool:
        """True if generation and training always start from conditioning frames."""
        return 0 not in self.first_frames

    def condition_on(self, frames: Tensor | None) -> Condition:
        """Addition of conditioning frames ``[B, 3, T, H, W]`` in ``[-1, 1]`` to every condition, the negative too.

        Raises:
            UserError: if the model does not take this number of frames; ``None`` is 0.
        """
        count = 0 if frames is None else frames.shape[2]
        if count not in self.first_frames:
            wanted = " or ".join(map(str, self.first_frames))
            raise UserError(f"the model goes on from {wanted} given frames, got {count}")
        return Condition({}) if frames is None else self._encode_frames(frames)

    def _encode_frames(self, frames: Tensor) -> Condition:
        """:meth:`condition_on`, for a number of frames that is in :attr:`first_frames`."""
        raise NotImplementedError(f"{type(self).__name__}.first_frames promises it")

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """:meth:`condition_on` for the first frames of the data; called if :attr:`needs_frames`.

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

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        """Shape of one sample of every condition that can be computed beforehand, by its name in a dataset.

        ``text_embedding`` is optional in a dataset (captions are encoded instead), all others are not.
        """
        return {}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """All of :attr:`stored_shapes`, for videos ``[B, 3, T, H, W]`` and their captions, batched."""
        return {}


@dataclass(frozen=True)
class StockSampler:
    """Scheduler with which stock diffusers samples a student.

    ``scheduler`` is a diffusers scheduler that calls the network at rectified-flow times ``times`` when it is asked for
    ``len(times)`` steps, and goes from one to the next as the student's own sampler does. ``times`` may differ from the
    student's ladder, where no scheduler yields that ladder.
    """

    scheduler: Any
    times: tuple[float, ...]


class ModelFolder(ABC):
    """Weights on disk: reading and writing networks, and the sampling that their folder prescribes."""

    parts: tuple[str, ...] = ()
    """Subfolders that hold the network."""
    published_guidance: float = 1.0
    """Guidance that the family's authors sample with, for a model folder that names none."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the network's matrix products."""
        return torch.float32

    @property
    def kernels(self) -> str:
        """Kernels that compute the network, in one line for the log."""
        return "torch"

    @property
    def recipe(self) -> Mapping[str, Any]:
        """``recipe.json`` of the folder; empty if it has none."""
        return {}

    @abstractmethod
    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with weights from ``path`` or ``config.path``, in ``dtype`` but for what has to be float32."""

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """The network with parameters on the meta device, where they take no memory, and real buffers.

        Parameters have ``dtype``, but for those that the family keeps in float32.
        """
        raise UserError(f"{type(self).__name__} has no networks without weights: its family is loaded whole")

    def files(self, path: str | None) -> Mapping[str, Path]:
        """The safetensors file of each parameter, by its name.

        Raises:
            UserError: if the weights are not there as safetensors.
        """
        raise UserError(f"{type(self).__name__} has no files by parameter: its family is loaded whole")

    def add_flow_map(self, network: nn.Module) -> None:
        """Make a flow map of a network: one that reads ``r``, and at first answers as before whatever ``r`` is.

        Raises:
            UserError: for a family that has none (``supports``).
        """
        raise UserError(f"{type(self).__name__} has no flow maps: its networks take one time, not two")

    @abstractmethod
    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        """Write a complete model folder with ``network`` in it and ``recipe`` beside it as ``recipe.json``."""

    @abstractmethod
    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Times, from 1 down, at which the family's own scheduler calls a teacher for that many steps."""

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """The scheduler with which stock diffusers comes closest to a student's ladder ``times``.

        Args:
            times: the ladder.
            kind: the student's sampler, ``renoise`` or ``euler``.

        Raises:
            UserError: for a family that has no diffusers pipeline.
        """
        raise UserError(f"{type(self).__name__} has no diffusers pipeline to export to")

    def stock_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, F, H, W]`` in the layout that the diffusers pipeline takes."""
        return latents

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """Networks beside the trained one on the meta device: ``text encoder`` and ``VAE``, those that there are."""
        return {}

    def comfy_layer(self, layer: str) -> str:
        """ComfyUI's name of a layer of the network.

        Raises:
            UserError: for a layer or a family that has none.
        """
        raise UserError(f"{type(self).__name__}: ComfyUI has names of its own for Wan's layers alone")


class DistillAdapter(ABC, Generic[ConfigT]):
    """One model family: the call of its network here, everything else in the parts.

    A call of :meth:`velocity` depends on its arguments alone, so that autograd and activation checkpointing just work.

    Args:
        config: the family's options.
        device: where networks and tensors live.
        whole_forwards: several processes share a network and all run every forward to its end.
    """

    Config: ClassVar[type[AdapterConfig]]
    summary: ClassVar[str]
    """One line: the family and its parameterisation."""
    supports: ClassVar[frozenset[Need]] = frozenset()
    """Abilities beyond :meth:`velocity` at one time per sample; a method that needs more is refused before loading."""

    def __init__(self, config: ConfigT, device: torch.device | str = "cpu", *, whole_forwards: bool = False) -> None:
        self.config = config
        self.device = torch.device(device)
        self._whole_forwards = whole_forwards

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """Videos to latents and back."""

    @property
    @abstractmethod
    def conditioner(self) -> Conditioner:
        """Prompts and images to conditions."""

    @property
    @abstractmethod
    def folder(self) -> ModelFolder:
        """Weights on disk."""

    @cached_property
    def scaling(self) -> Scaling | None:
        """Rules by which several processes hold a network; ``None`` for one that has to be whole."""
        return None

    def ensure_negative_conditioning(self) -> None:
        """Make the condition of the unguided prediction, once; see :class:`Conditioner`."""
        self.conditioner.ensure_negative_conditioning()

    @abstractmethod
    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        """Float32 ``E[noise - x0 | x_t]`` ``[B, C, F, H, W]``.

        ``t`` are rectified-flow times, float32 ``[B]`` or, for families that support ``frame_times``, ``[B, F]``.

        A family that predicts something else, or on another schedule, converts here (``noise.Interpolant``). With ``r``
        (shape of ``t``, ``r <= t``; families that support ``flow_map``) it is the mean velocity over ``[r, t]``:
        ``x_r = x_t - (t - r) u``.
        """

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        """Input of the network's time embedding at rectified-flow times ``t``; :meth:`velocity` passes this.

        A class method, so that a schedule can be shown without the model where the model does not matter.
        """
        return t

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width ``D`` of the tokens after each repeated block, known without the network; empty: no features."""
        return ()

    def features(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[int],
        *,
        whole: bool = False,
    ) -> tuple[Tensor | None, Tokens]:
        """Tokens float32 ``[B, L, D]`` after each of the repeated blocks ``taps``, frame by frame along ``L``.

        Differentiable in ``x_t`` and in the network.

        Args:
            whole: answer the :meth:`velocity` of the same call too; otherwise it is ``None`` and nothing runs after
                the last tap.

        Raises:
            UserError: for a tap that is no block, or a family without features.
        """
        check_taps(taps, self.feature_widths, type(self).__name__)
        raise NotImplementedError(f"{type(self).__name__}.feature_widths promises it")


def check_taps(taps: Sequence[int], widths: Sequence[int], family: str) -> None:
    """Check that every tap is a block of the network.

    Raises:
        UserError: if the family names no blocks, or a tap is outside them.
    """
    if not widths:
        raise UserError(f"{family} has no features to tap: a family names its blocks and their widths for that")
    wrong = [tap for tap in taps if not 0 <= tap < len(widths)]
    if wrong or not taps:
        raise UserError(f"taps {list(taps)}: blocks 0 to {len(widths) - 1} of {family} can be tapped, at least one")
