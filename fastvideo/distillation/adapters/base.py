"""``DistillAdapter``: one model family, as its network call and three parts (codec, conditioner, model folder)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import Condition, Need, RawBatch, UserError

if TYPE_CHECKING:
    from fastvideo.distillation.chunks import Past
    from fastvideo.distillation.parts import Parts
    from fastvideo.distillation.scaling import Scaling

ConfigT = TypeVar("ConfigT", bound=AdapterConfig)


class Codec(ABC):
    """Videos ``[B, 3, T, H, W]`` in ``[-1, 1]`` to latents ``[B, C, F, H, W]`` of about unit variance, and back."""

    device: torch.device
    """Device of everything that the codec returns."""

    @property
    def parts(self) -> Parts | None:
        """Parts of a flat state; ``None`` for latents that are one tensor."""
        return None

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a video frame in pixels."""
        return self.latent_shape[2:]

    @property
    def temporal(self) -> int:
        """Video frames per latent frame; the first video frame is a latent frame of its own."""
        return 1

    @property
    @abstractmethod
    def latent_key(self) -> str:
        """Hash of all that the latents of a video depend on: cached latents are never stale."""

    @property
    def known_keys(self) -> tuple[str, ...]:
        """Keys in files whose latents are of this space: the present one, then those that earlier versions wrote."""
        return (self.latent_key,)

    def encode(self, videos: Tensor, *, gradient: bool = False) -> Tensor:
        """Normalised latents; ``gradient`` keeps the graph, for a bridge between latent spaces."""
        with nullcontext() if gradient else torch.no_grad():
            return self._encode(videos.to(self.device))

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """Videos of normalised latents; ``gradient`` keeps the graph, and pixels beyond ``[-1, 1]`` as they are."""
        with nullcontext() if gradient else torch.no_grad():
            return self._decode(latents)

    @abstractmethod
    def _encode(self, videos: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class Conditioner(ABC):
    """Prompts and conditioning frames to a :class:`Condition`.

    Prompts that the text encoder cannot take whole, and data that does not fit, are a ``UserError``.
    """

    device: torch.device
    """Device of everything that the conditioner returns."""
    text_length: int | None = None
    """Tokens of the longest text embedding that the network takes; ``None`` for no limit."""
    negative_prompt: str = ""
    """Prompt of the unguided prediction."""
    _negative: Condition | None = None

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of this conditioner's tensors in a condition (``Condition.of``); equal only if their tensors are."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that :meth:`encode_prompts` would, before a run starts on them."""
        return None

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, of which :attr:`text_length` are possible; empty for a family without a limit."""
        return []

    @property
    def text_rows(self) -> int:
        """Rows of the longest text that a dataset stores; more than :attr:`text_length` where other vectors of a prompt
        are stored under its tokens."""
        return self.text_length or 1

    def ensure_negative_conditioning(self, made: Condition | None = None) -> None:
        """Make the condition of the unguided prediction once; ``made`` (one row) replaces encoding the prompt."""
        if self._negative is None:
            self._negative = made or self.encode_prompts([self.negative_prompt])

    def negative(self, count: int) -> Condition:
        """The negative condition for ``count`` samples, once :meth:`ensure_negative_conditioning` has made it."""
        if self._negative is None:
            raise RuntimeError("call ensure_negative_conditioning() before a batch is prepared")
        return self._negative.map(lambda value: value.expand(count, *value.shape[1:]))

    def text_of(self, raw: RawBatch) -> Condition:
        """The condition of the captions; a family reads ``text_embedding`` here where the data holds it."""
        return self.encode_prompts(raw.captions)


class ModelFolder(ABC):
    """Weights on disk, and the sampling that their folder prescribes. ``path`` ``None`` is the run's own."""

    parts: tuple[str, ...] = ()
    """Subfolders that hold the network."""
    published_guidance: GuidanceValue = 1.0
    """Guidance that the family's authors sample with, for a model folder that names none."""
    compute_dtype: torch.dtype = torch.float32
    """Dtype of the network's matrix products."""

    @abstractmethod
    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Times, from 1 down, at which the family's own scheduler calls a teacher for that many steps."""

    def rescale_guidance(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A guided velocity at ``x_t`` as the family's samplers go on, such as with the norm of the conditional one."""
        return guided

    @abstractmethod
    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in ``dtype``, but for parameters that the family keeps in float32."""

    @abstractmethod
    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """Write a complete model folder with ``network`` in it and ``recipe`` beside it as ``recipe.json``.

        ``slim``: what is not changed is a link to where it is, instead of stored again.
        """


class DistillAdapter(Family, ABC, Generic[ConfigT]):
    """One model family: the call of its network here, everything else in the parts.

    Args:
        config: the family's options.
        device: where networks and tensors live.
        whole_forwards: several processes share a network and all run every forward to its end.
    """

    Config: ClassVar[type[AdapterConfig]]
    summary: ClassVar[str]
    """One line: the family and its parameterisation."""
    supports: frozenset[Need] = frozenset()
    """Abilities beyond :meth:`velocity` at one time per sample; a method that needs more is refused before loading.
    Some models of a family have fewer than the class says."""

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

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        name = type(self).__name__
        raise UserError(f"{name} does not generate chunk by chunk: its networks see all frames of a video at once")

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        """Input of the network's time embedding at rectified-flow times ``t``, known without the model."""
        return t
