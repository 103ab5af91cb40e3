"""Causal calls of CogVideoX, against the stock network with a mask, and its decoder of streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter, _rotary_table
from fastvideo.distillation.adapters.diffusers.discrete_vp import variance_preserving
from fastvideo.distillation.chunks import Masked, Past, Piece, Reach, masked_runs
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import Condition, Given
from fastvideo.errors import UserError
from fastvideo.inference.loading import load_model
from fastvideo.inference.streaming import Streamer
from fastvideo.tests.distillation.streaming.chunked import chunk_times, streamed
from fastvideo.tests.distillation.tiny import (
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    COGVIDEOX_15,
    cogvideox_config,
    cogvideox_folder,
)

PROMPTS = ["a green seven moving up", "red three"]
TEXT = 8
Make = Callable[..., Denoiser]


@pytest.fixture(scope="module")
def make(tiny_wan: Path) -> Make:
    def student(network: Mapping[str, Any] = COGVIDEOX_5B, frames: int = 33) -> Denoiser:
        """Random weights that are large enough for text and other frames to matter."""
        adapter = CogVideoXAdapter(cogvideox_config(cogvideox_folder(tiny_wan.parent, network), num_frames=frames))
        loaded, generator = adapter.folder.load_network(), torch.Generator().manual_seed(0)
        for parameter in loaded.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return Denoiser(adapter, loaded)

    return student


@pytest.fixture(scope="module")
def student(make: Make) -> Denoiser:
    return make()


@pytest.fixture(scope="module")
def condition(student: Denoiser) -> Condition:
    return student.adapter.conditioner.encode_prompts(PROMPTS)


def draw(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, frames, 2, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stock_with_a_mask(student: Denoiser, x: Tensor, t: Tensor, condition: Condition, reach: Reach, step: int) -> Tensor:
    """One call of the stock network and its own attention; text sees text, a chunk sees text and its runs of keys."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    stock = CogVideoXTransformer3DModel.from_config(student.network.config)
    stock.load_state_dict(student.network.state_dict())
    frames, tokens = x.shape[2], 2
    if step == 1:
        crop = get_resize_crop_region_for_grid((1, 2), 2, 1)
        table = get_3d_rotary_pos_embed(16, crop, (1, 2), frames)
    else:
        table = get_3d_rotary_pos_embed(16, None, (1, 2), frames // step, grid_type="slice", max_size=(1, 2))
    mask = torch.zeros(TEXT + frames // step * tokens, TEXT + frames // step * tokens, dtype=torch.bool)
    mask[:, :TEXT] = True
    for run in masked_runs(frames, reach, False):
        rows, *columns = (
            slice(*(TEXT + frame // step * tokens for frame in span)) for span in (run.queries, *run.keys)
        )
        for own in columns:
            mask[rows, own] = True
    native, key = variance_preserving(t), student.adapter.conditioner.key
    seen = native.from_flow(x)
    (v,) = stock.eval()(
        hidden_states=seen.transpose(1, 2), encoder_hidden_states=condition.of(key)["prompt_embeds"],
        timestep=student.adapter.folder.grid.timestep(t), image_rotary_emb=table, return_dict=False,
        attention_kwargs={"attention_mask": mask.expand(2, -1, -1)},
    )  # fmt: skip
    return native.flow_velocity_from_v(seen, v.transpose(1, 2))


REACHES = [
    Reach(1),
    Reach(3),
    Reach(1, window=3, positions="absolute"),
    Reach(1, window=2, sink=1, positions="absolute"),
    Reach(2, window=4, sink=2, positions="absolute"),
]


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_chunks_on_a_past_against_a_mask(student: Denoiser, condition: Condition, reach: Reach) -> None:
    """At one time for all chunks, which is what the stock network takes."""
    x, t = draw(9), torch.full((2, 9), 0.6)
    found = streamed(student, x, t, condition, reach)
    expected = stock_with_a_mask(student, x, t[:, 0], condition, reach, 1)
    assert (found - expected).abs().max() <= 2e-5
    bidirectional = student.velocity(x, t[:, 0], condition)
    assert (bidirectional - expected).abs().max() > 1e-3


def test_patches_over_two_frames(make: Make) -> None:
    """CogVideoX 1.5: chunks are whole patches, whose frames share a position."""
    student, reach = make(COGVIDEOX_15), Reach(2, window=4, positions="absolute")
    condition = student.adapter.conditioner.encode_prompts(PROMPTS)
    x, t = draw(8), torch.full((2, 8), 0.6)
    expected = stock_with_a_mask(student, x, t[:, 0], condition, reach, 2)
    assert (streamed(student, x, t, condition, reach) - expected).abs().max() <= 2e-5
    with pytest.raises(UserError, match=r"reach.chunk: patches of CogVideoX 1.5 span 2 latent frames, got 1"):
        student.velocity(x[:, :, :1], t[:, 0], condition, context=Past(Reach(1)))


def test_sine_positions_are_refused(make: Make) -> None:
    student = make(COGVIDEOX_2B)
    condition = student.adapter.conditioner.encode_prompts(PROMPTS)
    with pytest.raises(UserError, match="CogVideoX-2b adds the positions of a whole video"):
        student.commit(Past(Reach(1)), draw(1), condition)


@pytest.mark.parametrize("reach", [Reach(1), Reach(4, window=4), Reach(2, window=2, sink=2)], ids=str)
def test_teacher_forcing_is_what_a_stream_sees(student: Denoiser, condition: Condition, reach: Reach) -> None:
    x, clean, t = draw(9), draw(9, seed=1), chunk_times(9, reach.chunk)
    with torch.no_grad():
        forced = student.velocity(x, t, condition, context=Masked(reach, clean))
    assert torch.equal(forced, streamed(student, x, t, condition, reach, clean))


def test_teacher_forcing_sees_clean_chunks_of_the_past_alone(student: Denoiser, condition: Condition) -> None:
    x, clean, t, reach = draw(6), draw(6, seed=1), chunk_times(6, 2), Reach(2)
    swapped = torch.cat([clean[:, :, :2], draw(2, seed=2), clean[:, :, 4:]], dim=2)
    with torch.no_grad():
        one, two = (student.velocity(x, t, condition, context=Masked(reach, c)) for c in (clean, swapped))
        noisy = student.velocity(x, t, condition, context=Masked(reach, clean, clean_time=0.3))
    assert torch.equal(one[:, :, :4], two[:, :, :4])
    assert (one[:, :, 4:] - two[:, :, 4:]).abs().max() > 1e-3
    assert torch.equal(one[:, :, :2], noisy[:, :, :2])
    assert (one[:, :, 2:] - noisy[:, :, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_teacher_forcing(make: Make, condition: Condition, checkpointing: bool) -> None:
    """It is that of the chunks alone on the same pasts, and none comes from the clean latents."""
    student, alone = make(), make()
    x, clean, t, reach = draw(3).requires_grad_(), draw(3, seed=1).requires_grad_(), chunk_times(3, 1), Reach(1)
    if checkpointing:
        student.network.train()
        student.network.enable_gradient_checkpointing()
    student.velocity(x, t, condition, context=Masked(reach, clean)).square().sum().backward()
    past = Past(reach)
    for frame in range(3):
        own = x.detach()[:, :, frame : frame + 1]
        alone.velocity(own, t[:, frame], condition, context=past).square().sum().backward()
        past = alone.commit(past, clean.detach()[:, :, frame : frame + 1], condition)
    assert clean.grad is None
    assert x.grad is not None
    assert not any(value.requires_grad for piece in past.pieces for layer in piece.layers for value in layer)
    for mine, theirs in zip(student.network.parameters(), alone.network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_time_per_frame_is_refused_in_words(student: Denoiser, condition: Condition) -> None:
    x, t = draw(3), chunk_times(3, 1)
    with pytest.raises(UserError, match=r"CogVideoXAdapter takes one time per sample: .* teacher forcing works"):
        student.velocity(x, t, condition, context=Masked(Reach(1)))
    mask = torch.tensor([[True, False, False]]).expand(2, 3)
    given = Condition(condition.tensors, Given(mask, draw(3, seed=1)))
    with pytest.raises(UserError, match="conditioning frames need another family"):
        student.velocity(x, t, given, context=Masked(Reach(1), draw(3, seed=1)))


def test_a_stream_has_no_end(student: Denoiser, condition: Condition) -> None:
    """A window numbers its frames from 0. That is no shift: text has no position, so distances to it stay short."""
    x, t, reach = draw(1, seed=9), torch.full((2,), 0.5), Reach(1, window=2)
    past = Past(reach)
    for frame in range(40):
        past = student.commit(past, draw(1, seed=frame), condition)
    fresh = Past(replace(reach, positions="absolute"), _renumbered(past.pieces), past.frames)
    late = replace(past, reach=fresh.reach)
    with torch.no_grad():
        window, start, absolute = (student.velocity(x, t, condition, context=c) for c in (past, fresh, late))
    assert torch.equal(window, start)
    assert (window - absolute).abs().max() > 1e-3


def _renumbered(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return tuple(replace(piece, start=number) for number, piece in enumerate(pieces))


def test_sampling_chunk_by_chunk(student: Denoiser, condition: Condition) -> None:
    negative = student.adapter.conditioner.encode_prompts(["", ""])
    spec = SamplerSpec((1.0, 0.6), 2.0, "euler", Reach(2))
    video = sample(student, SampleNoise([1, 2]), (4, 5, 2, 4), spec, condition, negative)
    alone = sample(student, SampleNoise([1]), (4, 5, 2, 4), spec, *(c.rows(slice(0, 1)) for c in (condition, negative)))
    assert video.shape == (2, 4, 5, 2, 4)
    torch.testing.assert_close(video[:1], alone, rtol=1e-4, atol=1e-4)
    begun = sample(student, SampleNoise([1, 2]), (4, 3, 2, 4), spec, condition, negative)
    assert begun.shape == (2, 4, 3, 2, 4)


SPLITS = [([1] * 9, [0, 0, 9, 0, 8, 0, 8, 0, 8]), ([3, 3, 3], [9, 8, 16]), ([5, 4], [17, 16]), ([3, 2, 4], [9, 8, 16])]


@pytest.fixture(scope="module")
def latents(student: Denoiser) -> Tensor:
    return draw(9, seed=4)


@pytest.fixture(scope="module")
def whole(student: Denoiser, latents: Tensor) -> Tensor:
    video: Tensor = student.adapter.codec.decode(latents)
    return video


@pytest.mark.parametrize(("split", "frames"), SPLITS, ids=str)
def test_every_split_decodes_to_the_frames_of_the_whole(
    student: Denoiser, latents: Tensor, whole: Tensor, split: list[int], frames: list[int]
) -> None:
    decode = student.adapter.codec.frame_decoder()
    pieces = [decode(chunk) for chunk in latents.split(split, dim=2)]
    assert [piece.shape[2] for piece in pieces] == frames
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_streams_and_whole_videos_interleaved(student: Denoiser, latents: Tensor, whole: Tensor) -> None:
    codec = student.adapter.codec
    one, two = codec.frame_decoder(), codec.frame_decoder()
    mine, theirs, sizes = [], [], []
    for chunk in latents.split([3, 2, 2, 2], dim=2):
        mine.append(one(chunk))
        codec.decode(latents[:, :, :3])
        theirs.append(two(-chunk))
        sizes.append(one.bytes)
    assert torch.equal(torch.cat(mine, dim=2), whole)
    assert torch.equal(torch.cat(theirs, dim=2), codec.decode(-latents))
    assert len(set(sizes)) == 1
    assert sizes[0] > 0


def test_the_frame_before_a_video_of_1_5_is_dropped(make: Make) -> None:
    """Patches over two frames put one before the video's own; a decoded stream does not have it either."""
    codec = make(COGVIDEOX_15, frames=17).adapter.codec
    latents = draw(codec.latent_shape[1], seed=5)
    assert latents.shape[2] == 6
    decode = codec.frame_decoder()
    pieces = [decode(chunk) for chunk in latents.split(2, dim=2)]
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode(latents))


def test_processors_are_kept(make: Make, condition: Condition) -> None:
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    student = make()
    blocks: nn.Module = student.network.get_submodule("transformer_blocks")
    blocks.get_submodule("1.attn1").set_processor(CogVideoXAttnProcessor2_0())
    with pytest.raises(UserError, match=r"transformer_blocks.1.attn1 has the processor CogVideoXAttnProcessor2_0"):
        student.commit(Past(Reach(1)), draw(1), condition)
    assert student.velocity(draw(3), torch.full((2,), 0.5), condition).isfinite().all()


def test_a_table_of_inference_mode_serves_training(make: Make, condition: Condition) -> None:
    """Tables of whole videos are kept, whoever asked for them first."""
    _rotary_table.cache_clear()
    student, arguments = make(), (draw(3), torch.full((2,), 0.5), condition)
    with torch.inference_mode():
        expected = student.velocity(*arguments)
    found = Denoiser(student.adapter, student.network.requires_grad_(True)).velocity(*arguments)
    found.square().mean().backward()
    assert torch.equal(found, expected)


def test_a_live_stream_gives_frames_at_every_turn(tiny_wan: Path) -> None:
    """With chunks of one frame the decoder waits for its group; who iterates does not see that."""
    size = {"height": 16, "width": 32, "num_frames": 33, "max_sequence_length": TEXT}
    model = load_model(str(cogvideox_folder(tiny_wan.parent)), size)
    sampler = SamplerSpec((1.0, 0.6), 1.0, "renoise", Reach(1, window=2))
    with Streamer(model, sampler).open(PROMPTS[0], frames=25) as stream:
        pieces = list(stream)
    assert [len(piece) for piece in pieces] == [9, 8, 8]
    with Streamer(model, sampler).open(PROMPTS[0]) as stream:
        next(stream)
        snapshot = stream.snapshot()
        expected = next(stream)
    with Streamer(model, sampler).resume(snapshot) as again:
        assert np.array_equal(next(again), expected)
