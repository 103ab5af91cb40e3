"""Wan's autoencoder frame by frame: streams without seams, and single frames with the gradient of their own latent."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline
from fastvideo.distillation.adapters.wan import WanCodec
from fastvideo.distillation.adapters.wan_family.inputs import NetworkInputs
from fastvideo.distillation.frames import latent_frame


class WanFrameCodec(WanCodec):
    """``AutoencoderKLWan``, whole or frame by frame."""

    def __init__(self, pipeline: Pipeline[Any], inputs: NetworkInputs) -> None:
        super().__init__(pipeline)
        self.inputs = inputs

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, F, H, W)`` of one sample.

        Raises:
            UserError: if the checkpoint does not take the configured size or conditioning frames.
        """
        self.inputs.check(self.pipeline)
        return super().latent_shape

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        """Diffusers' decode clamps its pixels, and a clamp stops the gradient of saturated ones."""
        return WanFrameDecoder(self).unclamped(latents) if gradient else super().decode(latents)

    def decode_frames(self, latents: Tensor, picks: Sequence[Sequence[int]], *, recompute: bool = False) -> Tensor:
        """One latent frame at a time: the past of a picked one is decoded without gradient, and leaves its caches."""
        decoder, rows, found = WanFrameDecoder(self), list(range(len(latents))), dict[tuple[int, int], Tensor]()
        places = [[latent_frame(frame, self.temporal) for frame in own] for own in picks]
        gradient = torch.is_grad_enabled() and latents.requires_grad
        for number in range(max(map(max, places)) + 1):
            frame = latents[rows, :, number : number + 1]
            wanted = [place for place, row in enumerate(rows) if number in places[row]]
            later = [place for place, row in enumerate(rows) if max(places[row]) > number]
            if not gradient:
                pixels = decoder.unclamped(frame)[wanted]
            elif wanted:
                ahead = decoder.rows(wanted).ahead
                pixels = checkpoint(ahead, frame[wanted], use_reentrant=False) if recompute else ahead(frame[wanted])
            first = 1 + (number - 1) * self.temporal if number else 0
            for at, row in enumerate(rows[place] for place in wanted):
                own = [pick for pick in picks[row] if latent_frame(pick, self.temporal) == number]
                found |= {(row, pick): pixels[at, :, pick - first] for pick in own}
            decoder, rows = decoder.rows(later), [rows[place] for place in later]
            if rows and gradient:
                decoder(frame[later])
        return torch.stack([torch.stack([found[row, pick] for pick in own], 1) for row, own in enumerate(picks)])

    def frame_decoder(self) -> WanFrameDecoder:
        return WanFrameDecoder(self)


class WanFrameDecoder:
    """``AutoencoderKLWan.decode``, one latent frame at a time, that owns the caches of the causal convolutions.

    So streams do not disturb each other or a decode of whole videos, and there are no seams between chunks.
    """

    def __init__(self, codec: WanFrameCodec) -> None:
        self.codec, self._first = codec, True
        self._mean, self._std = codec.statistics(codec.device)
        self._cache: list[Any] = [None] * _causal_convolutions(codec.vae.decoder)

    @property
    def bytes(self) -> int:
        tensors = (value for value in self._cache if isinstance(value, Tensor))
        return sum(value.numel() * value.element_size() for value in tensors)

    def fork(self) -> WanFrameDecoder:
        other = copy.copy(self)
        other._cache = list(self._cache)  # a decode replaces the tensors in it and writes to none
        return other

    def rows(self, index: Sequence[int]) -> WanFrameDecoder:
        """A decoder that goes on from the state of some samples."""
        other = self.fork()
        other._cache = [value[list(index)] if isinstance(value, Tensor) else value for value in self._cache]
        return other

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        return self.unclamped(latents).clamp(-1.0, 1.0)

    def ahead(self, latents: Tensor) -> Tensor:
        """Frames of :meth:`unclamped`, as often as asked: this decoder stays where it is."""
        return self.fork().unclamped(latents)

    def unclamped(self, latents: Tensor) -> Tensor:
        """Frames as the network makes them, with gradient to the latents."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae, pieces = self.codec.vae, []
        for frame in vae.post_quant_conv(latents * self._std + self._mean).split(1, dim=2):
            pieces.append(vae.decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first))
            self._first = False
        video, patch = torch.cat(pieces, dim=2), vae.config.patch_size
        return video if patch is None else unpatchify(video, patch_size=patch)


def _causal_convolutions(network: nn.Module) -> int:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in network.modules())
