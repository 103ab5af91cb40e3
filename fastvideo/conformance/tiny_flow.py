"""Tiny pipelines of flow families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastvideo.conformance.tiny_parts import (
    CHAT,
    LENGTH,
    autoencoder,
    clip,
    mistral3,
    qwen3,
    qwen3_vl,
    qwen25_vl,
    t5,
    word_tokenizer,
)

BY_SIZE: Mapping[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
"""Schedule of FLUX.1 and its kin: the shift grows with the size of the picture."""


def qwen_image() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        **{**BY_SIZE, "max_shift": 0.9, "max_image_seq_len": 8192}, shift_terminal=0.02, time_shift_type="exponential"
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=_video_autoencoder(),
        text_encoder=qwen25_vl(),
        tokenizer=word_tokenizer(2048),
        transformer=transformer,
    )


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.fill_(0.3)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(0.36, 0.12, levels=3),
        text_encoder=qwen3(lm_head=False),
        tokenizer=word_tokenizer(64),
        transformer=transformer,
    )


def flux2() -> Any:
    from diffusers import Flux2KleinPipeline

    parts = _flux2_parts(guidance_embeds=False)
    return Flux2KleinPipeline(text_encoder=qwen3(lm_head=True, layers=27), tokenizer=word_tokenizer(64), **parts)


def flux2_dev() -> Any:
    from diffusers import Flux2Pipeline

    parts = _flux2_parts(guidance_embeds=True)
    return Flux2Pipeline(text_encoder=mistral3(), tokenizer=word_tokenizer(64), **parts)


def _flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.copy_(0.1 * torch.arange(16))
    vae.bn.running_var.copy_(0.5 + 0.1 * torch.arange(16))
    return {"scheduler": FlowMatchEulerDiscreteScheduler(**BY_SIZE), "vae": vae, "transformer": transformer}


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**BY_SIZE),
        vae=autoencoder(1.5, 0.06),
        text_encoder=clip(projected=False),
        tokenizer=word_tokenizer(LENGTH),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(64),
        transformer=transformer,
    )


def _video_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.5, 0.8],
    )  # fmt: skip


def krea2() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**BY_SIZE, max_image_seq_len=6400),
        vae=_video_autoencoder(),
        text_encoder=qwen3_vl(),
        tokenizer=word_tokenizer(64),
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 2),
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=clip(projected=True),
        tokenizer=word_tokenizer(LENGTH),
        text_encoder_2=clip(projected=True),
        tokenizer_2=word_tokenizer(LENGTH),
        text_encoder_3=t5(64),
        tokenizer_3=word_tokenizer(64),
    )


def ltx(timed_decoder: bool = False) -> Any:
    """With ``timed_decoder`` the decoder reads a time, as from 0.9.1 on."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, timestep_conditioning=timed_decoder,
    )  # fmt: skip
    vae.latents_mean.copy_(0.1 * torch.arange(8))
    vae.latents_std.copy_(0.5 + 0.2 * torch.arange(8))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=t5(), tokenizer=word_tokenizer(64), transformer=transformer
    )


def kandinsky5(visual_cond: bool = True) -> Any:
    """With ``visual_cond`` the network also takes frames that are given, none here, as the published ones do."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        Kandinsky5T2VPipeline,
        Kandinsky5Transformer3DModel,
    )

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), visual_cond=visual_cond,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return Kandinsky5T2VPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen25_vl(heads=4),
        tokenizer=word_tokenizer(2048),
        text_encoder_2=clip(projected=False, length=77),
        tokenizer_2=word_tokenizer(77),
        transformer=transformer,
    )


def hunyuan15(guidance: float = 6.0) -> Any:
    """With a guidance of 1 the pipeline is one of a distilled checkpoint."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=12, rope_axes_dim=(2, 2, 4), task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16,) * 3, layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )  # fmt: skip
    tokenizer = word_tokenizer(2048)
    tokenizer.chat_template = "{{ 'a ' * 18 }}" + CHAT + " a a"  # a head of 108 tokens, and an end
    return HunyuanVideo15Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen25_vl(heads=4, layers=3).model.language_model,
        tokenizer=tokenizer,
        text_encoder_2=t5(vocabulary=384),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=guidance),
    )
