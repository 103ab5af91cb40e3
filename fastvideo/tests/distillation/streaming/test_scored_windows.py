"""Windows of long rollouts on Wan: the first latent is an image's, as teacher and critic know it."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.distribution_matching.self_forcing import SelfForcingConfig, SelfForcingMethod
from fastvideo.distillation.methods.distribution_matching.streaming_tuning import LEAD
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import RawBatch
from fastvideo.tests.preparing import preparer
from fastvideo.tiny.world import torus


def test_the_first_scored_latent_is_the_image_of_its_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = WanFamily(WanFamilyConfig(num_frames=5))
    adapter.ensure_negative_conditioning()
    network = adapter.folder.load_network()
    roles = [RoleHandle(name, adapter, network, name != "teacher") for name in ("student", "teacher", "critic")]
    config = SelfForcingConfig(max_frames=4)
    method = SelfForcingMethod(config, ModelBundle(roles), Ladder((1.0,)), RandomStreams(0))
    batch = preparer(adapter)(RawBatch(("a red seven", "a four")))
    rolled = method.rollout(batch).detach()
    monkeypatch.setattr(method, "rollout", lambda batch: rolled)
    x0, scored = method.sample(batch)
    video = adapter.codec.decode(rolled)
    assert video.shape[2] == 13
    image = adapter.codec.encode(video[:, :, 8:9])  # the last of latent 2, the first scored one
    assert scored.unscored == 1
    assert x0.shape[2] == 2
    torch.testing.assert_close(x0[:, :, :1], image, rtol=1e-4, atol=1e-4)
    assert torch.equal(x0[:, :, 1:], rolled[:, :, 3:])


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_that_begins_within_a_stream_errs_no_more_after_its_lead() -> None:
    """PSNR of the last frame against the decoding of the whole: 23 dB at once, 41 after three latent frames more."""
    codec = WanFamily(WanFamilyConfig(path="tiny_stream")).codec
    latents = codec.encode(torus("heldout", 97).sample(4, seed=3).videos)
    whole = codec.decode(latents)[:, :, -1]

    def psnr(before: int) -> float:
        late = codec.decode(latents[:, :, -1 - before :])[:, :, -1]
        return float(10 * torch.log10(4 / (late - whole).square().mean()))

    found = [psnr(before) for before in (0, 3, LEAD)]
    assert found[0] < 30
    assert found[1] < 50
    assert found[2] > 85
