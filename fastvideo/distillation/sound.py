"""``Sound``: what some families make beside pictures, and the part of their codecs that knows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """Waveforms ``[B, channels, samples]`` in ``[-1, 1]``, float32, and their samples per second."""

    waveform: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        return self.waveform.shape[-1] / self.rate


class SoundingCodec(ABC):
    """The part of a family's codec that knows of sound, for a family that makes videos with it."""

    @property
    @abstractmethod
    def sounding_rate(self) -> float:
        """Frames per second at which videos and their sound are of one length."""

    @property
    @abstractmethod
    def sound_format(self) -> tuple[int, int]:
        """Samples per second and channels of sounds that are encoded."""

    @abstractmethod
    def decode_sound(self, latents: Tensor) -> Sound:
        """Sound of normalised latents, without gradient."""

    @abstractmethod
    def with_sound(self, latents: Tensor, sound: Sound) -> Tensor:
        """Latents of videos, with those of their sound instead of silence."""
