"""Switch latency and cost on streams that switch at a known frame."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from fastvideo.evaluation.metrics import named_attributes
from fastvideo.evaluation.statistics import Estimate, resample_counts
from fastvideo.evaluation.streams.latency import FLOOR, latencies, switch_figures
from fastvideo.evaluation.streams.observer import observe_streams
from fastvideo.inference.loading import load_model
from fastvideo.tests.evaluation.streams.scenes import switched
from fastvideo.tiny.captions import parse_caption
from fastvideo.tiny.switches import switch_pairs

FRAMES, SWITCH = 37, 13
PAIRS = switch_pairs(6, 0)


def measure(videos: Tensor) -> dict[str, Estimate]:
    starts = range(SWITCH - 9, FRAMES - 8)
    wanted = named_attributes([pair.after for pair in PAIRS])
    changed = torch.tensor([pair.changed for pair in PAIRS])
    return switch_figures(
        observe_streams(videos, starts), SWITCH, wanted, changed, resample_counts(len(PAIRS), 0, resamples=16)
    )


def shown_from(frame: int) -> Tensor:
    return torch.cat([switched(pair, FRAMES, frame) for pair in PAIRS])


@lru_cache
def measured_from(frame: int) -> dict[str, Estimate]:
    return measure(shown_from(frame))


def test_pairs_change_one_attribute_and_are_a_function_of_the_seed() -> None:
    for pair in switch_pairs(200, 3):
        before, after = (parse_caption(text) for text in (pair.before, pair.after))
        differ = [a != b for a, b in zip(vars(before).values(), vars(after).values(), strict=True)]
        assert differ == [i == pair.changed for i in range(3)]
        assert None not in vars(before).values()
    assert switch_pairs(200, 3)[:6] == switch_pairs(6, 3)
    assert switch_pairs(6, 3) != PAIRS
    assert {pair.changed for pair in PAIRS[:3]} == {0, 1, 2}


def test_an_instant_switch_takes_the_floor() -> None:
    found = measured_from(SWITCH)
    assert FLOOR - 1 <= found["switch_median"].value <= FLOOR + 1
    assert found["switch_p90"].value <= 9
    assert found["switch_never"].value == 0.0
    assert found["kept_before"].value >= 0.95
    assert found["kept_during"].value >= 0.95
    assert found["kept_after"].value >= 0.95
    assert found["continuous"].value >= 0.8


@pytest.mark.slow
def test_the_vae_holds_a_colour_longer_than_a_shape_or_a_motion() -> None:
    """The floor of a student: frames that switch at once, encoded and decoded. A colour shows two chunks later."""
    codec = load_model("tiny_stream").adapter.codec
    with torch.no_grad():
        latents = codec.encode(shown_from(SWITCH))
        decode = codec.frame_decoder()
        videos = torch.cat([decode(frame) for frame in latents.split(1, dim=2)], dim=2)
    seen = observe_streams(videos, range(SWITCH - 9, FRAMES - 8))
    wanted, changed = (named_attributes([pair.after for pair in PAIRS]), [pair.changed for pair in PAIRS])
    right = torch.stack([seen.read[i, :, at] == wanted[i, at] for i, at in enumerate(changed)])
    took = latencies(right, torch.tensor(seen.starts) + 8, SWITCH).tolist()
    shape_or_motion = [frames for frames, at in zip(took, changed, strict=True) if at != 1]
    colours = [frames for frames, at in zip(took, changed, strict=True) if at == 1]
    assert max(shape_or_motion) <= FLOOR + 2
    assert 9 <= min(colours) <= max(colours) <= 17


def test_a_late_switch_takes_as_much_longer() -> None:
    now, later = measured_from(SWITCH), measured_from(SWITCH + 8)
    assert later["switch_median"].value == now["switch_median"].value + 8


def test_no_switch_is_never() -> None:
    found = measured_from(FRAMES)
    assert found["switch_never"].value == 1.0
    assert found["switch_median"].value == float("inf")
    assert found["kept_after"].value >= 0.95


def test_a_jump_and_a_lost_attribute_cost() -> None:
    videos = shown_from(SWITCH)
    videos[:, :, SWITCH:] = videos[:, :, SWITCH:].roll(7, -1)
    videos[:, :, -9:] = videos[:, :, -9:].amax(1, keepdim=True)  # white
    found = measure(videos)
    assert found["continuous"].value == 0.0
    assert found["kept_before"].value - found["kept_after"].value > 0.25


def test_a_flash_behind_a_switch_costs_though_all_is_well_at_the_end() -> None:
    videos = shown_from(SWITCH)
    videos[:, :, SWITCH : SWITCH + 9] = videos[:, :, SWITCH : SWITCH + 9].amax(1, keepdim=True)  # white
    found = measure(videos)
    assert found["kept_before"].value >= 0.95
    assert found["kept_after"].value >= 0.95
    assert found["kept_during"].value < 0.75


def test_to_read_it_once_is_not_to_keep_reading_it() -> None:
    ends = torch.arange(8, 20)
    right = torch.zeros(3, 12, dtype=torch.bool)
    right[0, 2:] = True  # from the window that ends at frame 10
    right[1, 2:5], right[1, 7:] = True, True
    right[2, :] = True
    right[2, -1] = False
    assert latencies(right, ends, 9).tolist() == [2.0, 7.0, float("inf")]


def test_closed_form_of_a_first_order_process() -> None:
    """After a switch of the mean, an exact AR(1) student answers mu' - a^m (mu' - mu): half of it after 6.6 frames."""
    for slope, frames in ((0.9, 7), (0.5, 1), (0.97, 23)):
        since = torch.arange(1, 60)
        answer = 1.0 - slope**since  # from 0 to 1
        right = (answer > 0.5) | ((answer - 0.5).abs() < 1e-9)
        assert latencies(right[None], since - 1, 0).tolist() == [frames]
        assert frames == pytest.approx(torch.tensor(0.5).log() / torch.tensor(slope).log(), abs=1.0)
