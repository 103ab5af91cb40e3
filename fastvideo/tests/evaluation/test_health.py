"""Students that go wrong in one way raise that alarm and no other; healthy ones raise none."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.config.schema import HealthConfig
from fastvideo.evaluation.alarms import Alarm, find_alarms
from fastvideo.evaluation.health import measure
from fastvideo.evaluation.report import write_report
from fastvideo.tiny.world import TinyWorld, torus

LIMITS = HealthConfig()
PROMPTS, SEEDS = 8, 2


@lru_cache
def scene(seed: int) -> Tensor:
    """Videos ``[8, 2, 3, 9, 32, 32]``: soft coloured blobs that drift over a grey ground, other ones for every seed."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    videos = torch.zeros(PROMPTS, SEEDS, 3, 9, 32, 32)
    for video in videos.flatten(0, 1):
        for _ in range(4):
            start, speed = 32 * torch.rand(2, generator=draw), 2 * torch.randn(2, generator=draw)
            colour = 2 * torch.rand(3, generator=draw) - 1
            for t in range(9):
                centre = (start + t * speed).view(2, 1, 1)
                video[:, t] += colour.view(3, 1, 1) * (-((grid - centre).square().sum(0)) / 40).exp()
    return (0.7 * videos).clamp(-1, 1)


def light_of(videos: Tensor) -> Tensor:
    return torch.einsum("pscthw,c->psthw", videos, torch.tensor((0.299, 0.587, 0.114))).unsqueeze(2)


def gridded(videos: Tensor) -> Tensor:
    """A checkerboard of 8 x 8 blocks, a little lighter and darker by turns."""
    block = (torch.arange(32) // 8) % 2
    return videos + 0.05 * (2 * (block[:, None] ^ block[None]) - 1)


STUDENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "freezing": lambda x: x[:, :, :, :1].expand_as(x),
    "flickering": lambda x: x[:, :, :, [0, 8, 1, 7, 2, 6, 3, 5, 4]],
    "washed out": lambda x: 0.1 * x,
    "grey": lambda x: light_of(x).expand_as(x),
    "over-saturated": lambda x: light_of(x) + 2.5 * (x - light_of(x)),
    "same for all seeds": lambda x: x[:, :1].expand_as(x),
    "brightness": lambda x: x - 0.4,
    "tint": lambda x: x + torch.tensor((0.3, -0.15, 0.0)).view(3, 1, 1, 1),
    "grid": gridded,
}


def alarms_of(student: Tensor, reference: Tensor, scale: float = 1.0, **training: float) -> list[Alarm]:
    """Alarms of videos that stand for their own latents, the student's spread by ``scale``."""
    return find_alarms(measure(student, scale * student), measure(reference, reference), training, LIMITS)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_that_goes_wrong_raises_its_alarm_and_no_other(name: str) -> None:
    videos = scene(1)
    alarms = alarms_of(STUDENTS[name](videos).clamp(-1, 1), videos)
    assert [alarm.name for alarm in alarms] == [name]
    assert any(character.isdigit() for character in alarms[0].text), "an alarm has its number"


def test_a_still_student_is_told_in_a_plain_sentence() -> None:
    videos = scene(1)
    slow = videos.clone()
    slow[:, :, :, 1:] = videos[:, :, :, :1] + 0.32 * (videos[:, :, :, 1:] - videos[:, :, :, :1])
    (alarm,) = alarms_of(slow, videos)
    assert alarm.text.startswith("motion is 3")
    assert "% of the reference's: the student is freezing. Users of DMD2 lower the guidance or" in alarm.text


@pytest.mark.parametrize("scale", [3.0, float("nan"), float("inf")])
def test_an_exploding_student_raises_that_alone(scale: float) -> None:
    videos = scene(1)
    assert [alarm.name for alarm in alarms_of((scale * videos).nan_to_num(), videos, scale)] == ["exploding"]


@pytest.mark.parametrize(
    ("training", "name"),
    [
        ({"update_balance": 0.2}, "slow critic"),
        ({"dmd_gradient_rms": 5.0}, "gradient"),
        ({"critic_lag": 3.0}, "late critic"),
    ],
)
def test_figures_of_the_training_raise_their_alarms(training: dict[str, float], name: str) -> None:
    videos = scene(1)
    assert [alarm.name for alarm in alarms_of(videos, videos, **training)] == [name]


@pytest.mark.parametrize("seed", range(2, 6))
def test_other_videos_of_the_same_kind_raise_nothing(seed: int) -> None:
    assert alarms_of(scene(seed), scene(1), update_balance=4.0, dmd_gradient_rms=0.9, critic_lag=1.5) == []


@pytest.mark.parametrize("seed", range(5))
def test_real_videos_of_the_tiny_world_raise_nothing(seed: int) -> None:
    first, second = (
        TinyWorld("heldout").sample(PROMPTS * SEEDS, s).videos.unflatten(0, (PROMPTS, SEEDS)) for s in (100, seed)
    )
    assert alarms_of(second, first) == []


def streams(seed: int) -> Tensor:
    """Real streams ``[8, 2, 3, 33, 32, 32]``."""
    return torus("heldout").sample(PROMPTS * SEEDS, seed).videos.unflatten(0, (PROMPTS, SEEDS))


SLOWING = [min(t, 8 + max(t - 8, 0) // 3) for t in range(33)]
COURSES: dict[str, Callable[[Tensor], Tensor]] = {
    "motion decays": lambda x: x[:, :, :, SLOWING],
    "brightness drifts": lambda x: (x + 1) * torch.linspace(1, 0.5, 33).view(-1, 1, 1) - 1,
}


@pytest.mark.parametrize("name", COURSES)
def test_a_stream_that_drifts_raises_its_alarm(name: str) -> None:
    real = streams(0)
    names = [alarm.name for alarm in alarms_of(COURSES[name](real), streams(1))]
    assert names == [name]


def test_real_streams_raise_nothing_and_short_videos_have_no_course() -> None:
    assert alarms_of(streams(0), streams(1)) == []
    assert not {"late_motion", "late_brightness"} & set(measure(scene(1)))


def test_without_a_reference_only_what_is_not_finite_is_an_alarm() -> None:
    assert find_alarms(measure(0.1 * scene(1)), None, {}, LIMITS) == []
    assert [a.name for a in find_alarms({"latent_std": float("nan")}, None, {}, LIMITS)] == ["exploding"]


def test_an_image_has_no_motion_and_one_seed_no_diversity() -> None:
    figures = measure(scene(1)[:, :1, :, :1])
    assert not {"motion", "diversity"} & set(figures)


def test_figures_of_a_picture_that_is_known() -> None:
    """Half black, half white, and it turns over between two frames."""
    frame = torch.full((32, 32), -1.0)
    frame[:, 16:] = 1.0
    video = torch.stack([frame, -frame]).expand(1, 1, 3, 2, 32, 32)
    figures = measure(video, block=8)
    assert figures["brightness"] == pytest.approx(0.5)
    assert figures["contrast"] == pytest.approx(0.5, rel=1e-3)
    assert figures["motion"] == pytest.approx(2.0, rel=1e-3)
    assert figures["saturation"] == pytest.approx(0.0, abs=1e-6)


def test_the_report_lists_the_alarms_with_their_steps(tmp_path: Path) -> None:
    alarm = {"name": "freezing", "text": "motion is 31 % of the reference's: the student is freezing."}
    lines = [{"step": 10, "alarms": []}, {"step": 20, "alarms": [alarm]}, {"step": 30, "alarms": [alarm]}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "student/loss": 1.0}\n')
    assert '<h2 id="health">' not in write_report([tmp_path]).read_text()
    (tmp_path / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([tmp_path]).read_text()
    assert "freezing, at step 20, 30" in page
    assert "motion is 31 % of the reference&#39;s" in page
    (tmp_path / "health.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "No alarm in 1 validation." in write_report([tmp_path]).read_text()
