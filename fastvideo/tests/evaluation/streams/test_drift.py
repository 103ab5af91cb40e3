"""Instruments on real streams, and on real ones that were spoilt in a known way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.frechet import Moments
from fastvideo.evaluation.metrics import named_attributes
from fastvideo.evaluation.statistics import Estimate, resample_counts
from fastvideo.evaluation.streams.drift import Comparison, drift_figures, drift_series
from fastvideo.evaluation.streams.motion import centres, window_starts
from fastvideo.evaluation.streams.observer import StreamObserver, observe_streams
from fastvideo.evaluation.streams.seams import seam_figures, seam_frames
from fastvideo.evaluation.streams.world import StreamJudge
from fastvideo.tests.evaluation.streams.scenes import real

COUNT, FRAMES = 16, 49
STARTS = window_starts(FRAMES, 16)
SEAMS = seam_frames(FRAMES, Reach(1), 4)
Measure = Callable[[Tensor], dict[str, Estimate]]


@pytest.fixture(scope="module")
def videos() -> Tensor:
    return real(COUNT, FRAMES)[0]


@pytest.fixture(scope="module")
def against(videos: Tensor) -> Comparison:
    seen, reference = observe_streams(videos, STARTS), observe_streams(real(96, 9, seed=7)[0], (0,))
    named = named_attributes(real(COUNT, 9)[1])
    return Comparison(named, resample_counts(COUNT, 0, resamples=16), Moments.of(reference.features[:, 0]), seen)


@pytest.fixture(scope="module")
def measure(against: Comparison) -> Measure:
    def figures(videos: Tensor) -> dict[str, Estimate]:
        seen = observe_streams(videos, STARTS)
        found = drift_figures(seen, drift_series(seen, against), against.counts)
        return found | seam_figures(seen, SEAMS, against.counts)

    return figures


def test_starts_and_seams() -> None:
    assert STARTS == (0, 16, 32)
    assert SEAMS[:3] == (1, 5, 9)
    assert seam_frames(25, Reach(3), 4) == (13,)  # 7 latent frames: 4 and 3


def test_real_streams_have_the_truth(videos: Tensor, measure: Measure) -> None:
    found = {name: figure.value for name, figure in measure(videos).items()}
    assert all(found[f"{name}_last"] >= 0.95 for name in ("digit", "colour", "direction"))
    assert all(abs(found[f"{name}_drop"]) <= 0.05 for name in ("digit", "colour", "direction"))
    for name in ("speed_last", "identity_last", "seam_acceleration", "seam_jump"):
        assert found[name] == pytest.approx(1.0, abs=0.05), name
    assert found["turn_last"] < 0.5
    assert found["frozen_last"] == found["runaway_last"] == 0.0
    assert found["ink_slope"] == pytest.approx(0.0, abs=3e-3)
    assert found["saturation_slope"] == pytest.approx(0.0, abs=1e-3)
    assert found["seam_jump_pixels"] < 0.05


def test_the_centre_is_exact_to_a_fraction_of_a_pixel(videos: Tensor) -> None:
    turned = torch.roll(videos, (5, 11), dims=(-2, -1))
    moved = (centres(turned) - centres(videos)) % 32
    torch.testing.assert_close(moved, torch.tensor([11.0, 5.0]).expand_as(moved), atol=1e-3, rtol=0)
    assert centres(torch.full((1, 3, 2, 32, 32), -0.9)).isnan().all()


def test_a_frozen_stream(videos: Tensor, measure: Measure) -> None:
    found = measure(torch.cat([videos[:, :, :25], videos[:, :, 24:25].expand(-1, -1, 24, -1, -1)], dim=2))
    assert found["frozen_last"].value == 1.0
    assert found["speed_last"].value == pytest.approx(0.0, abs=1e-3)
    assert found["digit_last"].value > 0.9


@pytest.mark.slow
def test_a_slower_and_a_racing_stream(videos: Tensor, measure: Measure) -> None:
    slow = [min(frame, 16) + max(frame - 16, 0) // 2 for frame in range(FRAMES)]
    assert measure(videos[:, :, slow])["speed_last"].value == pytest.approx(0.5, abs=0.02)
    runaway = [4 * (frame - 30) % FRAMES if frame > 30 else frame for frame in range(FRAMES)]
    assert measure(videos[:, :, runaway])["runaway_last"].value > 0.5


def test_a_stream_that_turns(videos: Tensor, measure: Measure) -> None:
    found = measure(torch.cat([videos[:, :, :25], videos[:, :, 25:].flip(2)], dim=2))
    assert found["turn_last"].value == pytest.approx(180.0, abs=1.0)
    assert found["direction_drop"].value > 0.9
    assert found["speed_last"].value == pytest.approx(1.0, abs=0.02)


def test_a_stream_that_brightens(videos: Tensor, measure: Measure) -> None:
    """Half as bright at first, and 0.2 brighter per 100 frames, of the first window's ink."""
    growth = 0.5 * (1 + 0.2 * (torch.arange(FRAMES) - 4.0) / 100)
    found = measure((videos + 1) * growth.view(1, 1, -1, 1, 1) - 1)
    assert found["ink_slope"].value == pytest.approx(0.2, abs=0.005)
    assert found["ink_slope"].low > 0.19
    assert found["saturation_slope"].value == pytest.approx(0.0, abs=0.01)


@pytest.mark.slow
def test_a_stream_that_pales(videos: Tensor, measure: Measure) -> None:
    share = torch.linspace(0, 1, FRAMES).view(1, 1, -1, 1, 1)
    found = measure(videos.lerp(videos.amax(1, keepdim=True).expand_as(videos), share))
    assert found["saturation_slope"].value == pytest.approx(-100 / 48, rel=0.2)
    assert found["colour_drop"].value > 0.5


def test_a_stream_that_becomes_another(videos: Tensor, measure: Measure, against: Comparison) -> None:
    found = measure(torch.cat([videos[:, :, :25], videos.roll(1, 0)[:, :, 25:]], dim=2))
    assert against.real is not None
    real_frechet = float(drift_series(against.real, against)["frechet"].values[-1])
    assert found["digit_drop"].value > 0.5
    assert found["identity_last"].value > 3
    assert found["frechet_last"].value < 3 * real_frechet, "as good as real, only another"


def test_teleports_at_seams_and_inside(videos: Tensor, measure: Measure) -> None:
    def jumping(first: int) -> Tensor:
        jumps = torch.tensor([3 * ((frame - first) // 4 + 1) for frame in range(FRAMES)])
        return torch.stack([v.roll(int(j), -1) for v, j in zip(videos.unbind(2), jumps, strict=True)], dim=2)

    at, inside = measure(jumping(1)), measure(jumping(3))
    assert at["seam_jump_pixels"].value == pytest.approx(3.0, abs=0.1)
    assert min(at["seam_jump"].value, at["seam_acceleration"].value) > 10
    assert max(inside["seam_jump"].value, inside["seam_acceleration"].value) < 1


def test_a_stream_of_nothing_is_frozen_and_no_error(videos: Tensor, measure: Measure) -> None:
    found = measure(torch.full_like(videos, -1.0))
    assert found["frozen_last"].value == 1.0
    assert found["digit_last"].value < 0.5


def test_pieces_make_no_difference(videos: Tensor) -> None:
    """Nor does an empty one, of a decoder that waits for more latents, as CogVideoX's does."""
    whole, observer = observe_streams(videos[:4], STARTS), StreamObserver(STARTS)
    for piece in videos[:4].split([1, 0, 4, 7, 0, 4, 33], dim=2):
        observer.add(piece)
    pieces = observer.seen()
    assert torch.equal(pieces.read, whole.read)
    torch.testing.assert_close(pieces.features, whole.features)
    assert torch.equal(pieces.ink, whole.ink)


def test_the_score_of_a_validation(videos: Tensor) -> None:
    judge = StreamJudge(COUNT, 0, FRAMES, reference=96)
    found = judge.score(videos)
    assert found["digit_first"] >= found["digit_last"] - 0.1 >= 0.8
    assert found["speed_last"] == pytest.approx(1.0, abs=0.02)
    assert {"frechet_first", "frechet_last", "ink_slope", "frozen_last"} <= set(found)
    assert "identity_last" not in found
    assert judge.score(videos.roll(1, 0))["digit_last"] < 0.5 < found["digit_last"]


def test_bad_streams_are_refused(videos: Tensor) -> None:
    with pytest.raises(UserError, match=r"32x32.*64x64"):
        observe_streams(torch.zeros(1, 3, 9, 64, 64), (0,))
    with pytest.raises(UserError, match="longer stream"):
        observe_streams(videos[:1, :, :12], (0, 16))
