"""Frames of a Wan student in the space of an image family: real VAEs at toy size, decoded and encoded with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn
from torch.nn import functional

from fastvideo.distillation.adapters.diffusers.codec import component_hash, latent_space
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.frames import WanFrameCodec
from fastvideo.distillation.frame_bridge import (
    CodecFrames,
    FrameBridge,
    FrameUse,
    decode_frames,
    resized,
    whole_decodes,
)
from fastvideo.distillation.frame_roles import frame_bridge, still_difference
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import made_family, wan_config

PICKS = [[0, 3], [5, 1], [8, 4]]
"""Of three videos of nine frames: the first, and others of both later latent frames."""


@pytest.fixture(scope="module")
def wan(tiny_wan: Path) -> WanFamily:
    return WanFamily(wan_config(tiny_wan, num_frames=9))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_family("sdxl", tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def latents(wan: WanFamily) -> Tensor:
    return torch.randn(3, *wan.codec.latent_shape, generator=torch.Generator().manual_seed(1))


def use(**options: Any) -> FrameUse:
    values: dict[str, Any] = {"roles": ("frame_teacher", "frame_critic"), "space": "auto", "count": 2, "first": True}
    return FrameUse(**{**values, "times": (0.02, 0.5), "resize": False, **options})


def picked(videos: Tensor, picks: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([videos[row][:, list(own)] for row, own in enumerate(picks)])


def test_frames_are_those_of_the_whole_decode(wan: WanFamily, latents: Tensor) -> None:
    whole = wan.codec.decode(latents[:1], gradient=True)
    for frame in range(9):
        for seen in (latents[:1], latents[:1].clone().requires_grad_()):
            found = wan.codec.decode_frames(seen, [[frame]])[:, :, 0]
            torch.testing.assert_close(found, whole[:, :, frame], rtol=1e-5, atol=1e-5)
    found = wan.codec.decode_frames(latents, PICKS)
    torch.testing.assert_close(found, picked(wan.codec.decode(latents, gradient=True), PICKS), rtol=1e-5, atol=1e-5)


def test_their_gradient_is_that_of_the_whole_decode_in_their_own_latent_frame(wan: WanFamily, latents: Tensor) -> None:
    """Beyond it there is none: neither in earlier latent frames, which are seen, nor in later ones."""
    gradients = []
    for decode in (lambda x: wan.codec.decode_frames(x, PICKS), lambda x: whole_decodes(wan.codec, x, PICKS)):
        leaf = latents.clone().requires_grad_()
        weight = torch.randn(3, 3, 2, 16, 32, generator=torch.Generator().manual_seed(2))
        gradients.append(torch.autograd.grad((decode(leaf) * weight).sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    seen = gradients[0].abs().sum(dim=(1, 3, 4)) > 0
    assert seen.tolist() == [[True, True, False], [False, True, True], [False, True, True]]
    leaf = latents.clone().requires_grad_()
    video = wan.codec.decode(leaf, gradient=True)
    (whole,) = torch.autograd.grad((video[0, :, 3] * weight[0, :, 1]).sum(), leaf)
    torch.testing.assert_close(gradients[0][0, :, 1], whole[0, :, 1], rtol=1e-3, atol=1e-5)
    assert float(whole[0, :, 0].abs().sum()) > 0, "earlier latent frames do matter to the whole decode"


def test_a_history_of_one_frame_would_be_another_picture(wan: WanFamily, latents: Tensor) -> None:
    short = wan.codec.decode(latents[:1, :, 1:], gradient=True)[:, :, 4]
    whole = wan.codec.decode_frames(latents[:1], [[8]])[:, :, 0]
    assert float((short - whole).square().mean().sqrt() / whole.std()) > 0.01


def test_saturated_pixels_have_a_gradient(wan: WanFamily, latents: Tensor) -> None:
    """Diffusers' decode clamps, and so does ours where a video is made; a bridge sees beyond."""
    codec, leaf = WanFamily(wan.config).codec, latents.clone().requires_grad_()
    codec.vae.decoder.conv_out.weight.data *= 50
    video = codec.decode(leaf, gradient=True)
    saturated = video.detach().abs() > 1
    assert saturated.float().mean() > 0.1
    (gradient,) = torch.autograd.grad((video * saturated).sum(), leaf)
    assert gradient.abs().sum() > 0
    assert torch.equal(codec.decode(leaf.detach()), video.detach().clamp(-1, 1))


def test_stills_are_the_frames_encoded_one_by_one(wan: WanFamily, sdxl: Any, latents: Tensor) -> None:
    stills = CodecFrames(wan.codec, sdxl.codec).stills(latents, PICKS)
    frames = wan.codec.decode_frames(latents, PICKS)
    alone = [sdxl.codec.encode(frames[row : row + 1, :, n : n + 1]) for row in range(3) for n in range(2)]
    torch.testing.assert_close(stills.latents, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert stills.latents.shape == (6, *sdxl.codec.latent_shape)
    assert float(stills.figures["clipped_pixels"]) == pytest.approx(float((frames.abs() > 1).float().mean()))
    moved = functional.avg_pool2d(frames.flatten(0, 2)[:, None], 3, 1, 1).view_as(frames)
    blurred = CodecFrames(_Constant(moved), sdxl.codec).stills(latents, PICKS)
    assert 0 < blurred.figures["sharpness"] < stills.figures["sharpness"]


class _Constant:
    """A codec whose frames are given."""

    temporal = 4

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames

    def decode_frames(self, latents: Tensor, picks: Any, *, recompute: bool = False) -> Tensor:
        return self.frames


def kept_by(bridge: CodecFrames, latents: Tensor) -> tuple[int, Tensor]:
    """Bytes that autograd keeps for backward, and the gradient."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = latents.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frames = decode_frames(bridge.source, leaf, PICKS, recompute=bridge.recompute)
    return sum(kept.values()), torch.autograd.grad(frames.square().sum(), leaf)[0]


@pytest.mark.parametrize("own", [True, False], ids=["frame by frame", "whole decodes"])
def test_recomputed_frames_have_the_same_gradient_and_keep_little(
    own: bool, wan: WanFamily, sdxl: Any, latents: Tensor
) -> None:
    codec = wan.codec if own else _Whole(wan.codec)
    whole, again = (
        kept_by(CodecFrames(codec, sdxl.codec, recompute=recompute), latents) for recompute in (False, True)
    )
    assert torch.equal(whole[1], again[1])
    assert again[0] < 0.1 * whole[0]


@dataclass
class _Whole:
    """A codec that decodes whole videos alone."""

    codec: WanFrameCodec
    temporal = 4

    def decode(self, latents: Tensor, *, gradient: bool = False) -> Tensor:
        return self.codec.decode(latents, gradient=gradient)


def test_gradient_of_the_bridge_equals_its_finite_difference(
    tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, along a direction in the picked latent frames, with frames made smaller on the way."""
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)  # diffusers' own rounds to float32
    codec = WanFamily(wan_config(tiny_wan, num_frames=9)).codec
    still = made_family("sdxl", tmp_path, height=8, width=16).codec
    for one in (codec, still):
        one.vae.double()
    bridge, picks = CodecFrames(codec, still), [[0, 7]]
    generator = torch.Generator().manual_seed(3)
    x0 = (0.2 * torch.randn((1, *codec.latent_shape), generator=generator)).double().requires_grad_()
    way = torch.randn(x0.shape, generator=generator).double()
    way[:, :, 1] = 0  # the past of frame 7: seen, and without gradient
    only = way.clone()
    only[:, :, 0] = 0
    found = bridge(x0, picks)
    weight = torch.randn(found.shape, generator=generator).double()
    weight[0] = 0  # the first frame is the past of frame 7 as well
    (gradient,) = torch.autograd.grad((found * weight).sum(), x0)
    with torch.no_grad():
        ends = [float((bridge(x0 + sign * 1e-4 * only, picks) * weight).sum()) for sign in (1, -1)]
    assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)
    assert all(p.grad is None and not p.requires_grad for one in (codec, still) for p in one.vae.parameters())


def test_frames_are_made_smaller_without_aliasing_and_larger_evenly() -> None:
    stripes = torch.ones(1, 3, 16, 16)
    stripes[..., 1::4] = stripes[..., 2::4] = -1.0
    for size in ((4, 4), (32, 4)):  # the second is smaller in one direction alone
        assert float(resized(stripes, size).abs().max()) < 0.5, "the columns in the middle alone would be all -1"
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    assert torch.equal(resized(ramp, (16, 16)), functional.interpolate(ramp, (16, 16), mode="bilinear"))
    assert resized(ramp, (8, 8)) is ramp


def test_the_first_frame_is_a_still_where_the_space_is_shared(tiny_wan: Path, wan: WanFamily, latents: Tensor) -> None:
    """Latent frame 0 of a causal VAE is the latent of that still; a family of stills with that VAE takes it."""
    still = WanFamily(wan_config(tiny_wan, num_frames=1))
    videos = torch.rand(2, 3, 9, 16, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    one, other = wan.codec.encode(videos)[:, :, :1], still.codec.encode(videos[:, :, :1])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    roles = {"frame_teacher": still, "frame_critic": still}
    bridge, note = frame_bridge(use(), wan, roles)
    assert "the first frame reaches frame_teacher as it is" in note
    assert "; the others are decoded" in note
    leaf = latents.clone().requires_grad_()
    found = bridge(leaf, [[0, 6]] * 3).view(3, 2, *still.codec.latent_shape)
    assert torch.equal(found[:, 0], latents[:, :, :1])
    decoded, _ = frame_bridge(use(space="decoded"), wan, roles)
    assert torch.equal(found[:, 1], decoded(latents, [[0, 6]] * 3).view_as(found)[:, 1])
    alone, _ = frame_bridge(use(space="identity", count=1), wan, roles)
    stills = alone.stills(latents, [[0]] * 3)
    assert torch.equal(stills.latents, latents[:, :, :1])
    assert not stills.figures, "nothing was decoded"


def test_wan_and_qwen_image_with_one_encoder_have_one_key(wan: WanFamily) -> None:
    """Their classes, configs and decoders differ, as those of the published models do."""
    own = wan.codec.vae
    shared = {name: own.config[name] for name in ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "latents_mean")}
    options = {**shared, "latents_std": own.config.latents_std, "temperal_downsample": own.config.temperal_downsample}
    qwen = AutoencoderKLQwenImage(**options).eval()
    assert component_hash(*latent_space(qwen.config, qwen)) != wan.codec.latent_key
    encoder = {n: value for n, value in own.state_dict().items() if not n.startswith(("decoder.", "post_quant_conv."))}
    qwen.load_state_dict(encoder, strict=False)
    assert component_hash(*latent_space(qwen.config, qwen)) == wan.codec.latent_key
    other = {**dict(qwen.config), "latents_std": [2.0] * own.config.z_dim}
    assert component_hash(*latent_space(other, qwen)) != wan.codec.latent_key


def test_stills_tell_equal_spaces_of_unequal_files(tiny_wan: Path, wan: WanFamily, sdxl: Any) -> None:
    """As bfloat16 files have them; other weights and other normalisations differ by far more."""
    rounded = WanFamily(wan_config(tiny_wan, num_frames=1))
    for parameter in rounded.codec.vae.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert rounded.codec.latent_key != wan.codec.latent_key
    assert 0 < still_difference(wan.codec, rounded.codec) < 0.01
    bridge, note = frame_bridge(use(), wan, {"frame_teacher": rounded, "frame_critic": rounded})
    assert isinstance(bridge, CodecFrames)
    assert bridge.shared
    assert "8 stills differ by 0." in note
    assert still_difference(wan.codec, _scaled(tiny_wan)) > 0.1
    bridge, note = frame_bridge(use(), wan, {"frame_teacher": sdxl, "frame_critic": sdxl})
    assert isinstance(bridge, CodecFrames)
    assert not bridge.shared
    assert bridge.noisiest == pytest.approx(0.9360, abs=1e-4)
    assert note == "frames reach frame_teacher decoded and encoded again"


def _scaled(tiny_wan: Path) -> WanFrameCodec:
    """The codec with another normalisation."""
    codec = WanFamily(wan_config(tiny_wan, num_frames=1)).codec
    codec.pipeline.vae_config["latents_std"] = [2 * each for each in codec.pipeline.vae_config["latents_std"]]
    return codec


def test_without_codecs_latent_frames_are_stills() -> None:
    x0 = torch.arange(24.0).view(2, 2, 3, 2, 1)
    found = FrameBridge()(x0, [[2, 0], [1, 2]])
    assert torch.equal(found, torch.stack([x0[0, :, 2:], x0[0, :, :1], x0[1, :, 1:2], x0[1, :, 2:]]))
    assert torch.equal(FrameBridge()(x0), x0[:, :, :1])


def refusal(use_: FrameUse, main: Any, teacher: Any, critic: Any = None) -> str:
    with pytest.raises(UserError) as error:
        frame_bridge(use_, main, {"frame_teacher": teacher, "frame_critic": critic or teacher})
    return str(error.value)


def test_what_does_not_fit_is_refused_with_its_field(tiny_wan: Path, tmp_path: Path, wan: WanFamily, sdxl: Any) -> None:
    still = WanFamily(wan_config(tiny_wan, num_frames=1))
    assert refusal(use(), wan, wan).startswith(
        "roles.frame_teacher.model: it makes videos of 3 latent frames, and scores single frames here"
    )
    assert refusal(use(), wan, sdxl, still).startswith("roles.frame_critic.model: frame_teacher and frame_critic score")
    assert refusal(use(count=4), wan, sdxl) == (
        "method.frames_per_video: 4, and a video has 3 latent frames, of which one frame each is taken"
    )
    assert refusal(use(times=(0.1, 0.95)), wan, sdxl).startswith(
        "method.frame_time_range: ends at 0.95, and the noisiest"
    )
    assert "give both one height and width, or frame_space: decoded" in refusal(use(space="identity"), wan, sdxl)
    other = WanFamily(wan_config(tiny_wan, num_frames=1))
    other.codec.vae.quant_conv.weight.data *= 2
    decoded, _ = frame_bridge(use(), wan, {"frame_teacher": other, "frame_critic": other})
    assert isinstance(decoded, CodecFrames)
    assert not decoded.shared
    message = refusal(use(space="identity", count=1), wan, other)
    assert message.startswith("method.frame_space: identity, and the latent spaces differ")
    assert wan.codec.latent_key in message
    assert other.codec.latent_key in message
    assert refusal(use(space="identity"), wan, still).startswith(
        "method.frames_per_video: frame_space: identity scores"
    )
    tall = made_family("sdxl", tmp_path, height=32, width=16)
    assert refusal(use(), wan, tall).startswith(
        "roles.frame_teacher.model: its pictures are 32 x 16 (height x width), and the frames of the student's videos, "
        "16 x 32, would be squeezed"
    )
    large = made_family("sdxl", tmp_path, height=64, width=128)
    assert "it was trained on up to 32 x 32 pixels" in refusal(use(), wan, large)
    frame_bridge(use(resize=True), wan, {"frame_teacher": large, "frame_critic": large})
    given = WanFamily(wan_config(tiny_wan, num_frames=9, given_frames=1))
    assert refusal(use(), given, sdxl).startswith("model: it goes on from given frames")
