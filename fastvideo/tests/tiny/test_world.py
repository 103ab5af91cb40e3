"""The tiny world: the same arguments give the same bits, and captions say what is in the video."""

from __future__ import annotations

import pytest
import torch

from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes, caption_of, parse_caption
from fastvideo.tiny.world import OPEN_PROBABILITIES, TinyWorld, WorldSample, soft, soften, split_images, stills, torus


@pytest.fixture(scope="module")
def sample() -> WorldSample:
    return TinyWorld("heldout").sample(400, seed=3)


def centres_of_mass(videos: torch.Tensor) -> torch.Tensor:
    """Centre of the ink (x, y) in pixels per frame: [B, 9, 2] of videos [B, 3, 9, 32, 32]."""
    ink = (videos + 1.0).sum(dim=1)
    ink = ink / ink.sum(dim=(2, 3), keepdim=True)
    pixel = torch.arange(32, dtype=torch.float32) + 0.5
    return torch.stack([(ink.sum(dim=2) * pixel).sum(-1), (ink.sum(dim=3) * pixel).sum(-1)], dim=-1)


def test_videos_have_the_documented_form(sample: WorldSample) -> None:
    assert sample.videos.shape == (400, 3, 9, 32, 32)
    assert sample.videos.dtype == torch.float32
    assert sample.videos.min() == -1.0
    assert sample.videos.max() <= 1.0


def test_same_arguments_same_bits_and_a_longer_draw_begins_with_the_shorter(sample: WorldSample) -> None:
    again = TinyWorld("heldout").sample(20, seed=3)
    assert torch.equal(again.videos, sample.videos[:20])
    assert again.captions == sample.captions[:20]
    assert not torch.equal(TinyWorld("heldout").sample(20, seed=4).videos, again.videos)


def test_batches_are_pieces_of_the_sample(sample: WorldSample) -> None:
    pieces = list(TinyWorld("heldout").batches(50, seed=3, batch_size=16))
    assert [len(piece.captions) for piece in pieces] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([piece.videos for piece in pieces]), sample.videos[:50])


def test_captions_without_rendering_are_the_same(sample: WorldSample) -> None:
    assert TinyWorld("heldout").sample_captions(400, seed=3) == sample.captions


def test_splits_share_no_image() -> None:
    train, heldout = split_images("train")[0].flatten(1), split_images("heldout")[0].flatten(1)
    assert (len(train), len(heldout)) == (1437, 360)
    assert torch.cdist(heldout, train).min() > 0.0


def test_digits_stay_inside_the_frame(sample: WorldSample) -> None:
    edges = torch.cat([sample.videos[..., [0, -1], :].flatten(1), sample.videos[..., [0, -1]].flatten(1)], dim=1)
    ink = (edges + 1.0) / 2.0
    assert ink.max() < 0.3  # at most the fading edge of the ink touches the border
    assert (ink.amax(dim=1) > 0.1).double().mean() < 0.02
    moved_out = (sample.videos[:, :, -1] + 1).sum(dim=(1, 2, 3)) / (sample.videos[:, :, 0] + 1).sum(dim=(1, 2, 3))
    assert moved_out.min() > 0.9


def test_captions_parse_back_to_what_they_name(sample: WorldSample) -> None:
    truth = torch.stack([sample.digit, sample.colour, sample.direction], dim=1)
    for caption, values, named in zip(sample.captions, truth.tolist(), sample.named.tolist(), strict=True):
        expected = [value if shown else None for value, shown in zip(values, named, strict=True)]
        assert parse_caption(caption) == Attributes(*expected)


def test_each_attribute_is_left_open_at_its_rate() -> None:
    read = [parse_caption(caption) for caption in TinyWorld("train").sample_captions(2000, seed=1)]
    values = torch.tensor([[a.digit is not None, a.colour is not None, a.direction is not None] for a in read])
    named = values.double().mean(dim=0)
    assert torch.allclose(named, 1.0 - torch.tensor(OPEN_PROBABILITIES, dtype=torch.float64), atol=0.04)


def test_the_centre_of_mass_moves_in_the_direction_of_the_label(sample: WorldSample) -> None:
    centres = centres_of_mass(sample.videos)
    step = (centres[:, -1] - centres[:, 0]) / 8.0
    angle = torch.atan2(-step[:, 1], step[:, 0])  # y points down
    names = {"right": 0, "up and right": 1, "up": 2, "up and left": 3, "left": 4, "down and left": 5, "down": 6}
    octant = torch.tensor([names.get(name, 7) for name in DIRECTIONS])[sample.direction]
    assert torch.equal((angle / (torch.pi / 4)).round().long() % 8, octant)
    assert step.norm(dim=1).min() > 0.5
    assert step.norm(dim=1).max() < 1.5


def test_colours_are_told_apart_by_their_mean(sample: WorldSample) -> None:
    rgb = (sample.videos + 1.0).sum(dim=(2, 3, 4))
    rgb = rgb / rgb.amax(dim=1, keepdim=True)
    means = torch.stack([rgb[sample.colour == index].mean(dim=0) for index in range(len(COLOURS))])
    assert torch.equal(torch.cdist(rgb, means).argmin(dim=1), sample.colour)


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("a green seven moving up and left", Attributes(7, COLOURS.index("green"), DIRECTIONS.index("up and left"))),
        ("an eight", Attributes(digit=8)),
        ("A  digit moving  up", Attributes(direction=0)),
        ("a digit", Attributes()),
    ],
)
def test_parse(text: str, attributes: Attributes) -> None:
    assert parse_caption(text) == attributes


def test_every_caption_parses_back() -> None:
    for digit in (None, *range(len(DIGITS))):
        for colour in (None, *range(len(COLOURS))):
            for direction in (None, *range(len(DIRECTIONS))):
                attributes = Attributes(digit, colour, direction)
                assert parse_caption(caption_of(attributes)) == attributes


@pytest.mark.parametrize("text", ["", "a purple seven", "a seven green", "a seven moving", "a seven moving up up"])
def test_text_outside_the_language_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tiny world"):
        parse_caption(text)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'"):
        TinyWorld("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        TinyWorld("train").sample(0, seed=0)


def test_soft_videos_are_the_sharp_ones_at_half_resolution(sample: WorldSample) -> None:
    softened = soft("heldout").sample(20, seed=3)
    assert softened.captions == sample.captions[:20]
    assert torch.equal(softened.videos, soften(sample.videos[:20]))
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1.0
    assert soften(checks.expand(1, 3, 2, 32, 32)).abs().max() == 0.0, "what half the resolution cannot show is gone"
    assert torch.equal(soften(torch.full((1, 3, 2, 32, 32), 0.5)), torch.full((1, 3, 2, 32, 32), 0.5))


def test_a_still_is_any_frame_of_its_video(sample: WorldSample) -> None:
    single = stills("heldout").sample(200, seed=3)
    assert single.videos.shape == (200, 3, 1, 32, 32)
    assert single.captions == sample.captions[:200]
    found = (single.videos == sample.videos[:200]).flatten(3).all(dim=3).all(dim=1).nonzero()
    assert set(found[:, 0].tolist()) == set(range(200))
    assert set(found[:, 1].tolist()) == set(range(9))
    assert torch.equal(stills("heldout").sample(20, seed=3).videos, single.videos[:20])


def test_worlds_that_look_alike_have_keys_of_their_own() -> None:
    keys = {world("train", frames).key for world, frames in ((TinyWorld, 9), (torus, 9), (soft, 9), (stills, 1))}
    assert len(keys) == 4
    with pytest.raises(ValueError, match="one frame, not of 9"):
        stills("train", 9)
