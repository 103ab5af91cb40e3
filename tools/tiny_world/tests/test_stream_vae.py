"""Training on streams sees what the VAE computes for whole videos."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

from fastvideo.tiny.world import torus
from tools.tiny_world.recipe import VaeRecipe
from tools.tiny_world.stream_vae import (
    SharpStreamRecipe,
    Stream,
    StreamVaeRecipe,
    fit_on_streams,
    sharpen_on_streams,
    stream_losses,
)
from tools.tiny_world.train_vae import ink_error
from tools.tiny_world.vae import build_vae, decode_unclamped, encode_moments

SHORT = StreamVaeRecipe(steps=2, batch_size=2, warm_up=1, groups=2, turns=2, longest=6, statistics_videos=8)


@pytest.fixture
def vae() -> AutoencoderKLWan:
    return build_vae(VaeRecipe(encoder_width=8, decoder_width=8))


@torch.no_grad()
def test_losses_of_a_stream_are_those_of_the_whole_video(vae: AutoencoderKLWan) -> None:
    videos = torus("train", 17).sample(2, seed=0).videos
    decoded = decode_unclamped(vae, encode_moments(vae, videos)[0])
    recipe, stream, at = replace(SHORT, kl_weight=0.0), Stream(vae, videos), 0
    while not stream.ended:
        found = stream.loss(recipe, noise=None)
        part = slice(at, stream.at)
        wanted = ink_error(decoded[:, :, part], videos[:, :, part], recipe.ink_weight, recipe.squared_weight)
        torch.testing.assert_close(found, wanted)
        at = stream.at
    assert at == 17


def test_gradients_stay_in_a_step(vae: AutoencoderKLWan) -> None:
    losses = stream_losses(vae, replace(SHORT, steps=3, turns=1, shortest=6), torch.Generator().manual_seed(0))
    for loss in losses:
        loss.backward()  # a graph that reached into the step before would be freed by now


def test_both_trainings(vae: AutoencoderKLWan) -> None:
    start = {name: value.clone() for name, value in vae.state_dict().items()}
    fit_on_streams(vae, SHORT)
    middle = {name: value.clone() for name, value in vae.state_dict().items()}
    assert not torch.equal(start["encoder.conv_in.weight"], middle["encoder.conv_in.weight"])
    options = {"steps": 2, "batch_size": 2, "warm_up": 1, "groups": 2, "turns": 2, "longest": 6}
    sharpen_on_streams(vae.requires_grad_(True), SharpStreamRecipe(**options))
    end = vae.state_dict()
    assert torch.equal(middle["encoder.conv_in.weight"], end["encoder.conv_in.weight"])
    assert not torch.equal(middle["decoder.conv_in.weight"], end["decoder.conv_in.weight"])
