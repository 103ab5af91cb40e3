"""Qwen-Image (arXiv 2508.02324) over diffusers: ``QwenImageTransformer2DModel``, Wan's autoencoder, Qwen2.5-VL.

The network is rectified flow natively, on 2 x 2 patches of latents whose statistics are those of Wan 2.1. Prompts stand
in a template, whose first 34 tokens are dropped behind the encoder. Guided predictions get the norm of the conditional
one, patch by patch, as in the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, parameters_of
from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts
from fastvideo.distillation.adapters.diffusers.image_codec import VideoStillsCodec
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec
from fastvideo.ranges import Pixels

UNUSED = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
"""Layers of the last block that make its text tokens, which nothing reads."""


class QwenImageConfig(FlowImageConfig):
    """Options of the Qwen-Image family."""

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    stock: ClassVar[StockCall] = StockCall(
        guidance="true_cfg_scale", packed=True, lora_layouts=("diffusers", "peft", "kohya", "comfy")
    )
    path: str
    """A diffusers Qwen-Image pipeline: a folder, or a hub id such as `Qwen/Qwen-Image`."""
    height: Pixels = 1328
    """Picture height in pixels."""
    width: Pixels = 1328
    """Picture width in pixels."""
    prompt_for_negative: str = " "
    """The negative prompt, used wherever guidance is; the authors' is a space."""


class QwenImageConditioner(FlowTexts[QwenImageConfig]):
    """Qwen2.5-VL tokens behind the template's head, masked."""

    encodes_padding = False

    def clean_prompt(self, prompt: str) -> str:
        return str(self._stock.prompt_template_encode.format(prompt))

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        dropped: int = self._stock.prompt_template_encode_start_idx
        return [count - dropped for count in super().token_counts(prompts)]

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        texts, mask = stock.encode_prompt(prompts, self.device, max_sequence_length=self.config.max_sequence_length)
        if mask is None:  # all of one length
            return texts, ()
        return [row[: int(used.sum())] for row, used in zip(texts, mask, strict=True)], ()


class QwenImageFolder(FlowFolder[QwenImageConfig]):
    """A Qwen-Image pipeline."""

    def rescale_guidance(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """With the norm of the conditional velocity, patch by patch."""
        packing, norm = self.config.packing, torch.linalg.vector_norm
        patches, wanted = packing.pack(guided), packing.pack(conditional)
        scale = norm(wanted, dim=-1, keepdim=True) / norm(patches, dim=-1, keepdim=True)
        return packing.unpack(patches * scale, guided.shape)

    def dead_parameters(self, network: Any) -> frozenset[str]:
        last = len(network.transformer_blocks) - 1
        return parameters_of(network, (f"transformer_blocks.{last}.{layer}" for layer in UNUSED))


class QwenImageAdapter(FlowAdapter[QwenImageConfig]):
    """The Qwen-Image family."""

    Config = QwenImageConfig
    summary = "Qwen-Image, stills from text: rectified flow, Qwen2.5-VL text, guidance of the conditional's norm"
    time_projection = ("time_text_embed.time_proj", 1.0)
    token_output = 1
    _codec, _texts, _folder = VideoStillsCodec, QwenImageConditioner, QwenImageFolder
    _spec = PipelineSpec(
        network="QwenImageTransformer2DModel",
        vae="AutoencoderKLQwenImage",
        text_encoder="Qwen2_5_VLForConditionalGeneration",
        time_embedding="time_text_embed.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=4.0,
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        sizes = [[(shape[2], shape[3] // 2, shape[4] // 2)]] * len(x)
        with torch.inference_mode(False):  # diffusers keeps these tables for all later calls
            network.pos_embed(sizes, max_txt_seq_len=own[TEXT].shape[1], device=x.device)
        given = {"encoder_hidden_states": own[TEXT], "encoder_hidden_states_mask": own[MASK]}
        return network(x, timestep=time, img_shapes=sizes, **given, return_dict=False)[0]  # type: ignore[no-any-return]
