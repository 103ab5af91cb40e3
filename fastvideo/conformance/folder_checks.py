"""Rules about prompts, latents and model folders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvideo.conformance.subject import COUNT, Subject, Violation, check, require, require_close
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.types import Batch, Condition, RawBatch, UserError


@check("summary, Config")
def it_declares_itself(subject: Subject) -> None:
    require(bool(subject.adapter.summary), "`summary` is empty: describe the family in one line")
    require(issubclass(subject.adapter.Config, AdapterConfig), "`Config` must be a subclass of AdapterConfig")


@check("conditioner.encode_prompts()")
def a_prompt_is_encoded_alike_alone_and_in_a_batch(subject: Subject) -> None:
    first, second = subject.prompts
    conditioner, fresh = subject.adapter.conditioner, _fresh(subject).conditioner
    together = conditioner.encode_prompts([first, second, first])
    for key, value in _named(together).items():
        require(len(value) == COUNT, f"{key}: {len(value)} rows for {COUNT} prompts")
        for row, prompt in enumerate(subject.prompts):
            alone = _named(fresh.encode_prompts([prompt]))[key][0]
            require_close(alone, value[row], f"{key} of {prompt!r} alone and in a batch")
        require(torch.equal(value[2], value[0]), f"{key}: the same prompt is encoded twice and differs")
    differs = any(not torch.equal(value[0], value[1]) for value in _named(together).values())
    require(differs, f"{first!r} and {second!r} are encoded alike; give two --prompts that differ for this model")


@check("conditioner.negative_prompt, ensure_negative_conditioning()")
def the_negative_condition_is_the_negative_prompt(subject: Subject) -> None:
    adapter = _fresh(subject)
    try:
        _prepared(adapter, RawBatch(subject.prompts, subject.noise(2)))
    except RuntimeError:
        pass
    else:
        raise Violation("a batch was prepared before ensure_negative_conditioning()")
    adapter.ensure_negative_conditioning()
    conditioner = adapter.conditioner
    negative = _named(conditioner.negative(2))
    encoded = _named(conditioner.encode_prompts([conditioner.negative_prompt] * 2))
    require(negative.keys() == encoded.keys(), "it has other tensors than an encoded prompt")
    for key, value in negative.items():
        require(torch.equal(value, encoded[key]), f"{key} is not that of the negative prompt")


@check("conditioner.text_of()")
def a_prepared_batch_has_what_a_method_reads(subject: Subject) -> None:
    adapter = subject.adapter
    adapter.ensure_negative_conditioning()
    latents = subject.noise(2, seed=1)
    batch = _prepared(adapter, RawBatch(subject.prompts, latents.double()))
    require(batch.shape == (2, *adapter.codec.latent_shape), f"shape {batch.shape}")
    require(batch.x0 is not None and batch.x0.dtype == torch.float32, "x0 is not float32")
    require_close(batch.x0, latents, "x0 and the latents that were given")  # type: ignore[arg-type]
    condition, negative = _named(batch.condition), _named(batch.negative)
    for key, value in _named(adapter.conditioner.encode_prompts(subject.prompts)).items():
        require(torch.equal(condition[key], value), f"condition {key} is not that of the captions")
        require(negative[key].shape == value.shape, f"negative {key} has another shape")


@check("codec.latent_shape")
def latents_of_a_wrong_shape_are_refused_with_both_shapes(subject: Subject) -> None:
    subject.adapter.ensure_negative_conditioning()
    channels, frames, height, width = shape = subject.adapter.codec.latent_shape
    wrong = (channels, frames, width + 1, height)
    try:
        _prepared(subject.adapter, RawBatch(subject.prompts, torch.zeros(2, *wrong)))
    except UserError as error:
        require(
            str(wrong) in str(error) and str(shape) in str(error), f"the message does not name both shapes: {error}"
        )
    else:
        raise Violation(f"latents of {wrong} were taken, the shape is {shape}")


@check("codec.encode(), codec.decode(), codec.latent_shape")
def latents_and_videos_have_matching_shapes(subject: Subject) -> None:
    latents = subject.noise(2, seed=1)
    codec = subject.adapter.codec
    videos = codec.decode(latents)
    require(videos.ndim == 5 and len(videos) == 2, f"decode gives {tuple(videos.shape)}, expected [2, 3, T, H, W]")
    require(codec.decode(latents[:1]).shape[1:] == videos.shape[1:], "a single video has another shape")
    encoded = codec.encode(videos)
    require(encoded.shape == latents.shape, f"encode(decode(z)) is {tuple(encoded.shape)}, z {tuple(latents.shape)}")
    require(encoded.dtype == torch.float32, f"latents are {encoded.dtype}")
    require(not (encoded.requires_grad or videos.requires_grad), "the codec carries gradient")


@check("codec.encode(gradient=True), codec.decode(gradient=True)")
def the_codec_carries_gradient_when_asked(subject: Subject) -> None:
    codec, latents = subject.adapter.codec, subject.noise(1, seed=1).requires_grad_()
    videos = codec.decode(latents, gradient=True)
    encoded = codec.encode(videos, gradient=True)
    # Clamped pixels carry no gradient, so that a decoder may leave them as they are where it is asked for.
    shown = (pixels.detach().clamp(-1.0, 1.0) for pixels in (videos, codec.decode(latents)))
    require_close(*map(codec.encode, shown), "latents with and without gradient")
    (gradient,) = torch.autograd.grad(encoded.square().sum(), latents)
    require(bool(gradient.isfinite().all()), "the gradient through decode and encode is not finite")
    require(gradient.abs().sum() > 0, "no gradient reaches the latents through decode and encode")


@check("codec.latent_key")
def the_latent_key_is_a_property_of_the_codec(subject: Subject) -> None:
    key = subject.adapter.codec.latent_key
    require(bool(key), "it is empty")
    require(_fresh(subject).codec.latent_key == key, "it changes from one load to the next")


@check("folder.load_network()")
def networks_are_loaded_independently(subject: Subject) -> None:
    pairs = zip(subject.network.named_parameters(), subject.adapter.folder.load_network().parameters(), strict=True)
    for (name, one), two in pairs:
        require(torch.equal(one, two), f"{name} differs from one load to the next")
        require(one.data_ptr() != two.data_ptr(), f"{name} is shared: training one role would train another")
        require(one.dtype == torch.float32, f"{name} is {one.dtype}: master weights are float32")


@check("folder.save(), folder.load_network()")
def a_saved_pipeline_gives_back_the_weights_bit_for_bit(subject: Subject) -> None:
    network = subject.adapter.folder.load_network().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.01
    folder = subject.folder / "saved"
    subject.adapter.folder.save(folder, network, {"method": "toy"})
    require((folder / "recipe.json").is_file(), "recipe.json is missing")
    reader = _fresh(subject, path=str(folder))
    loaded = {"path": reader.folder.load_network(), "role": subject.adapter.folder.load_network(str(folder))}
    for how, found in loaded.items():
        weights = found.state_dict()
        for name, wanted in network.state_dict().items():
            require(torch.equal(wanted, weights[name]), f"{name} differs from the saved one (loaded by {how})")


def _named(condition: Condition) -> dict[str, Tensor]:
    """All tensors of a condition, by conditioner and name."""
    return {f"{key}.{name}": value for key, tensors in condition.tensors.items() for name, value in tensors.items()}


def _prepared(adapter: DistillAdapter[Any], raw: RawBatch) -> Batch:
    return BatchPreparer(adapter.codec, [adapter.conditioner])(raw)


def _fresh(subject: Subject, **options: Any) -> DistillAdapter[Any]:
    """Another adapter of the same kind, with empty caches."""
    adapter = subject.adapter
    return type(adapter)(adapter.config.model_copy(update=options), adapter.device)
