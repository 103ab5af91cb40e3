"""Streams that survive their step: which frames are new, scored and seen, at which prompt, and after a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.analytic import AnalyticCodec
from fastvideo.distillation.adapters.analytic_networks import FrameDenoiser
from fastvideo.distillation.chunks import Past, Reach
from fastvideo.distillation.engine.checkpoint.state import join_state, split_state
from fastvideo.distillation.methods.distribution_matching.running_stream import RunningStream
from fastvideo.distillation.methods.distribution_matching.streaming_tuning import (
    StreamingTuningConfig,
    StreamingTuningMethod,
)
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import Batch, UserError
from fastvideo.tests.distillation.analytic.test_self_forcing_analytic import A, Exit, bundle_of, prompts, spy_of
from fastvideo.tests.distillation.toys import LADDER, SpyAdapter


def tuning(adapter: SpyAdapter, rng: RandomStreams | None = None, **options: Any) -> StreamingTuningMethod:
    """The method with an exact student and a critic that is not."""
    config = StreamingTuningConfig(**{"teacher_guidance": 1.0, "generator_update_interval": 2, **options})
    bundle = bundle_of(adapter, critic=FrameDenoiser(0.3, 1.2, A))
    return StreamingTuningMethod(config, bundle, LADDER, rng or RandomStreams(3))


def switching(adapter: SpyAdapter, before: str = "1", after: str = "-2") -> Batch:
    """Two videos that switch from one prompt to another."""
    first, second = (adapter.conditioner.encode_prompts([caption] * 2) for caption in (before, after))
    return replace(prompts(adapter), condition=first, switch=second)


def shift(condition: Any) -> float:
    return float(condition.of("analytic")["shift"][0])


def test_a_stream_goes_on_from_step_to_step_until_its_end() -> None:
    """A window of 4 at first, then 3 new frames a step, and a new stream when those do not fit any more."""
    adapter = spy_of(4)
    method = tuning(adapter, Exit(0), max_frames=11, min_new_frames=3)
    lengths, unscored = [], []
    for _ in range(5):
        before = method.keeper.stream
        x0, scored = method.sample(prompts(adapter))
        stream = method.keeper.stream
        assert stream is not None
        assert tuple(x0.shape) == scored.shape == (2, 1, 4, 4, 4)
        assert torch.equal(stream.latents[:, :, -3:], x0.detach()[:, :, 1:])
        assert stream.past.length == stream.length
        assert not stream.latents.requires_grad, "or graphs of all steps would hang on one another"
        if before is not None and stream.length > 4:
            assert torch.equal(x0[:, :, 0], before.latents[:, :, -1]), "the codec is the identity, so it re-encodes so"
        lengths.append(stream.length)
        unscored.append(scored.unscored)
    assert lengths == [4, 7, 10, 4, 7]
    assert unscored == [0, 1, 1, 0, 1]
    assert len(adapter.of(method.student)) == len(adapter.commits) == 4 + 3 + 3 + 4 + 3


def test_a_stream_keeps_nothing_of_texts_for_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's commits may keep what it made of the prompts; the student has learnt when the next step comes."""
    adapter = spy_of(4)
    commit = adapter.commit
    monkeypatch.setattr(adapter, "commit", lambda *arguments: replace(commit(*arguments), texts="keys"))
    method = tuning(adapter, Exit(0))
    method.sample(prompts(adapter))
    assert method.keeper.stream is not None
    assert method.keeper.stream.past.length == 4
    assert (method.keeper.stream.past.texts, method.keeper.stream.past.shared) == (None, None)


class Remembering(AnalyticCodec):
    """A causal decoder: every frame keeps two fifths of the one before."""

    def decode(self, latents: Tensor) -> Tensor:
        frames = [latents[:, :, 0]]
        for latent in latents.unbind(2)[1:]:
            frames.append(0.4 * frames[-1] + latent)
        return torch.stack(frames, dim=2)


def test_the_first_image_of_a_window_is_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded far enough from where the decoder begins, however few frames are new."""
    adapter = spy_of(4)
    monkeypatch.setattr(AnalyticCodec, "decode", Remembering.decode)
    method = tuning(adapter, Exit(0), max_frames=40, min_new_frames=1)
    for _ in range(20):
        x0, _ = method.sample(prompts(adapter))
        stream = torch.cat([commit.x0 for commit in adapter.commits], dim=2)
        first = stream.shape[2] - 4
        expected = adapter.codec.decode(stream[:, :, : first + 1])[:, :, -1] if first else stream[:, :, 0]
        torch.testing.assert_close(x0[:, :, 0].detach(), expected, rtol=0, atol=1e-3)


def test_overlap_is_context_without_gradient() -> None:
    adapter = spy_of(4)
    method = tuning(adapter, Exit(0), max_frames=12, min_new_frames=2)
    method.sample(prompts(adapter))
    x0, scored = method.sample(prompts(adapter))
    assert scored.unscored == 2
    (gradient,) = torch.autograd.grad(method.student_loss(x0, scored).value, x0, retain_graph=True)
    assert (gradient.abs().sum(dim=(0, 1, 3, 4)) > 0).tolist() == [False, False, True, True]
    assert [call.x_t.shape[2] for call in adapter.of(method.critic)] == [4], "the critic sees the whole window"
    loss = method.critic_loss(x0.detach(), scored)
    assert set(loss.metrics) == {"loss/chunk-1", "loss/chunk-2"}


@pytest.mark.parametrize("policy", ["recache", "keep", "flush", "cut"])
def test_the_prompt_switches_at_its_chunk_and_the_past_with_it(policy: str) -> None:
    adapter = spy_of(4)
    options = {"max_frames": 12, "min_new_frames": 4, "switch_frames": (6,), "on_switch": policy}
    method = tuning(adapter, Exit(0), reach=Reach(1, window=2, sink=1), **options)
    batch, seen = switching(adapter), []
    for _ in range(3):
        adapter.calls.clear()
        adapter.commits.clear()
        list(method.losses(batch, 0))
        assert method.keeper.stream is not None
        student = [(call.context.length, shift(call.condition)) for call in adapter.of(method.student)]  # type: ignore[union-attr]
        teacher = {shift(call.condition) for call in adapter.of(method.teacher) + adapter.of(method.critic)}
        committed = [(commit.past.length, shift(commit.condition)) for commit in adapter.commits]
        seen.append((method.keeper.stream.length, student, teacher, committed))
    old, new = 1.0, -2.0
    assert seen[0] == (4, [(i, old) for i in range(4)], {old}, [(i, old) for i in range(4)])
    assert seen[1] == (6, [(4, old), (5, old)], {old}, [(4, old), (5, old)]), "a step ends where the prompt switches"
    first = 0 if policy == "cut" else 6
    recached = [(0, new), (4, new), (5, new)] if policy == "recache" else []
    own = [(first + i, new) for i in range(4)]
    assert seen[2] == (10, own, {new}, [*recached, *own])


def test_a_switch_near_the_end_takes_place() -> None:
    """The last frames are fewer than a step's fewest: they are made all the same, under the second prompt."""
    adapter = spy_of(9)
    method, seen = tuning(adapter, Exit(0), max_frames=17, min_new_frames=6, switch_frames=(12,)), []
    for _ in range(4):
        method.sample(switching(adapter))
        assert method.keeper.stream is not None
        seen.append((method.keeper.stream.length, shift(method.keeper.stream.condition)))
    assert seen == [(9, 1.0), (12, 1.0), (17, -2.0), (9, 1.0)]


def streams_of(method: StreamingTuningMethod, batch: Batch, count: int) -> list[list[RunningStream]]:
    """The stream at the end of each step, for so many streams, as the method draws them; no network is called."""
    found: list[list[RunningStream]] = []
    while len(found) <= count:
        stream = method.next_stream(batch)
        new = method.new_frames(stream, batch)
        assert new > 0
        if not stream.length:
            found.append([stream])
        stream = method.keeper.stream = replace(stream, length=stream.length + new)
        found[-1].append(stream)
    return found[:count]


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (9, {"max_frames": 24, "min_new_frames": 9, "switch_frames": (20,)}),
        (9, {"max_frames": 20, "min_new_frames": 9, "switch_frames": (19,)}),
        (9, {"max_frames": 27, "min_new_frames": 9, "switch_frames": (9, 18)}),
        (9, {"max_frames": 30, "min_frames": 15, "scored_frames": 7, "switch_frames": (3, 16, 25), "reach": Reach(3)}),
        (9, {"max_frames": 6, "switch_frames": (2, 3), "reach": Reach(2)}),
        (21, {"max_frames": 240, "min_new_frames": 18, "switch_frames": tuple(range(21, 202, 18)), "reach": Reach(3)}),
    ],
    ids=str,
)
def test_every_stream_reaches_its_switch_and_none_its_end_too_late(frames: int, options: dict[str, Any]) -> None:
    method = tuning(adapter := spy_of(frames), on_switch="keep", **options)
    method.config.check_frames(frames)
    batch, switched_at = switching(adapter), set()
    for begun, *after in streams_of(method, batch, 300):
        assert after[-1].length <= begun.most <= method.config.longest(frames)
        if begun.switch is None:  # a drawn length that has no chunk behind the switch
            assert begun.switch_at + method.config.reach.chunk > begun.most
            continue
        lengths = [stream.length for stream in after if stream.switch is None]
        assert lengths, f"a stream of {begun.most} frames never switched at {begun.switch_at}"
        assert lengths[0] > begun.switch_at, "the first step under the second prompt"
        switched_at.add(begun.switch_at)
    assert switched_at == set(method.config.switch_starts(frames))


def test_a_switch_that_leaves_no_chunk_is_refused() -> None:
    with pytest.raises(UserError, match=r"switch_frames: .* frame 22 leaves no chunk of 3 .* 19 is the last"):
        StreamingTuningConfig(reach=Reach(3), max_frames=22, switch_frames=(9, 20)).check_frames(7)
    StreamingTuningConfig(reach=Reach(3), max_frames=22, switch_frames=(9, 19)).check_frames(7)
    with pytest.raises(UserError, match=r"frame 5 leaves no chunk of 2 .* \(method.max_frames 6\); 3 is the last"):
        StreamingTuningConfig(reach=Reach(2), max_frames=6, switch_frames=(4,)).check_frames(9)
    StreamingTuningConfig(reach=Reach(2), max_frames=6, switch_frames=(3,)).check_frames(9)
    with pytest.raises(UserError, match=r"frame 4 leaves no chunk of 3 .* \(method.max_frames 6\); none would do"):
        StreamingTuningConfig(reach=Reach(3), max_frames=6, switch_frames=(1,)).check_frames(7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scored_frames": 8}, r"method.scored_frames: the model's videos have 7 latent frames .* got 8"),
        ({"min_new_frames": 8}, "method.min_new_frames: at most the 7 scored frames, got 8"),
    ],
)
def test_more_frames_than_the_teacher_sees_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamingTuningConfig(max_frames=12, **options).check_frames(7)


def test_behind_a_cut_the_first_chunk_takes_its_own_times() -> None:
    """As in a stream that is cut while it plays."""
    adapter = spy_of(4)
    options = {"on_switch": "cut", "first_ladder": (1.0, 0.9, 0.8), "last_exit_only": True}
    method = tuning(adapter, max_frames=12, min_new_frames=2, switch_frames=(4,), **options)
    for _ in range(2):
        adapter.calls.clear()
        method.sample(switching(adapter))
        times = [round(float(call.t.flatten()[0]), 3) for call in adapter.of(method.student)]
        assert times[:4] == [1.0, 0.9, 0.8, 1.0]


def test_switches_are_drawn_and_begin_at_chunks() -> None:
    adapter = spy_of(7)
    method = tuning(adapter, reach=Reach(3), max_frames=40, switch_frames=(2, 9, 20))
    batch = switching(adapter)
    assert {method.switch_frame(batch) for _ in range(60)} == {4, 10, 22}
    drawn = [method.begun(batch) for _ in range(3)]
    assert all(stream.switch is batch.switch for stream in drawn)


def test_prompts_without_a_second_one_are_refused() -> None:
    adapter = spy_of(4)
    method = tuning(adapter, switch_frames=(5,), max_frames=8)
    assert method.config.switches
    with pytest.raises(UserError, match=r"data\.switch_prompts"):
        method.sample(prompts(adapter))
    assert not StreamingTuningConfig().switches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch_frames": (8,), "max_frames": 8}, "switch_frames: below max_frames 8"),
        ({"min_new_frames": 5, "scored_frames": 4, "max_frames": 9}, "min_new_frames: at most scored_frames"),
        ({"on_switch": "forget"}, "on_switch"),
        ({"scored_frames": 2, "reach": Reach(3)}, "scored_frames: at least a chunk of 3"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingTuningConfig(**options)


def test_another_size_of_batch_begins_a_stream() -> None:
    adapter = spy_of(4)
    method = tuning(adapter, Exit(0), max_frames=12)
    method.sample(prompts(adapter))
    method.sample(prompts(adapter, 3))
    assert method.keeper.stream is not None
    assert method.keeper.stream.length == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_stream_comes_back_from_a_checkpoint_to_the_bit(steps: int) -> None:
    """Before a switch, at it and behind it; through the tensors and the JSON of a checkpoint."""
    adapter = spy_of(4)
    options = {"max_frames": 14, "min_new_frames": 2, "switch_frames": (6,), "reach": Reach(1, window=2, sink=1)}
    one, other = (tuning(adapter, **options) for _ in range(2))
    batch = switching(adapter)
    for step in range(steps):
        list(one.losses(batch, step))
    tensors, plain = split_state(one.keeper.state_dict())
    other.keeper.load_state_dict(join_state(tensors, json.loads(json.dumps(plain))))
    other.rng.load_state_dict(one.rng.state_dict())
    for step in range(steps, steps + 4):
        for mine, theirs in zip(one.losses(batch, step), other.losses(batch, step), strict=True):
            assert torch.equal(mine.value, theirs.value)
    kept = [method.keeper.stream for method in (one, other)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[0].length == kept[1].length
    assert torch.equal(kept[0].latents, kept[1].latents)


def test_sampling_on_the_way_changes_nothing() -> None:
    """As a validation does, over the same student."""
    found = []
    for validated in (False, True):
        adapter = spy_of(4)
        method, batch = tuning(adapter, max_frames=14, switch_frames=(6,)), switching(adapter)
        values = []
        for step in range(4):
            values += [loss.value.detach() for loss in method.losses(batch, step)]
            if validated:
                spec = SamplerSpec(LADDER.times, 1.0, "renoise", Reach(1))
                sample(method.student, SampleNoise([1, 2]), adapter.codec.latent_shape, spec, batch.condition)
        found.append(torch.stack(values))
    assert torch.equal(*found)


def test_without_a_stream_there_is_no_state_and_other_processes_begin_anew() -> None:
    adapter = spy_of(4)
    method = tuning(adapter)
    assert method.keeper.state_dict() == {}
    method.sample(prompts(adapter))
    state = method.keeper.state_dict()
    method.keeper.load_state_dict({})
    assert method.keeper.stream is None
    method.keeper.load_state_dict(state)
    assert method.keeper.stream is not None
    assert isinstance(method.keeper.stream.past, Past)
    assert "anew" in method.keeper.load_foreign_state(state, 3)
    assert method.keeper.stream is None
