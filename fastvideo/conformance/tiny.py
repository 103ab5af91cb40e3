"""Tiny pipelines of random weights, made in a second and offline: real classes, whose numbers mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo.conformance import tiny_flow, tiny_sound
from fastvideo.conformance.tiny_parts import LENGTH, autoencoder, clip, word_tokenizer
from fastvideo.distillation.adapters.diffusers.pipeline import without_progress_bar
from fastvideo.distillation.rng import normal, seeded
from fastvideo.errors import UserError

SPREAD = 0.02
"""Deviation of the noise on every parameter: zero layers of a fresh network would hide mistakes behind them."""


def tiny_options(family: str, folder: Path) -> dict[str, Any]:
    """The ``model`` section of a tiny pipeline of the family: one that ships, or one that is written to ``folder``.

    Raises:
        UserError: for a family without one.
    """
    if family in SHIPPED:
        return dict(SHIPPED[family])
    if ":" in family:
        raise UserError(
            f"--tiny makes pipelines of the project's families. For {family} write one of diffusers' classes "
            f"by fastvideo.conformance.tiny.save_tiny, and give its folder: --set path=FOLDER height=16 width=32"
        )
    if family not in MADE:
        raise UserError(f"--tiny: {family} has no tiny pipeline; {', '.join([*SHIPPED, *MADE])} have")
    if folder.is_dir():  # made before
        return made_options(family, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_tiny(MADE[family].make(), folder)
    return made_options(family, folder)


def made_options(family: str, folder: Path) -> dict[str, Any]:
    """The ``model`` section of a tiny pipeline that lies in ``folder``."""
    made = MADE[family]
    return {"path": str(folder), **made.sizes, "max_sequence_length": made.length}


def save_tiny(pipeline: Any, folder: Path) -> None:
    """Write a diffusers pipeline of tiny random parts, with noise on every parameter, for the checks of a family."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            perturb(part.eval())
    with without_progress_bar():
        pipeline.save_pretrained(folder)


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Add noise to every parameter."""
    stream = seeded(0)
    for parameter in module.parameters():
        parameter += SPREAD * normal(tuple(parameter.shape), stream)


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
        vae=autoencoder(0.13025),
        text_encoder=clip(projected=False),
        text_encoder_2=clip(projected=True),
        tokenizer=word_tokenizer(),
        tokenizer_2=word_tokenizer(),
        unet=_unet(64, projection_class_embeddings_input_dim=80, transformer_layers_per_block=(1, 1), **added),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd15() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder(0.18215),
        text_encoder=clip(projected=False),
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


@dataclass(frozen=True)
class Tiny:
    """A stock pipeline of tiny parts.

    Attributes:
        make: makes it.
        length: tokens of its prompts.
        sizes: of its samples.
    """

    make: Callable[[], Any]
    length: int = LENGTH
    sizes: Mapping[str, int] = field(default_factory=lambda: {"height": 16, "width": 32})


SOUNDING: Mapping[str, int] = {"height": 64, "width": 96, "num_frames": 9}
"""Sizes of videos with sound: a decoder that reflects its borders needs two latent pixels on a side."""
MADE: Mapping[str, Tiny] = {
    "sdxl": Tiny(_sdxl),
    "sd15": Tiny(_sd15),
    "qwen_image": Tiny(tiny_flow.qwen_image, 24),
    "z_image": Tiny(tiny_flow.z_image, 12),
    "flux2": Tiny(tiny_flow.flux2, 12),
    "flux2-dev": Tiny(tiny_flow.flux2_dev, 48),
    "flux": Tiny(tiny_flow.flux, 12),
    "krea2": Tiny(tiny_flow.krea2, 24),
    "sd3": Tiny(tiny_flow.sd3, 12),
    "ltx": Tiny(tiny_flow.ltx, 12, {"height": 32, "width": 64, "num_frames": 9}),
    "hunyuan15": Tiny(tiny_flow.hunyuan15, 24, {"height": 16, "width": 32, "num_frames": 5}),
    "ltx2": Tiny(tiny_sound.ltx2, 12, SOUNDING),
    "ltx2-2.3": Tiny(partial(tiny_sound.ltx2, later=True), 12, SOUNDING),
    "kandinsky5": Tiny(tiny_flow.kandinsky5, 40, {"height": 32, "width": 64, "num_frames": 5}),
}
"""Pipelines of the other families, and of variants of a family, which stand behind a dash."""


def family_of(name: str) -> str:
    """The family of a name in :data:`MADE`."""
    return name.partition("-")[0]
