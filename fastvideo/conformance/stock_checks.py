"""Rules: stock diffusers makes the same video from the same noise, with guidance too."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fastvideo.conformance.subject import NotApplicable, Subject, check, require
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.export.base import StockSampler
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.sound import SoundCodec
from fastvideo.distillation.types import UserError

STEPS, SEED, GUIDANCE = 4, 2, 3.0
TOLERANCE = 2 / 255
"""Largest difference of a pixel in [0, 1]."""


@check("velocity(), codec.decode(), conditioner.encode_prompts(), Exporter.stock_sampler()")
def stock_diffusers_makes_the_same_video(subject: Subject) -> None:
    require_same_video(subject, 1.0)


@check("velocity(), folder.rescale_guidance(), Exporter.guidance_arguments()")
def stock_diffusers_makes_the_same_guided_video(subject: Subject) -> None:
    try:
        of_folder(subject.adapter.folder).check_guidance(GUIDANCE)
    except UserError as reason:
        raise NotApplicable(str(reason)) from reason
    require_same_video(subject, GUIDANCE)


def require_same_video(subject: Subject, guidance: float) -> None:
    """Sample four steps with this guidance here and in stock diffusers."""
    adapter = subject.adapter
    if not adapter.Config.pipelines:
        raise NotApplicable("the family has no diffusers pipeline")
    adapter.ensure_negative_conditioning()
    stock = load_exporter(adapter.config).stock_sampler(adapter.folder.teacher_times(STEPS), "euler")
    frames, noise = subject.first_frames(1), SampleNoise([SEED], adapter.device)
    condition, negative = adapter.conditioner.encode_prompts(subject.prompts[:1]), adapter.conditioner.negative(1)
    denoiser, sampler = Denoiser(adapter, subject.network), SamplerSpec.teacher(stock.times, guidance)
    shape = adapter.codec.latent_shape
    latents = sample(denoiser, noise.fork(), shape, sampler, condition | frames, negative | frames)
    ours = (adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2
    theirs, *heard = stock_video(subject, stock, noise.draw(shape), guidance)
    _require_equal(ours, theirs, "pixels")
    if isinstance(adapter.codec, SoundCodec):
        _require_equal(adapter.codec.decode_sound(latents).waveform, heard[0], "waveforms")


def _require_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    require(ours.shape == theirs.shape, f"{what}: ours {tuple(ours.shape)}, stock {tuple(theirs.shape)}")
    worst = float((ours.cpu() - theirs.cpu()).abs().max())
    require(worst <= TOLERANCE, f"{what} differ by up to {worst:.4f} after {STEPS} steps, {TOLERANCE:.4f} is allowed")


def stock_video(subject: Subject, stock: StockSampler, noise: Tensor, guidance: float) -> list[Tensor]:
    """``[1, 3, T, H, W]`` in ``[0, 1]`` from the stock pipeline over the adapter's own folder, then its sound if it
    makes one."""
    adapter, exporter, pipeline = subject.adapter, load_exporter(subject.adapter.config), subject.stock
    image = _image(subject, type(pipeline))
    pipeline.register_modules(scheduler=stock.scheduler, **exporter.stock_parts(guidance))
    pipeline.set_progress_bar_config(disable=True)
    unwanted = adapter.conditioner.negative_prompt if guidance != 1.0 else ""
    made = pipeline(
        prompt=subject.prompts[0],
        **exporter.latent_arguments(noise, adapter.codec.parts),
        output_type="pt",
        **({"negative_prompt": unwanted} if unwanted else {})
        | exporter.call_arguments(len(stock.times), guidance, stock.sigmas),
        **image,
        **_sizes(adapter.config, type(pipeline)),
    )
    images, sound = made[0], [made[1]] if isinstance(adapter.codec, SoundCodec) else []
    images = images[:, None] if images.ndim == 4 else images
    return [images.transpose(1, 2).float().cpu(), *sound]


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
