"""``Sound``: what some families make beside pictures, and the ability of their codecs."""

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


class SoundCodec(ABC):
    """Codec whose latents hold the sound of a video too."""

    @property
    @abstractmethod
    def sounding_rate(self) -> float:
        """Frames per second at which videos and their sound are of one length."""

    @property
    @abstractmethod
    def sound_format(self) -> tuple[int, int]:
        """Samples per second and channels of sounds that are encoded."""

    @abstractmethod
    def with_sound(self, latents: Tensor, sound: Sound) -> Tensor:
        """Latents of videos with those of their sound."""

    @abstractmethod
    def decode_sound(self, latents: Tensor) -> Sound:
        """Sound of normalised latents, without gradient."""
