"""Tiny pipelines of videos with sound."""

from __future__ import annotations

from typing import Any

import torch

from fastvideo.conformance.tiny_parts import gemma3, word_tokenizer

MEL = 8
"""Bands of a tiny spectrogram; its latents have a quarter."""


def ltx2(later: bool = False) -> Any:
    """With ``later`` as LTX-2.3 has it: texts of two widths, modulated by the time, and gated attention."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    switches = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_type="split",
        use_prompt_embeddings=not later, **dict.fromkeys(switches, later),
    )  # fmt: skip
    connectors = {"attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": 2}
    heads = {"video": 2, "audio": 1 if later else 2}
    text = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32, rope_type="split",
        per_modality_projections=later, video_hidden_dim=16, audio_hidden_dim=8,
        **{f"{part}_connector_num_attention_heads": heads[part] for part in heads},
        **{f"{part}_connector_{name}": value for part in heads for name, value in connectors.items()},
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTX2Pipeline(
        scheduler=scheduler,
        vae=_video_autoencoder(),
        audio_vae=_audio_autoencoder(),
        text_encoder=gemma3(),
        tokenizer=word_tokenizer(1024),
        connectors=text,
        transformer=transformer,
        vocoder=_vocoder(),
    )


def _video_autoencoder() -> Any:
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, scaling_factor=1.25,
        spatial_compression_ratio=32, temporal_compression_ratio=8, decoder_causal=False,
    )  # fmt: skip
    vae.latents_mean.copy_(0.1 * torch.arange(4))
    vae.latents_std.copy_(0.5 + 0.2 * torch.arange(4))
    return vae


def _audio_autoencoder() -> Any:
    from diffusers import AutoencoderKLLTX2Audio

    vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=MEL, resolution=32
    )
    vae.latents_mean.copy_(0.2 * torch.arange(4) - 0.1)
    vae.latents_std.copy_(0.6 + 0.3 * torch.arange(4))
    return vae


def _vocoder() -> Any:
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    vocoder = LTX2Vocoder(
        in_channels=2 * MEL, hidden_channels=16, upsample_kernel_sizes=[20, 16], upsample_factors=[10, 8],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]], output_sampling_rate=8000,
    )  # fmt: skip
    vocoder.conv_out.weight.data *= 20  # loud enough to tell one sound from another
    return vocoder
