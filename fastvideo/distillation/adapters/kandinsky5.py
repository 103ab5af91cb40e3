"""Kandinsky 5 (arXiv 2511.14993) over diffusers: ``Kandinsky5Transformer3DModel``, HunyuanVideo's VAE, Qwen2.5-VL.

The network is rectified flow natively; its time counts to 1000 and its latents have their channels last. It sees all
tokens of a text, without a mask, and those of the prompt alone: each sample is a call of its own. (The stock pipeline
lets the shorter of several prompts see padding.) It rounds queries and keys to bfloat16: no derivative is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowFolder
from fastvideo.distillation.adapters.diffusers.flow_config import StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts, lengths
from fastvideo.distillation.adapters.diffusers.packing import Packing
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.distillation.adapters.diffusers.videos import FlowVideoConfig, OneByOneAdapter, ScaledVideoCodec, Volumes
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Frames, Pixels, Tokens

POOLED = "pooled_prompt_embeds"
"""Name of the pooled text in a condition."""


class Kandinsky5Config(FlowVideoConfig):
    """Options of the Kandinsky 5 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("Kandinsky5T2VPipeline",)
    packing: ClassVar[Packing] = Volumes(2, channels_last=True)
    stock: ClassVar[StockCall] = StockCall(
        packed=True, sigmas=False, images=False, sizes=("height", "width", "num_frames", "max_sequence_length")
    )
    path: str
    """A diffusers Kandinsky 5 pipeline for videos from text: a folder, or a hub id."""
    height: Pixels = 512
    """Video height in pixels."""
    width: Pixels = 768
    """Video width in pixels."""
    num_frames: Frames = 121
    """Video frames; one more than a multiple of 4."""
    max_sequence_length: Tokens = 512
    """Tokens that a prompt may have."""
    prompt_for_negative: str = (
        "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
        "walking backwards"
    )
    """The negative prompt, used wherever guidance is; by default the authors'."""


class Kandinsky5Conditioner(FlowTexts[Kandinsky5Config]):
    """Qwen2.5-VL's tokens behind the template's head, masked, and CLIP's pooled text."""

    encodes_padding = False
    whole_prompts = ("",)
    width_field = "in_text_dim"

    @property
    def pooled(self) -> Mapping[str, int]:
        return {POOLED: self.pipeline.network_config()["in_text_dim2"]}

    def clean_prompt(self, prompt: str) -> str:
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

        return str(self._stock.prompt_template.format(prompt_clean(prompt)))

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        dropped: int = self._stock.prompt_template_encode_start_idx
        return [count - dropped for count in super().token_counts(prompts)]

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        options = {"device": self.device, "max_sequence_length": self.config.max_sequence_length}
        found = [stock.encode_prompt(prompt, **options) for prompt in prompts]  # one by one: the encoder sees no mask
        return [tokens[0] for tokens, *_ in found], [torch.cat([pooled for _, pooled, _ in found])]


class Kandinsky5Folder(FlowFolder[Kandinsky5Config]):
    """A Kandinsky 5 pipeline, which leaves the noise levels to its scheduler."""

    @property
    def head_width(self) -> int:
        return sum(self.pipeline.network_config()["axes_dims"])

    def grid(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def _parts(self, path: str | None) -> tuple[str, ...]:
        kind = self.pipeline.network_config(path)["attention_type"]
        if kind != "regular":
            raise UserError(
                f"attention_type {kind!r} of the transformer in {path or self.config.path}: sparse attention is not "
                f"offered; take a checkpoint with 'regular', such as one of 5 seconds"
            )
        return super()._parts(path)


class Kandinsky5Adapter(OneByOneAdapter[Kandinsky5Config]):
    """The Kandinsky 5 family."""

    Config = Kandinsky5Config
    summary = "Kandinsky 5, videos from text: rectified flow, Qwen2.5-VL and CLIP text"
    supports = OneByOneAdapter.supports - {"jvp"} | {"frames"}
    time_units = 1000.0
    _codec, _texts, _folder = ScaledVideoCodec, Kandinsky5Conditioner, Kandinsky5Folder
    _spec = PipelineSpec(
        network="Kandinsky5Transformer3DModel",
        vae="AutoencoderKLHunyuanVideo",
        text_encoder="Qwen2_5_VLForConditionalGeneration",
        time_embedding="time_embeddings",
        blocks="visual_transformer_blocks",
        published_guidance=5.0,
    )

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        config = self._pipeline.network_config()
        return (int(config["model_dim"]),) * int(config["num_visual_blocks"])

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        (length,), device = lengths(own[MASK]), x.device
        plain = all(480 <= side <= 854 for side in (self.config.height, self.config.width))  # sides of 480p
        return network(  # type: ignore[no-any-return]
            nn.functional.pad(x, (0, shape[1] + 1)) if network.config.visual_cond else x,  # no frames are given
            own[TEXT][:, :length],
            time,
            self._input(network, own[POOLED]),
            [torch.arange(size, device=device) for size in (shape[2], shape[3] // 2, shape[4] // 2)],
            torch.arange(length, device=device),
            scale_factor=(1, 2, 2) if plain else (1, 3.16, 3.16),
            return_dict=False,
        )
