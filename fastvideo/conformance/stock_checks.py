"""Rule: stock diffusers makes the same video from the same noise."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastvideo.conformance.subject import NotApplicable, Subject, check, require
from fastvideo.distillation.adapters.export.base import StockSampler
from fastvideo.distillation.config.base import AdapterConfig
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample

STEPS, SEED = 4, 2
TOLERANCE = 2 / 255
"""Largest difference of a pixel in [0, 1]."""


@check("velocity(), codec.decode(), conditioner.encode_prompts(), Exporter.stock_sampler()")
def stock_diffusers_makes_the_same_video(subject: Subject) -> None:
    adapter = subject.adapter
    if not adapter.Config.pipelines:
        raise NotApplicable("the family has no diffusers pipeline")
    stock = load_exporter(adapter.config).stock_sampler(adapter.folder.teacher_times(STEPS), "euler")
    condition = adapter.conditioner.encode_prompts(subject.prompts[:1]) | subject.first_frames(1)
    denoiser, sampler = Denoiser(adapter, subject.network), SamplerSpec.teacher(stock.times, 1.0)
    latents = sample(denoiser, SampleNoise([SEED], adapter.device), adapter.codec.latent_shape, sampler, condition)
    ours = (adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2
    theirs = stock_video(subject, stock, SampleNoise([SEED], adapter.device).draw(adapter.codec.latent_shape))
    require(ours.shape == theirs.shape, f"ours {tuple(ours.shape)}, stock {tuple(theirs.shape)}")
    worst = float((ours.cpu() - theirs).abs().max())
    require(worst <= TOLERANCE, f"pixels differ by up to {worst:.4f} after {STEPS} steps, {TOLERANCE:.4f} is allowed")


def stock_video(subject: Subject, stock: StockSampler, noise: Tensor) -> Tensor:
    """``[1, 3, T, H, W]`` in ``[0, 1]`` from the stock pipeline over the adapter's own folder."""
    import diffusers

    adapter = subject.adapter
    folder = subject.folder / "stock"
    adapter.folder.save(folder, subject.network, {})
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(adapter.device)
    image = _image(subject, type(pipeline))
    pipeline.scheduler = stock.scheduler
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=subject.prompts[0],
        latents=load_exporter(adapter.config).stock_latents(noise),
        num_inference_steps=len(stock.times),
        guidance_scale=1.0,
        output_type="pt",
        **image,
        **_sizes(adapter.config, type(pipeline)),
    )[0]
    images = made[:, None] if made.ndim == 4 else made
    return images.transpose(1, 2).float().cpu()  # type: ignore[no-any-return]


def _image(subject: Subject, pipeline: type[Any]) -> dict[str, Any]:
    """The first video's conditioning image, in the pipeline's form."""
    if subject.frames is None:
        return {}
    if subject.frames.shape[2] != 1 or "image" not in inspect.signature(pipeline.__call__).parameters:
        raise NotApplicable(f"{pipeline.__name__} does not take the model's conditioning frames")
    from diffusers.image_processor import VaeImageProcessor

    pixels = (subject.frames[0, :, 0].permute(1, 2, 0).cpu().numpy() + 1) / 2
    return {"image": VaeImageProcessor.numpy_to_pil(pixels)[0]}


def _sizes(config: AdapterConfig, pipeline: type[Any]) -> dict[str, Any]:
    """The config's sizes among the pipeline's arguments."""
    taken = inspect.signature(pipeline.__call__).parameters
    names = {"height", "width", "num_frames", "max_sequence_length"}
    return config.model_dump(include=names & set(taken))
