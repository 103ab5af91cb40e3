"""Abilities of a family's parts beyond their contract (``adapters/base.py``), which is all that a plain step calls.

A part inherits an ability and overrides what it can; the methods as they are here are the answers of a family without
it. Whoever uses one asks :func:`of_folder`, :func:`of_texts` or :func:`of_frames`, and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.scaling import StoredTensor
from fastvideo.distillation.types import Condition, RawBatch, UserError

AbilityT = TypeVar("AbilityT")
Shape = tuple[int | None, ...]
"""Shape of one stored sample; ``None`` fits any size."""


def _asked(part: object, ability: type[AbilityT]) -> AbilityT:
    """``part`` with its ability, or the answers of a family without it.

    Raises:
        TypeError: for a part with methods of an ability that it does not inherit: nobody would call them.
    """
    if isinstance(part, ability):
        return part
    if stray := sorted(name for name in {*vars(ability)} & {*dir(type(part))} if name[0] != "_"):
        raise TypeError(f"{type(part).__name__} has {', '.join(stray)}: inherit {ability.__name__} from {__name__} too")
    return ability()


class FolderAbilities:
    """Model folder with kernels, guidance of its own, two experts, networks without weights or flow maps."""

    trained_side: int | None = None
    """Side in pixels of the pictures that an image family's network was trained on."""

    @property
    def noisiest(self) -> float:
        """Latest time that the family's networks know: 1, pure noise, or where a table of noise levels ends before."""
        return 1.0

    @cached_property
    def kernels(self) -> str:
        """Kernels that compute the network, in one line for the log."""
        return "torch"

    def check_kernels(self, *, trained: bool) -> None:
        """Check that this device has the kernels that the config names, for networks that are ``trained``.

        Raises:
            UserError: for one that it does not have, or that has no gradient.
        """

    def counting(self, add: Callable[[int], None]) -> AbstractContextManager[None]:
        """Give ``add`` the floating point operations that torch's counter does not see, of all calls inside."""
        return nullcontext()

    def recipe_of(self, path: str | None) -> Mapping[str, Any]:
        """``recipe.json`` of a folder with a network of the family; empty if it has none. ``None`` is the run's own."""
        return {}

    def check_guidance(self, guidance: GuidanceValue) -> None:
        """Refuse a guidance (1 is none) that the family's networks are not sampled with; called before a run."""
        return None

    def dead_parameters(self, network: nn.Module) -> frozenset[str]:
        """Names of parameters that no velocity depends on, such as those of a text stream behind its last use."""
        return frozenset()

    def boundary(self, path: str | None = None) -> float | None:
        """Time at which the network of ``load_network`` changes experts; ``None`` for one network at all times."""
        return None

    def empty(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """The network of ``load_network`` with parameters on the meta device, without memory, and real buffers."""
        raise UserError("networks without weights: the family is loaded whole")

    def files(self, path: str | None) -> Mapping[str, StoredTensor]:
        """Place of each stored parameter, by its name; a ``UserError`` if there are no safetensors files."""
        raise UserError("files by parameter: the family is loaded whole")

    def from_file(self, path: str | None) -> nn.Module | None:
        """The network of one file in any layout, on the host in float32; ``None`` where :meth:`files` finds them."""
        return None

    def load_gguf(self, path: str, dtype: torch.dtype, where: str) -> nn.Module:
        """The network of a ``.gguf`` file, whose matrices stay as they are and are multiplied out to ``dtype`` for a
        call; ``where`` is the config's key."""
        raise UserError(f"{where}: the family reads no .gguf files")

    def check_gguf(self, path: str, where: str) -> None:
        """Refuse what :meth:`load_gguf` cannot read: another family or size, a missing package; reads no weights."""
        raise UserError(f"{where}: the family reads no .gguf files")

    def gguf_sizes(self, network: nn.Module, path: str) -> Mapping[Tensor, int]:
        """Bytes of those parameters of an empty network that :meth:`load_gguf` stores in another way."""
        return {}

    def add_flow_map(self, network: nn.Module) -> None:
        """Make a flow map of a network: one that reads ``r``, and at first answers as before whatever ``r`` is."""
        raise UserError("the family has no flow maps: its networks take one time, not two")

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """Networks beside the trained one on the meta device: ``text encoder`` and ``VAE``, those that there are."""
        return {}


def of_folder(folder: object) -> FolderAbilities:
    """The abilities of a ``ModelFolder``."""
    return _asked(folder, FolderAbilities)


class StoredTexts:
    """Conditioner whose texts a dataset may store, and whose text encoder a run can release."""

    @property
    def text_settings(self) -> Mapping[str, Any]:
        """Values that a stored text depends on besides its prompt; empty for a family whose texts are not stored."""
        return {}

    def encode_texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text ``[L, D]`` of each prompt as a dataset stores it, on the host in the encoder's dtype, without padding.

        The prompts go through the encoder together.
        """
        raise UserError("the family has no text encoder whose embeddings could be stored")

    def missing_texts(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that only a text encoder could encode."""
        return []

    def hold_texts(self, texts: Mapping[str, Tensor]) -> None:
        """Take texts of :meth:`encode_texts` by prompt: ``encode_prompts`` uses them from now on."""
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

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        """Shape of one sample of each condition that can be computed beforehand, by its name in a dataset.

        ``text_embedding`` is optional in a dataset (captions are encoded instead), all others are not.
        """
        return {}

    def encode_stored(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """All of :attr:`stored_shapes`, for videos ``[B, 3, T, H, W]`` and their captions, batched."""
        return {}


def of_texts(conditioner: object) -> StoredTexts:
    """The abilities of a ``Conditioner`` with texts that are stored."""
    return _asked(conditioner, StoredTexts)


class FirstFrames:
    """Conditioner of a model that goes on from conditioning frames."""

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


def of_frames(conditioner: object) -> FirstFrames:
    """The abilities of a ``Conditioner`` that takes frames."""
    return _asked(conditioner, FirstFrames)


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


@runtime_checkable
class StreamCodec(Protocol):
    """Codec that decodes streams."""

    def frame_decoder(self) -> FrameDecoder:
        """A decoder for the chunks of one stream."""
        ...


def frame_decoder(codec: object) -> FrameDecoder:
    """A decoder for the chunks of one stream.

    Raises:
        UserError: for a family that decodes whole videos only.
    """
    if not isinstance(codec, StreamCodec):
        raise UserError(f"{type(codec).__name__} decodes whole videos: this family has no streams")
    return codec.frame_decoder()


@runtime_checkable
class RawCodec(Protocol):
    """Codec of a family whose published datasets hold the VAE's raw latents."""

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise raw latents, on any device."""
        ...


def normalised(codec: object, latents: Tensor) -> Tensor:
    """Raw latents of a family's VAE as its codec encodes them.

    Raises:
        UserError: for a family that reads no such datasets.
    """
    if not isinstance(codec, RawCodec):
        raise UserError(f"{type(codec).__name__} cannot normalise raw latents: preprocess the videos with this project")
    return codec.normalise(latents)
