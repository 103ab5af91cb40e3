"""``DistillAdapter``: one model family, as its network call and three parts (codec, conditioner, model folder)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.config.family import AdapterConfig
from fastvideo.distillation.denoiser import Family, Taps, Tokens
from fastvideo.distillation.frames import latent_frame
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import Condition, Need, RawBatch, UserError

if TYPE_CHECKING:
    from fastvideo.distillation.chunks import Past
    from fastvideo.distillation.parts import Parts
    from fastvideo.distillation.scaling import Scaling, StoredTensor

ConfigT = TypeVar("ConfigT", bound=AdapterConfig)
Shape = tuple[int | None, ...]
"""Shape of one stored sample; ``None`` fits any size."""


class FrameDecoder(Protocol):
    """Decoder of one stream of videos, with a state of its own."""

    @property
    def bytes(self) -> int:
        """Memory of the state."""
        ...

    def __call__(self, latents: Tensor) -> Tensor:
        """Frames ``[B, 3, n, H, W]`` of the next normalised latents ``[B, C, c, h, w]``, in ``[-1, 1]``."""
        ...

    def fork(self) -> FrameDecoder:
        """A decoder that goes on from the same state, apart from this one from now on."""
        ...


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

    def decode_frames(self, latents: Tensor, picks: Sequence[Sequence[int]]) -> Tensor:
        """Some video frames ``[B, 3, n, H, W]`` of each sample, with the gradient of their own latent frame alone.

        They are those of :meth:`decode` with ``gradient``. ``picks`` are ``n`` numbers of video frames per sample.
        """
        return whole_decodes(self, latents, picks)

    def frame_decoder(self) -> FrameDecoder:
        """A decoder for the chunks of one stream.

        Raises:
            UserError: for a family that decodes whole videos only.
        """
        raise UserError(f"{type(self).__name__} decodes whole videos: this family has no streams")

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise the VAE's raw latents, on any device: published datasets hold these.

        Raises:
            UserError: for a family that reads no such datasets.
        """
        raise UserError(f"{type(self).__name__} cannot normalise raw latents: preprocess the videos with this project")

    @abstractmethod
    def _encode(self, videos: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


def whole_decodes(codec: Codec, latents: Tensor, picks: Sequence[Sequence[int]]) -> Tensor:
    """:meth:`Codec.decode_frames` by one decode of the whole videos per pick of a sample."""
    found, rows = [], range(len(latents))
    for frames in zip(*picks, strict=True):
        own = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
        for row, frame in zip(rows, frames, strict=True):
            own[row, latent_frame(frame, codec.temporal)] = True
        only = latents.where(own[:, None, :, None, None], latents.detach())
        videos = codec.decode(only, gradient=True)
        found.append(torch.stack([videos[row, :, frame] for row, frame in zip(rows, frames, strict=True)]))
    return torch.stack(found, dim=2)


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

    @property
    def text_settings(self) -> Mapping[str, Any]:
        """Values that a stored text depends on besides its prompt; empty for a family whose texts are not stored."""
        return {}

    def encode_texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text ``[L, D]`` of each prompt as a dataset stores it, on the host in the encoder's dtype, without padding.

        The prompts go through the encoder together.
        """
        raise UserError(f"{type(self).__name__} has no text encoder whose embeddings could be stored")

    def missing_texts(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that only a text encoder could encode."""
        return []

    def hold_texts(self, texts: Mapping[str, Tensor]) -> None:
        """Take texts of :meth:`encode_texts` by prompt: :meth:`encode_prompts` uses them from now on."""
        return None

    def keep_texts(self, prompts: Iterable[str]) -> None:
        """Encode prompts now, and hold them."""
        return None

    def texts_fit(self, prompts: Sequence[str]) -> bool:
        """True if the family's cache has room for all of these prompts."""
        return True

    @property
    def encoder_bytes(self) -> int:
        """Bytes of the text encoder in memory; 0 if there is none, or it is not loaded."""
        return 0

    def release_encoder(self) -> None:
        """Free the text encoder, which is loaded again only for a prompt that is not held."""
        return None

    def ensure_negative_conditioning(self, made: Condition | None = None) -> None:
        """Make the condition of the unguided prediction once; ``made`` (one row) replaces encoding the prompt."""
        if self._negative is None:
            if made is None:
                self.keep_texts([self.negative_prompt])
            self._negative = made or self.encode_prompts([self.negative_prompt])

    def negative(self, count: int) -> Condition:
        """The negative condition for ``count`` samples, once :meth:`ensure_negative_conditioning` has made it."""
        if self._negative is None:
            raise RuntimeError("call ensure_negative_conditioning() before a batch is prepared")
        return self._negative.map(lambda value: value.expand(count, *value.shape[1:]))

    @property
    def first_frames(self) -> tuple[int, ...]:
        """Possible numbers of conditioning frames: ``(0,)`` text alone, ``(1,)`` always an image, ``(0, 1)`` either."""
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
        raise NotImplementedError(f"{type(self).__name__}.first_frames promises it")

    def first_frames_of(self, raw: RawBatch) -> Condition:
        """:meth:`condition_on` for the first frames of the data; called if :attr:`needs_frames`."""
        raise NotImplementedError(f"{type(self).__name__}.first_frames promises it")

    def text_of(self, raw: RawBatch) -> Condition:
        """The condition of the captions; a family reads ``text_embedding`` here where the data holds it."""
        return self.encode_prompts(raw.captions)

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        """Shape of one sample of each condition that can be computed beforehand, by its name in a dataset.

        ``text_embedding`` is optional in a dataset (captions are encoded instead), all others are not.
        """
        return {}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """All of :attr:`stored_shapes`, for videos ``[B, 3, T, H, W]`` and their captions, batched."""
        return {}


class ModelFolder(ABC):
    """Weights on disk, and the sampling that their folder prescribes. ``path`` ``None`` is the run's own."""

    parts: tuple[str, ...] = ()
    """Subfolders that hold the network."""
    published_guidance: GuidanceValue = 1.0
    """Guidance that the family's authors sample with, for a model folder that names none."""
    compute_dtype: torch.dtype = torch.float32
    """Dtype of the network's matrix products."""
    trained_side: int | None = None
    """Side in pixels of the pictures that an image family's network was trained on."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """``recipe.json`` of the folder; empty if it has none."""
        return {}

    def recipe_of(self, path: str | None) -> Mapping[str, Any]:
        """``recipe.json`` of another folder with a network of the family; empty if it has none."""
        return {}

    @cached_property
    def kernels(self) -> str:
        """Kernels that compute the network, in one line for the log."""
        return "torch"

    def check_kernels(self, *, trained: bool) -> None:  # noqa: B027  (most families need no check)
        """Check that this device has the kernels that the config names, for networks that are ``trained``.

        Raises:
            UserError: for one that it does not have, or that has no gradient.
        """

    def counting(self, add: Callable[[int], None]) -> AbstractContextManager[None]:
        """Give ``add`` the floating point operations that torch's counter does not see, of all calls inside."""
        return nullcontext()

    @abstractmethod
    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """Times, from 1 down, at which the family's own scheduler calls a teacher for that many steps."""

    def rescale_guidance(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A guided velocity at ``x_t`` as the family's samplers go on, such as with the norm of the conditional one."""
        return guided

    def check_guidance(self, guidance: GuidanceValue) -> None:
        """Refuse a guidance (1 is none) that the family's networks are not sampled with; called before a run."""
        return None

    def dead_parameters(self, network: nn.Module) -> frozenset[str]:
        """Names of parameters that no velocity depends on, such as those of a text stream behind its last use."""
        return frozenset()

    @abstractmethod
    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in ``dtype``, but for parameters that the family keeps in float32."""

    def boundary(self, path: str | None = None) -> float | None:
        """Time at which the network of :meth:`load_network` changes experts; ``None`` for one network at all times."""
        return None

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """The network of :meth:`load_network` with parameters on the meta device, without memory, and real buffers."""
        raise UserError(f"{type(self).__name__} has no networks without weights: its family is loaded whole")

    def files(self, path: str | None) -> Mapping[str, StoredTensor]:
        """Place of each stored parameter, by its name; a ``UserError`` if there are no safetensors files."""
        raise UserError(f"{type(self).__name__} has no files by parameter: its family is loaded whole")

    def add_flow_map(self, network: nn.Module) -> None:
        """Make a flow map of a network: one that reads ``r``, and at first answers as before whatever ``r`` is."""
        raise UserError(f"{type(self).__name__} has no flow maps: its networks take one time, not two")

    @abstractmethod
    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """Write a complete model folder with ``network`` in it and ``recipe`` beside it as ``recipe.json``.

        ``slim``: what is not changed is a link to where it is, instead of stored again.
        """

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """Networks beside the trained one on the meta device: ``text encoder`` and ``VAE``, those that there are."""
        return {}


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

    @property
    def feature_widths(self) -> tuple[int, ...]:
        return ()

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps, *, whole: bool = False
    ) -> tuple[Tensor | None, Tokens]:
        raise UserError(f"{type(self).__name__} has no features to tap: a family names its blocks and their widths")


def check_taps(taps: Taps, widths: Sequence[int], family: str) -> None:
    """Check that every tap is a block of the network; ``widths`` are those of all blocks."""
    wrong = [tap for tap in taps if not 0 <= tap < len(widths)]
    if wrong or not taps:
        raise UserError(f"taps {list(taps)}: blocks 0 to {len(widths) - 1} of {family} can be tapped, at least one")
