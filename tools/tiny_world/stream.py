"""The pipeline of the streaming world: the shipped one, trained on until it holds for videos of any length.

Causal convolutions that only saw nine frames never saw full caches: the shipped VAE is at 20.7 dB on 129 frames, where
it is at 36.1 dB on nine. Videos of 33 frames teach it their own length and no more (docs/log.md); streams teach it the
rest.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from fastvideo.evaluation.streams.reconstruction import BLOCK, psnr, psnr_by_block
from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.world import torus
from tools.tiny_world import teacher
from tools.tiny_world.pipeline import save_half
from tools.tiny_world.recipe import TextRecipe, VaeRecipe
from tools.tiny_world.stream_vae import SharpStreamRecipe, StreamVaeRecipe, fit_on_streams, sharpen_on_streams
from tools.tiny_world.train_vae import WAN, fit_vae
from tools.tiny_world.vae import encode_moments

CONFIG = teacher.CONFIG.with_name("tiny_wan_causal_sft.yaml")
GUIDANCE = 4.0  # the best of: fastvideo evaluate FOLDER:25 --long 33 --prompts 256 --guidance G, for G in 3, 4
STEPS = 12  # as good as 25, and fast enough for `fastvideo live` on one core


@dataclass(frozen=True)
class StreamRecipe:
    """Training of the streaming pipeline.

    Attributes:
        vae: encoder and decoder together on 33 frames, from the shipped weights; half of the steps see 17.
        streams: both, on streams of up to 129 frames.
        sharpen: the decoder alone on such streams, with fixed latents.
        longest_axis: positions in the network's own table, for bidirectional calls; causal calls compute theirs.
        report_videos, report_frames: held-out videos behind the printed figures, and their length.
    """

    vae: VaeRecipe = field(
        default_factory=lambda: VaeRecipe(
            steps=2400, batch_size=8, muon_rate=3e-3, adam_rate=1.5e-3, short_frames=17, short_share=0.5, seed=21
        )
    )
    streams: StreamVaeRecipe = field(default_factory=StreamVaeRecipe)
    sharpen: SharpStreamRecipe = field(default_factory=SharpStreamRecipe)
    longest_axis: int = 1024
    report_videos: int = 64
    report_frames: int = 129


def vae_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Train the shipped VAE on long videos, then on streams, and save it; returns its quality."""
    vae = fit_vae(WAN.load(PIPELINE_FOLDER / "vae"), recipe.vae, torus("train"))
    save_half(fit_on_streams(vae.requires_grad_(True), recipe.streams), out / "pipeline" / "vae")
    return reconstruction(vae, recipe)


def decoder_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Train the decoder of the VAE in ``out`` and save it; returns the quality of the VAE then."""
    vae = sharpen_on_streams(WAN.load(out / "pipeline" / "vae"), recipe.sharpen)
    save_half(vae, out / "pipeline" / "vae")
    return reconstruction(vae, recipe)


def network_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Copy the other parts of the shipped pipeline, whose network knows captions and motion already."""
    shutil.copytree(PIPELINE_FOLDER, out / "pipeline", ignore=shutil.ignore_patterns("vae"), dirs_exist_ok=True)
    file = out / "pipeline" / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"rope_max_seq_len": recipe.longest_axis}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {}


def teacher_stage(out: Path, recipe: StreamRecipe) -> dict[str, float]:
    """Train the network as an autoregressive and as a bidirectional teacher, and install it; returns its last loss."""
    run = out / "teacher"
    teacher.distil(CONFIG, out / "pipeline", run, {})
    trained = json.loads((run / "student" / "recipe.json").read_text(encoding="utf-8"))
    recipe = teacher.sampling(GUIDANCE, TextRecipe(), trained["model"]["num_frames"])
    recipe |= {"sampling_steps": STEPS, "streaming": trained["streaming"]}
    teacher.install(run / "student", out / "pipeline", recipe)
    return {"loss": teacher.last_loss(run)}


@torch.no_grad()
def reconstruction(vae: AutoencoderKLWan, recipe: StreamRecipe) -> dict[str, float]:
    """PSNR in dB of reconstructed held-out videos: of all frames, and of each block of :data:`BLOCK` frames."""
    videos = torus("heldout", recipe.report_frames).sample(recipe.report_videos, seed=0).videos
    decoded = torch.cat([vae.decode(encode_moments(vae, part)[0]).sample for part in videos.split(8)])
    figures = {f"psnr_{BLOCK * i}": round(block, 2) for i, block in enumerate(psnr_by_block(decoded, videos))}
    return {"psnr": round(psnr(decoded, videos), 2), **figures}
