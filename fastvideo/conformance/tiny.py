"""Tiny pipelines of random weights, made in a second and offline: real classes, whose numbers mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo.distillation.adapters.diffusers.pipeline import without_progress_bar
from fastvideo.distillation.rng import normal, seeded
from fastvideo.errors import UserError

WORDS = ("a", "green", "red", "seven", "three", "moving", "up", "left", "blurry")
"""Vocabulary of the tiny text encoders."""
LENGTH = 8
"""Tokens of a prompt."""
SPREAD = 0.02
"""Deviation of the noise on every parameter: zero layers of a fresh network would hide mistakes behind them."""


def tiny_options(family: str, folder: Path) -> dict[str, Any]:
    """The ``model`` section of a tiny pipeline of the family: one that ships, or one that is written to ``folder``.

    Raises:
        UserError: for a family without one.
    """
    if family in SHIPPED:
        return dict(SHIPPED[family])
    if family not in MADE:
        raise UserError(f"--tiny: {family} has no tiny pipeline; {', '.join([*SHIPPED, *MADE])} have")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = MADE[family]()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                perturb(part.eval())
        _save(pipeline, folder)
    return {"path": str(folder), "height": 16, "width": 32, "max_sequence_length": LENGTH}


def _save(pipeline: Any, folder: Path) -> None:
    with without_progress_bar():
        pipeline.save_pretrained(folder)


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Add noise to every parameter."""
    stream = seeded(0)
    for parameter in module.parameters():
        parameter += SPREAD * normal(tuple(parameter.shape), stream)


def word_tokenizer() -> Any:
    """A tokenizer of :data:`WORDS`, with an end and without a start."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )


def _clip(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=32, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _autoencoder(scale: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=scale,
    )  # fmt: skip


def _unet(cross_attention_dim: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), cross_attention_dim=cross_attention_dim, use_linear_projection=True, **options,
    )  # fmt: skip


BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Noise levels of SDXL and Stable Diffusion 1.5."""


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return StableDiffusionXLPipeline(
        vae=_autoencoder(0.13025),
        text_encoder=_clip(projected=False),
        text_encoder_2=_clip(projected=True),
        tokenizer=word_tokenizer(),
        tokenizer_2=word_tokenizer(),
        unet=_unet(64, projection_class_embeddings_input_dim=80, transformer_layers_per_block=(1, 1), **added),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd15() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_autoencoder(0.18215),
        text_encoder=_clip(projected=False),
        tokenizer=word_tokenizer(),
        unet=_unet(32),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "wan": {"path": "tiny"},
    "cogvideox": {"path": "tiny_cogvideox"},
    "analytic": {},
}
"""Options of families whose tiny model is a part of this package."""
MADE: Mapping[str, Callable[[], Any]] = {"sdxl": _sdxl, "sd15": _sd15}
"""Stock pipelines of the other families."""
