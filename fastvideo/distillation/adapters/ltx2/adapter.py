"""LTX-2 (arXiv 2601.03233) over diffusers: ``LTX2VideoTransformer3DModel``, Gemma 3, autoencoders of video and sound.

One network makes a video and its sound together, in two streams of tokens that attend to each other, at one time: it is
rectified flow natively, and its time counts to 1000. A sample is one flat state of both parts (``parts.py``). Guidance
is that between two prompts; the guidance by skipped blocks and by parts alone of the stock pipeline is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, Mu
from fastvideo.distillation.adapters.diffusers.packing import Patches
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, PipelineSpec
from fastvideo.distillation.adapters.ltx2.codec import LTX2Codec
from fastvideo.distillation.adapters.ltx2.config import LTX2Config, parts_of
from fastvideo.distillation.adapters.ltx2.texts import AUDIO_TEXT, LTX2Texts, connectors_of
from fastvideo.distillation.noise import velocity_to_x0, x0_to_velocity
from fastvideo.distillation.types import UserError

TOKENS = Patches(1)
"""Layout of the video in the network: a token per latent pixel."""
KEYFRAMES = "keyframes_abs_pos_embedding"
"""Embedding of frames that are given, of which there are none."""


class LTX2Folder(FlowFolder[LTX2Config]):
    """An LTX-2 pipeline, whose sound is guided more than its video."""

    def __init__(self, pipeline: Pipeline[LTX2Config], tokens: int, mu: Mu) -> None:
        super().__init__(pipeline, tokens, mu)
        self._state = parts_of(pipeline)

    def rescale_guidance(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The sound's distance from the conditional prediction times the factor of its guidance; then the clean
        estimate of each part nearer to the deviation of the conditional one (arXiv 2305.08891, eq. 15 and 16)."""
        video, audio = self._state.split(guided)
        _, plain = self._state.split(conditional)
        guided = self._state.join([video, plain + self.config.audio_guidance_factor * (audio - plain)])
        if not self.config.guidance_rescale:
            return guided
        estimates = (self._state.split(velocity_to_x0(x_t, u, t)) for u in (guided, conditional))
        nearer = [self._rescaled(*pair) for pair in zip(*estimates, strict=True)]
        return x0_to_velocity(x_t, self._state.join(nearer), t)

    def _rescaled(self, guided: Tensor, conditional: Tensor) -> Tensor:
        share, (own, wanted) = self.config.guidance_rescale, (x.flatten(1).std(dim=1) for x in (guided, conditional))
        return guided * (1 - share + share * wanted / own).view(-1, *[1] * (guided.ndim - 1))

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """The connectors are a part of the text encoder; nothing decodes sound while a run trains."""
        found = dict(super().frozen_parts())
        with torch.device("meta"):
            found["text encoder"] = nn.ModuleList([found["text encoder"], connectors_of(self.pipeline)])
        return found

    def dead_parameters(self, network: Any) -> frozenset[str]:
        return frozenset(name for name, _ in network.named_parameters() if name == KEYFRAMES)


class LTX2Adapter(FlowAdapter[LTX2Config]):
    """The LTX-2 family."""

    Config = LTX2Config
    summary = "LTX-2, videos with sound from text: rectified flow on both in one state, Gemma 3 text"
    supports = FlowAdapter.supports - {"flow_map"}
    time_units = 1000.0
    _codec, _texts = LTX2Codec, LTX2Texts
    _spec = PipelineSpec(
        network="LTX2VideoTransformer3DModel",
        vae="AutoencoderKLLTX2Video",
        text_encoder="Gemma3ForConditionalGeneration",
        time_embedding="time_embed.emb.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=3.0,
    )

    @staticmethod
    def mu(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Linear in the number of the video's tokens, with LTX-Video's ends."""
        from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift

        ends = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
        return float(calculate_shift(tokens, *(scheduler.get(name, value) for name, value in ends.items())))

    @cached_property
    def folder(self) -> LTX2Folder:
        video, _ = parts_of(self._pipeline).members
        return LTX2Folder(self._pipeline, TOKENS.tokens(video.shape), self.mu)

    def _tokens(self, x_t: Tensor, output: Any) -> Tensor:
        """Tokens of the video, then those of its sound, as wide and so often that both weigh alike in a mean."""
        video, audio = output
        narrower = video.shape[2] - audio.shape[2]
        if narrower < 0:
            raise UserError(
                f"model.path: {self.config.path}: the sound's tokens have {audio.shape[2]} channels and the video's "
                f"{video.shape[2]}: a discriminator takes no wider ones"
            )
        audio = nn.functional.pad(audio, (0, narrower))
        return torch.cat([video, audio.repeat(1, max(1, video.shape[1] // audio.shape[1]), 1)], dim=1)

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        parts = self.codec.parts
        assert parts is not None
        video, audio = parts.split(x)
        sizes = dict(zip(("num_frames", "height", "width"), video.shape[2:], strict=True))
        u, v = network(
            TOKENS.pack(video),
            audio,
            own[TEXT],
            self._input(network, own[AUDIO_TEXT]),
            time,
            sigma=time,
            **sizes,
            fps=self.config.frame_rate,
            audio_num_frames=audio.shape[1],
            use_cross_timestep=True,
            return_dict=False,
        )
        return parts.join([TOKENS.unpack(u, video.shape), v])
