"""Model families at toy size: one factory per registered adapter, real classes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvideo.conformance.tiny import family_of, perturb, tiny_options
from fastvideo.conformance.tiny_parts import WORDS, word_tokenizer
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import load_adapter
from fastvideo.tests.cache import built


@dataclass(frozen=True)
class Family:
    """What the adapter contract needs of one family."""

    make: Callable[[Path], DistillAdapter[Any]]
    """The adapter over tiny weights under the given folder."""
    prompts: tuple[str, str]
    """Two different prompts that it understands."""


def analytic_family(folder: Path) -> AnalyticAdapter:
    """A mixture of two components over a non-square latent."""
    return AnalyticAdapter(AnalyticConfig(means=(-1.0, 1.0), stds=(0.3, 0.5), weights=(1, 2), shape=(2, 3, 4, 6)))


def wan_family(folder: Path) -> DistillAdapter[Any]:
    """A Wan pipeline with random weights: latents [4, 2, 2, 4], so no two dimensions can be confused."""
    from fastvideo.distillation.adapters.wan_family.adapter import WanFamily

    return WanFamily(wan_config(wan_folder(folder)))


def wan_config(folder: Path, **options: Any) -> Any:
    """16 x 32 pixels, 5 frames, prompts of up to 8 tokens."""
    from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig

    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    return WanFamilyConfig(path=str(folder), **{**size, **options})


def wan_folder(root: Path, latent_std: Sequence[float] = (0.5, 2.0, 1.5, 0.8)) -> Path:
    """A complete diffusers Wan pipeline of about 30 thousand parameters, built once under ``root``."""
    name = "-".join(["wan", *map(str, latent_std)])
    return built(root / "wan", name, partial(_save, partial(_wan_pipeline, latent_std), 0))


def _save(make: Callable[[], Any], seed: int, folder: Path) -> None:
    """Save the pipeline that ``make`` returns, initialised with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make().save_pretrained(folder)


def _wan_pipeline(latent_std: Sequence[float]) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    channels = len(latent_std)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, in_channels=channels,
        out_channels=channels, text_dim=16, freq_dim=16, patch_size=(1, 2, 2), cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(channels)], latents_std=list(latent_std),
    )  # fmt: skip
    return WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS) + 3, **sizes)).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


BOUNDARY = 0.875
"""Time between the two experts of :func:`experts_folder`, that of Wan 2.2 T2V."""


def experts_folder(root: Path) -> Path:
    """The pipeline of :func:`wan_folder` with a second network of other random weights, as Wan 2.2 A14B has it."""

    def write(folder: Path) -> None:
        from diffusers import WanPipeline

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            pipeline = WanPipeline.from_pretrained(wan_folder(root))
            low = type(pipeline.transformer).from_config(pipeline.transformer.config)
            for network in (pipeline.transformer, low):
                perturb(network)
            parts = {**pipeline.components, "transformer_2": low}
            WanPipeline(**parts, boundary_ratio=BOUNDARY).save_pretrained(folder)

    return built(root / "wan_experts", "wan_experts", write)


def cogvideox_family(folder: Path) -> DistillAdapter[Any]:
    """A CogVideoX pipeline with random weights and rotary positions: latents [4, 3, 2, 4]."""
    from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter

    return CogVideoXAdapter(cogvideox_config(cogvideox_folder(folder)))


def cogvideox_config(folder: Path, **options: Any) -> Any:
    """16 x 32 pixels, 9 frames, prompts of up to 8 tokens."""
    from fastvideo.distillation.adapters.cogvideox import CogVideoXConfig

    size = {"height": 16, "width": 32, "num_frames": 9, "max_sequence_length": 8}
    return CogVideoXConfig(path=str(folder), **{**size, **options})


COGVIDEOX_5B = {"use_rotary_positional_embeddings": True}
COGVIDEOX_2B = {"use_rotary_positional_embeddings": False}
COGVIDEOX_15 = {"use_rotary_positional_embeddings": True, "patch_size_t": 2}
"""What tells the published networks apart, but for their size."""


def cogvideox_folder(
    root: Path, network: Mapping[str, Any] = COGVIDEOX_5B, shift: float = 1.0, spacing: str = "trailing"
) -> Path:
    """A complete diffusers CogVideoX pipeline of about 60 thousand parameters, built once under ``root``."""
    name = "-".join(["cogvideox", *map(str, network.values()), str(shift), spacing])
    return built(root / name, name, partial(_save, partial(_cogvideox_pipeline, network, shift, spacing), 0))


def _cogvideox_pipeline(network: Mapping[str, Any], shift: float, spacing: str) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=4, text_embed_dim=16,
        time_embed_dim=16, sample_height=2, sample_width=4, sample_frames=9, max_text_seq_length=8, **network,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_height=16, sample_width=32, scaling_factor=0.7,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(WORDS) + 3, **sizes)).eval(),
        vae=vae,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=shift, clip_sample=False,
            timestep_spacing=spacing,
        ),
        transformer=transformer,
    )  # fmt: skip


def made_family(name: str, root: Path, **options: Any) -> DistillAdapter[Any]:
    """A family whose pipeline the conformance command makes: 16 x 32 pixels, latents [4, 1, 8, 16]."""
    family = load_adapter(family_of(name))
    return family(validate(family.Config, {**tiny_options(name, root / name), **options}, "test"))


LATER = ("z_image", "flux2", "flux", "krea2", "sd3", "ltx", "ltx2", "kandinsky5", "hunyuan15", "flux2-dev")
"""Families whose rules the slow suite checks: they share all but a file with one that the fast suite checks."""
FAMILIES = {
    "analytic": Family(analytic_family, ("0.5", "-1")),
    "cogvideox": Family(cogvideox_family, ("a green seven moving up", "red three")),
    "qwen_image": Family(partial(made_family, "qwen_image"), ("a green seven moving up", "red three")),
    "z_image": Family(partial(made_family, "z_image"), ("a green seven moving up", "red three")),
    "flux2": Family(partial(made_family, "flux2"), ("a green seven moving up", "red three")),
    "flux2-dev": Family(partial(made_family, "flux2-dev"), ("a green seven moving up", "red three")),
    "flux": Family(partial(made_family, "flux"), ("a green seven moving up", "red three")),
    "krea2": Family(partial(made_family, "krea2"), ("a green seven moving up", "red three")),
    "sd3": Family(partial(made_family, "sd3"), ("a green seven moving up", "red three")),
    "ltx": Family(partial(made_family, "ltx"), ("a green seven moving up", "red three")),
    "ltx2": Family(partial(made_family, "ltx2"), ("a green seven moving up", "red three")),
    "hunyuan15": Family(partial(made_family, "hunyuan15"), ('a green "seven" moving up', "red three")),
    "kandinsky5": Family(partial(made_family, "kandinsky5"), ("a green seven moving up", "red three")),
    "sd15": Family(partial(made_family, "sd15"), ("a green seven moving up", "red three")),
    "sdxl": Family(partial(made_family, "sdxl"), ("a green seven moving up", "red three")),
    "wan": Family(wan_family, ("a green seven moving up", "red three")),
}
