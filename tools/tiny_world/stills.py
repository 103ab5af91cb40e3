"""The tiny SDXL pipeline: stills of the sharp world, by an autoencoder, two random text encoders and a UNet.

It sees single frames alone, sharp ones, and so knows digits and colours and nothing of motion: the frame teacher of the
soft world.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fastvideo.tiny.captions import WORDS
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.paths import CLASSIFIER_FOLDER
from fastvideo.tiny.world import SIZE
from tools.tiny_world import teacher
from tools.tiny_world.pipeline import save_half, write_index
from tools.tiny_world.recipe import TextRecipe
from tools.tiny_world.stills_vae import StillsVaeRecipe, reconstruction, train_vae
from tools.tiny_world.text import build_tokenizer

CONFIG = teacher.CONFIG.with_name("tiny_sdxl_sft.yaml")
GUIDANCE = 3.0  # of 1, 2, 3 and 4 the one whose digits are right and whose stills are as sharp as real ones
STEPS = 25
# A second run starts from the averaged weights of the first: the digit is what is learnt last.
FURTHER = {
    "--method.decay-steps": "12000",
    "--method.time-shift": "2.0",
    "--trainer.max-steps": "12000",
    "--ema.decay": "0.999",
}
NUMBERS = 6  # sizes and corner that the network reads beside the pooled text
# Parts of the folder and the classes that stock `StableDiffusionXLPipeline.from_pretrained` loads them with.
PARTS = {
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "tokenizer_2": ("transformers", "PreTrainedTokenizerFast"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
OPTIONS = {"feature_extractor": (None, None), "image_encoder": (None, None), "force_zeros_for_empty_prompt": True}


@dataclass(frozen=True)
class UNetRecipe:
    """Size of the UNet; the `sft` method trains it.

    Attributes:
        widths: channels at 8 and 4 pixels a side; the second level alone has attention.
        groups: of every group normalisation.
        head_width: of attention.
        number_width: of the embedding of each size.
    """

    widths: tuple[int, ...] = (48, 64)
    groups: int = 8
    head_width: int = 16
    number_width: int = 8
    seed: int = 32


@dataclass(frozen=True)
class StillsRecipe:
    """All parts of the recipe; `report_stills`: held-out stills behind each printed figure.

    A text has 8 tokens, those of the longest caption; each encoder gives half of their width, as SDXL puts them side by
    side.
    """

    vae: StillsVaeRecipe = field(default_factory=StillsVaeRecipe)
    text: TextRecipe = field(default_factory=lambda: TextRecipe(width=32, max_length=8))
    unet: UNetRecipe = field(default_factory=UNetRecipe)
    report_stills: int = 2048


def vae_stage(out: Path, recipe: StillsRecipe) -> dict[str, float]:
    """Train and save the autoencoder; returns its quality on held-out stills."""
    save_half(train_vae(recipe.vae), out / "pipeline" / "vae")
    vae = AutoencoderKL.from_pretrained(out / "pipeline" / "vae", torch_dtype=torch.float32)
    return reconstruction(vae, TinyClassifier.load(CLASSIFIER_FOLDER), recipe.report_stills)


def text_stage(out: Path, recipe: StillsRecipe) -> dict[str, float]:
    """Save the tokenizers and two random text encoders."""
    for number, projected in (("", False), ("_2", True)):
        build_tokenizer(recipe.text).save_pretrained(out / "pipeline" / f"tokenizer{number}")
        build_clip(recipe.text, projected).save_pretrained(out / "pipeline" / f"text_encoder{number}")
    return {}


def network_stage(out: Path, recipe: StillsRecipe) -> dict[str, float]:
    """Save an untrained UNet, the scheduler and the pipeline's index."""
    save_half(build_unet(recipe), out / "pipeline" / "unet")
    build_scheduler().save_pretrained(out / "pipeline" / "scheduler")
    write_index(out / "pipeline", "StableDiffusionXLPipeline", {**OPTIONS, **PARTS})
    return {}


def teacher_stage(out: Path, recipe: StillsRecipe) -> dict[str, float]:
    """Train the UNet by the `sft` method and install it; returns its last loss."""
    first, run = out / "teacher-1", out / "teacher-2"
    length = {"--model.max-sequence-length": str(recipe.text.max_length)}
    teacher.distil(CONFIG, out / "pipeline", first, length)
    teacher.distil(CONFIG, out / "pipeline", run, {**length, **FURTHER, "--roles.student.path": str(first / "student")})
    unet = UNet2DConditionModel.from_pretrained(run / "student", subfolder="unet", torch_dtype=torch.float32)
    settings = teacher.sampling(GUIDANCE, recipe.text, frames=1) | {"sampling_steps": STEPS}
    teacher.install_network(unet, out / "pipeline", settings, part="unet")
    return {"loss": teacher.last_loss(run)}


def build_clip(recipe: TextRecipe, projected: bool) -> Any:
    """A frozen random CLIP: int64 token ids [B, L] to float32 [B, L, width] of about unit scale.

    SDXL reads the last layer but one, without its norm: words and positions start at unit scale.
    """
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.max_length,
        projection_dim=2 * recipe.width,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + projected)  # transformers initialises from the global generator only
        encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=1.0 if "token" in name else 0.3)
            elif parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return encoder.eval().requires_grad_(False)


def build_unet(recipe: StillsRecipe) -> UNet2DConditionModel:
    """The UNet before its training: `v` of latents [B, 4, 8, 8] given texts [B, 8, 64] and a pooled one [B, 64]."""
    unet, width = recipe.unet, 2 * recipe.text.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(unet.seed)  # module constructors only know the global generator
        return UNet2DConditionModel(
            sample_size=SIZE // 4,
            in_channels=recipe.vae.channels,
            out_channels=recipe.vae.channels,
            block_out_channels=unet.widths,
            layers_per_block=1,
            norm_num_groups=unet.groups,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=tuple(one // unet.head_width for one in unet.widths),
            cross_attention_dim=width,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1),
            addition_embed_type="text_time",
            addition_time_embed_dim=unet.number_width,
            projection_class_embeddings_input_dim=width + NUMBERS * unet.number_width,
        )


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise levels; `v` in place of noise, whose prediction says little about a sample at high noise."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
