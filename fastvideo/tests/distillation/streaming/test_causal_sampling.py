"""Sampling chunk by chunk through the one sampling function."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.causal_rollout import recache
from fastvideo.distillation.chunks import Masked, Past, Reach
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.noise import full_time, guide, velocity_to_x0
from fastvideo.distillation.rollout import start
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.stream_recipe import streaming_of
from fastvideo.distillation.types import Condition
from fastvideo.errors import UserError

SHAPE = (16, 5, 4, 4)
TIMES = (1.0, 0.7, 0.4)


@pytest.fixture(scope="module")
def adapter() -> WanFamily:
    return WanFamily(WanFamilyConfig())


@pytest.fixture(scope="module")
def student(adapter: WanFamily) -> Denoiser:
    return Denoiser(adapter, adapter.folder.load_network())


@pytest.fixture(scope="module")
def conditions(adapter: WanFamily) -> tuple[Condition, Condition]:
    return adapter.conditioner.encode_prompts(["a red seven", "a four"]), adapter.conditioner.encode_prompts(["", ""])


def spec(reach: Reach | None, kind: Literal["euler", "renoise"] = "euler", guidance: float = 1.5) -> SamplerSpec:
    return SamplerSpec(TIMES, guidance, kind, reach)


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_a_chunk_of_all_frames_is_a_whole_video(
    student: Denoiser, conditions: tuple[Condition, Condition], kind: Literal["euler", "renoise"]
) -> None:
    whole = sample(student, SampleNoise([1, 2]), SHAPE, spec(None, kind), *conditions)
    assert torch.equal(sample(student, SampleNoise([1, 2]), SHAPE, spec(Reach(5), kind), *conditions), whole)
    chunked = sample(student, SampleNoise([1, 2]), SHAPE, spec(Reach(1), kind), *conditions)
    assert (chunked - whole).abs().max() > 0.01


def test_against_a_loop_by_hand(student: Denoiser, conditions: tuple[Condition, Condition]) -> None:
    """Chunks of 2 (the first takes the remainder, 3), Euler, and a past of each kind for guidance."""
    reach = Reach(2, window=2)
    found = sample(student, SampleNoise([1, 2]), SHAPE, spec(reach), *conditions)
    noise, pasts, chunks = SampleNoise([1, 2]), [Past(reach), Past(reach)], []
    with torch.no_grad():
        for frames in (3, 2):
            x = noise.draw((16, frames, 4, 4))
            for t, after in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
                both = [
                    student.velocity(x, full_time(x, t), c, context=p) for c, p in zip(conditions, pasts, strict=True)
                ]
                x = x - (t - after) * guide(both[1], both[0], 1.5)
            pasts = [student.commit(p, x, c) for c, p in zip(conditions, pasts, strict=True)]
            chunks.append(x)
    assert torch.equal(found, torch.cat(chunks, dim=2))


def test_without_guidance_each_chunk_costs_its_calls_and_one_commit(
    student: Denoiser, conditions: tuple[Condition, Condition]
) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with student.network.register_forward_hook(count):
        sample(student, SampleNoise([1, 2]), SHAPE, spec(Reach(1), "renoise", 1.0), *conditions)
    assert calls == 5 * len(TIMES) + 4  # the last chunk is never committed


def test_teacher_forcing_is_what_sampling_sees(student: Denoiser, conditions: tuple[Condition, Condition]) -> None:
    """The estimate of the last chunk in a sample is that of one masked call on the chunks before it."""
    reach, condition = Reach(1), conditions[0]
    one = SamplerSpec((0.9,), 1.0, "renoise", reach)
    video = sample(student, SampleNoise([1, 2]), SHAPE, one, condition)
    streams = SampleNoise([1, 2])
    noise = start(torch.cat([streams.draw((16, 1, 4, 4)) for _ in range(SHAPE[1])], dim=2), 0.9)
    times = torch.full((2, SHAPE[1]), 0.9)
    with torch.no_grad():
        u = student.velocity(noise, times, condition, context=Masked(reach, video))
    torch.testing.assert_close(velocity_to_x0(noise, u, times), video, rtol=1e-4, atol=1e-4)


def committed(student: Denoiser, reach: Reach, condition: Condition, frames: int) -> Past:
    past = Past(reach)
    for chunk in SampleNoise([1, 2]).draw((16, frames, 4, 4)).split(1, dim=2):
        past = student.commit(past, chunk, condition)
    return past


def difference(one: Past, other: Past) -> float:
    """Largest difference of what the network remembers."""
    assert [piece.start for piece in one.pieces] == [piece.start for piece in other.pieces]
    pairs = zip(one.pieces, other.pieces, strict=True)
    layers = (
        (a, b) for p, q in pairs for x, y in zip(p.layers, q.layers, strict=True) for a, b in zip(x, y, strict=True)
    )
    return max(float((a - b).abs().max()) for a, b in layers)


def test_recaching_with_the_same_prompt_gives_the_whole_past_again(
    student: Denoiser, conditions: tuple[Condition, Condition]
) -> None:
    past = committed(student, Reach(1), conditions[0], 4)
    assert difference(recache(student, past, conditions[0]), past) < 1e-5
    other = recache(student, past, conditions[1])
    assert difference(other, past) > 0.01
    assert difference(other, committed(student, Reach(1), conditions[1], 4)) < 1e-5
    assert other.length == past.length


def test_a_recached_window_is_a_video_of_the_kept_frames_alone(
    student: Denoiser, conditions: tuple[Condition, Condition]
) -> None:
    """Frames that have left the window, and shaped the keys of those inside, are forgotten with the old prompt."""
    reach = Reach(1, window=2, sink=1)
    past = recache(student, committed(student, reach, conditions[0], 6), conditions[1])
    kept = torch.cat([piece.latents for piece in past.pieces], dim=2)
    assert [piece.start for piece in past.pieces] == [0, 4, 5]
    fresh = Past(reach)
    for chunk in kept.split(1, dim=2):
        fresh = student.commit(fresh, chunk, conditions[1])
    x, t = SampleNoise([3, 4]).draw((16, 1, 4, 4)), torch.full((2,), 0.6)
    with torch.no_grad():
        found, expected = (student.velocity(x, t, conditions[1], context=context) for context in (past, fresh))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_chunk_takes_its_own_times(student: Denoiser, conditions: tuple[Condition, Condition]) -> None:
    calls = []
    spec = SamplerSpec((1.0,), 1.0, "renoise", Reach(1), first_times=(1.0, 0.6, 0.3))
    assert spec.calls_of(SHAPE[1]) == 3 + 4
    options = {"visit": lambda step, x: calls.append(x.shape[2])}
    sample(student, SampleNoise([1, 2]), SHAPE, spec, conditions[0], **options)
    assert len(calls) == 3 + 4
    ladder = {"chunk": 1, "first_ladder": [1.0, 0.6, 0.3]}
    assert streaming_of({"streaming": ladder})["first_times"] == spec.first_times
    assert streaming_of({"streaming": {"chunk": 1}})["first_times"] == ()
    for wrong in ("1.0", [0.3, 0.6], [2.0]):
        with pytest.raises(UserError, match="streaming"):
            streaming_of({"streaming": {**ladder, "first_ladder": wrong}})
