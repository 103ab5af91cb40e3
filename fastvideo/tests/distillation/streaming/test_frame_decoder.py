"""Decoding chunk by chunk gives the frames of decoding the whole."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from fastvideo.distillation.abilities import frame_decoder
from fastvideo.distillation.adapters.analytic import AnalyticCodec, AnalyticConfig
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.frames import WanFrameCodec
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.errors import UserError

FRAMES = 9


@pytest.fixture(scope="module")
def codec() -> WanFrameCodec:
    return WanFamily(WanFamilyConfig()).codec


@pytest.fixture(scope="module")
def latents(codec: WanFrameCodec) -> torch.Tensor:
    return torch.randn(2, 16, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(codec: WanFrameCodec, latents: torch.Tensor) -> torch.Tensor:
    return codec.decode(latents)


@pytest.mark.parametrize("split", [[1] * 9, [3, 3, 3], [1, 4, 4], [5, 4], [9]], ids=str)
def test_every_split(codec: WanFrameCodec, latents: torch.Tensor, whole: torch.Tensor, split: list[int]) -> None:
    decode = codec.frame_decoder()
    pieces = [decode(chunk) for chunk in latents.split(split, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [4 * n - (index == 0) * 3 for index, n in enumerate(split)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_a_decoder_of_a_codec_that_decoded_nothing(latents: torch.Tensor, whole: torch.Tensor) -> None:
    assert torch.equal(WanFamily(WanFamilyConfig()).codec.frame_decoder()(latents), whole)


def test_a_fork_goes_on_alone(codec: WanFrameCodec, latents: torch.Tensor, whole: torch.Tensor) -> None:
    decode = codec.frame_decoder()
    begun = [decode(latents[:, :, :3])]
    fork = decode.fork()
    other = torch.cat([fork(latents[:, :, 3:5]), fork(-latents[:, :, 5:])], dim=2)
    assert torch.equal(torch.cat([*begun, decode(latents[:, :, 3:])], dim=2), whole)
    assert torch.equal(other[:, :, :8], whole[:, :, 9:17])
    assert not torch.equal(other[:, :, 8:], whole[:, :, 17:])


def test_streams_and_whole_videos_interleaved(codec: WanFrameCodec, latents: torch.Tensor, whole: torch.Tensor) -> None:
    one, two = codec.frame_decoder(), codec.frame_decoder()
    mine, theirs, sizes = [], [], []
    for chunk in latents.split(1, dim=2):
        mine.append(one(chunk))
        codec.decode(latents[:, :, :2])
        theirs.append(two(-chunk))
        sizes.append(one.bytes)
    assert torch.equal(torch.cat(mine, dim=2), whole)
    assert torch.equal(torch.cat(theirs, dim=2), codec.decode(-latents))
    assert len(set(sizes[2:])) == 1  # the caches are full after two latent frames


def test_a_stream_before_any_whole_video(latents: torch.Tensor, whole: torch.Tensor) -> None:
    decode = WanFamily(WanFamilyConfig()).codec.frame_decoder()
    assert torch.equal(decode(latents[:, :, :2]), whole[:, :, :5])


def test_a_family_without_streams() -> None:
    codec = AnalyticCodec(AnalyticConfig(means=(0.0,), stds=(1.0,), weights=(1,), shape=(1, 2, 1, 1)), "cpu")
    with pytest.raises(UserError, match="no streams"):
        frame_decoder(codec)


def test_the_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[4] / "benchmarks" / "stream_decode.py"
    monkeypatch.setattr("sys.argv", [str(script), "--model", "tiny", "--frames", "5", "--chunk", "2", "--repeats", "1"])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bit_equal"]
    assert found["ratio"] < 2.0
