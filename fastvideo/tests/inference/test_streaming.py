"""Streams against whole samples, against each other, and against what a switch means."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastvideo.data.video_io import to_frames
from fastvideo.distillation.adapters.diffusers.view import View
from fastvideo.distillation.chunks import Past, Reach
from fastvideo.distillation.sample import SamplerSpec, prompt_seeds
from fastvideo.errors import UserError
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.inference.stream_batches import StreamBatch, continued
from fastvideo.inference.streaming import Streamer, window_note, with_window
from fastvideo.inference.video_stream import Frames, VideoStream
from fastvideo.tests.distillation.tiny import wan_folder

OLD, NEW = "a green seven moving left", "a red seven moving up"
REACH = Reach(1, window=2, sink=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = wan_folder(tmp_path_factory.mktemp("wan"))
    size = {"height": 16, "width": 32, "num_frames": 25, "max_sequence_length": 8}
    return load_model(str(folder), size)


def spec(reach: Reach | None = REACH, guidance: float = 1.0) -> SamplerSpec:
    return SamplerSpec((1.0, 0.6), guidance, "renoise", reach)


@pytest.fixture(scope="module")
def streamer(model: LoadedModel) -> Streamer:
    return Streamer(model, spec())


def taken(stream: Iterable[Frames], count: int | None = None) -> Frames:
    """Frames of the next chunks, or of all."""
    return np.concatenate(list(itertools.islice(stream, count)))


@pytest.mark.parametrize(
    "sampler",
    [
        spec(),
        spec(Reach(3)),
        spec(Reach(2, window=2), guidance=1.5),
        replace(spec(Reach(2)), kind="euler", guidance=2.0),
        replace(spec(Reach(2, window=2)), context_time=0.1, first_times=(1.0, 0.7, 0.4)),
    ],
    ids=str,
)
def test_a_stream_is_the_sampled_video(model: LoadedModel, sampler: SamplerSpec) -> None:
    """7 latent frames: the first chunk takes the remainder."""
    latents = sample_latents(model.adapter, model.denoiser, Sampling([OLD], sampler, 5))
    whole = to_frames(model.adapter.codec.decode(latents)[0])
    chunks = list(Streamer(model, sampler, seed=5).open(OLD, frames=25))
    difference = np.abs(np.concatenate(chunks).astype(int) - whole)
    assert difference.max() <= 1, "a convolution may round by its number of frames, and a pixel then by one level"
    assert (difference > 0).mean() < 0.001
    reach = sampler.reach
    assert reach is not None
    assert [len(chunk) for chunk in chunks[1:]] == [4 * reach.chunk] * (7 // reach.chunk - 1)


def test_an_endless_stream_begins_like_a_finite_one(streamer: Streamer) -> None:
    with streamer.open(OLD) as endless:
        assert np.array_equal(taken(endless, 7), taken(streamer.open(OLD, frames=25)))
        assert endless.frames == 25
        assert next(endless).shape == (4, 16, 32, 3)
    assert list(endless) == []


def test_the_past_stays_as_large_as_the_window(streamer: Streamer) -> None:
    stream, sizes = streamer.open(OLD), []
    for _ in range(8):
        next(stream)
        sizes.append((stream.stats.past_bytes, stream.stats.decoder_bytes))
    assert sizes[3:] == [sizes[3]] * 5
    assert sizes[2][0] < sizes[3][0]


def test_two_streams_with_swapped_prompts(streamer: Streamer) -> None:
    alone = [taken(streamer.open(prompt), 5) for prompt in (OLD, NEW)]
    both = [streamer.open(prompt) for prompt in (OLD, NEW)]
    found = [np.concatenate(chunks) for chunks in zip(*([next(s) for s in both] for _ in range(5)), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
    assert not np.array_equal(*alone)


def test_two_threads_on_one_network(model: LoadedModel, streamer: Streamer) -> None:
    """A stream beside sampling of whole videos, whose calls must not see the stream's past."""
    expected = taken(streamer.open(OLD), 12)
    wanted = Sampling([NEW], spec(None), 1)
    whole = sample_latents(model.adapter, model.denoiser, wanted)
    found: list[torch.Tensor] = []

    def measure() -> None:
        found.extend(sample_latents(model.adapter, model.denoiser, wanted) for _ in range(12))

    other = threading.Thread(target=measure, daemon=True)
    other.start()
    streamed = taken(streamer.open(OLD), 12)
    other.join(60)
    assert not other.is_alive()
    assert np.array_equal(streamed, expected)
    assert len(found) == 12
    assert all(torch.equal(latents, whole) for latents in found)


def test_a_snapshot_goes_on_twice(streamer: Streamer) -> None:
    stream = streamer.open(OLD)
    taken(stream, 4)
    stream.prompt(NEW, "keep")
    kept = stream.snapshot()
    expected = taken(stream, 4)
    stream.close()
    for _ in range(2):
        again = streamer.resume(kept)
        assert np.array_equal(taken(again, 4), expected)
        assert (again.frames, again.prompt_in_force) == (29, NEW)


@pytest.fixture
def no_old_objects() -> Iterator[None]:
    """Hide the million objects of torch and its company from the collector: only what is made from here on is seen."""
    gc.freeze()
    yield
    gc.unfreeze()


def views() -> list[View]:
    """Views with rotated keys that somebody holds."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is View and found.turned]


@pytest.mark.usefixtures("no_old_objects")
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_between_chunks_nobody_holds_rotated_keys(model: LoadedModel, guidance: float) -> None:
    """Neither a stream nor its snapshots, also after others went on from them; those share the chunks they have in
    common."""
    streamer = Streamer(model, spec(guidance=guidance))
    stream, kept = streamer.open(OLD), []
    for _ in range(6):
        next(stream)
        kept.append(stream.snapshot())
    assert not views()
    others = [streamer.resume(moment) for moment in kept]
    for other in others:
        next(other)
    assert not views()
    pasts = [past for moment in kept for past in moment.pasts if isinstance(past, Past)]
    pieces = {id(piece) for past in pasts for piece in past.pieces}
    assert len(pieces) == 5 * (1 if guidance == 1.0 else 2), "the last of 6 chunks is in no past yet"


def test_a_closed_stream_has_no_past(streamer: Streamer) -> None:
    with streamer.open(OLD) as stream:
        next(stream)
    with pytest.raises(UserError, match="take the snapshot before it is closed"):
        stream.snapshot()


def switched(streamer: Streamer, policy: str, before: int = 5, prompt: str = NEW) -> VideoStream:
    """A stream after ``before`` chunks of the old prompt and one of the new."""
    stream = streamer.open(OLD)
    taken(stream, before)
    stream.prompt(prompt, policy)  # type: ignore[arg-type]
    next(stream)
    return stream


def past_of(stream: VideoStream) -> Past:
    past = stream.snapshot().pasts[0]
    assert isinstance(past, Past)
    return past


@pytest.mark.parametrize(
    ("policy", "starts"), [("recache", [0, 3, 4]), ("keep", [0, 3, 4]), ("flush", [0, 4]), ("cut", [])]
)
def test_what_a_switch_keeps(streamer: Streamer, policy: str, starts: list[int]) -> None:
    stream = switched(streamer, policy)
    assert [piece.start for piece in past_of(stream).pieces] == starts
    assert stream.switch is not None
    assert (stream.switch.frame, stream.switch.prompt, stream.prompt_in_force) == (17, NEW, NEW)


def test_a_prompt_alone_flushes(streamer: Streamer) -> None:
    """The policy under which a new prompt shows soonest, of those that go on with the scene."""
    stream = streamer.open(OLD)
    taken(stream, 5)
    stream.prompt(NEW)
    next(stream)
    assert [piece.start for piece in past_of(stream).pieces] == [0, 4]


def test_the_past_under_each_policy(streamer: Streamer) -> None:
    """``keep`` holds keys of the old text; ``recache`` those of one that made the same latents under the new text."""
    kept, recached = past_of(switched(streamer, "keep")), past_of(switched(streamer, "recache"))
    same = past_of(switched(streamer, "recache", prompt=OLD.replace("a ", "a  ")))  # a prompt of the same tokens
    for i, j, k in zip(kept.pieces, recached.pieces, same.pieces, strict=True):
        assert torch.equal(i.latents, j.latents)
        last = [piece.layers[-1][1] for piece in (i, j, k)]
        assert not torch.allclose(last[0], last[1], atol=1e-3)
    full = Streamer(streamer.model, spec(Reach(1)))
    for old, new in zip(
        past_of(switched(full, "keep")).pieces, past_of(switched(full, "recache", prompt=OLD)).pieces, strict=True
    ):
        torch.testing.assert_close(old.layers, new.layers, rtol=1e-5, atol=1e-5)


def test_a_cut_begins_a_new_video(streamer: Streamer) -> None:
    """One frame, as every video begins, and another sink."""
    stream = streamer.open(OLD, frames=25)
    taken(stream, 3)
    stream.prompt(NEW, "cut")
    lengths = [len(frames) for frames in stream]
    assert lengths == [1, 4, 4, 4, 3]
    assert stream.frames == 25


def test_one_recache_per_accepted_prompt(streamer: Streamer) -> None:
    stream, calls = streamer.open(OLD), []
    taken(stream, 5)
    for prompt in (OLD, NEW):
        stream.prompt(prompt, "recache")
    with streamer.model.network.register_forward_hook(lambda *_: calls.append(1)):
        next(stream)
        first = len(calls)
        next(stream)
    assert (first, len(calls) - first) == (2 + 1 + 3, 2 + 1)  # a commit, and the window and sink of 3 again
    assert stream.prompt_in_force == NEW


def test_a_bad_prompt_leaves_the_stream_as_it_was(streamer: Streamer) -> None:
    expected, stream = taken(streamer.open(OLD), 6), streamer.open(OLD)
    begun = taken(stream, 3)
    with pytest.raises(UserError, match="prompt has 12 tokens, the text encoder takes 8"):
        stream.prompt("a green seven moving up left a red seven moving up")
    with pytest.raises(UserError, match=r"on_switch 'recash': one of recache, keep.*did you mean 'recache'"):
        stream.prompt(NEW, "recash")  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate([begun, taken(stream, 3)]), expected)


def test_stats(streamer: Streamer) -> None:
    stream = streamer.open(OLD)
    assert (stream.stats.first_frame_ms, stream.stats.fps) == (None, 0.0)
    taken(stream, 4)
    stats = stream.stats
    assert stats.first_frame_ms is not None
    assert (stats.frames, stats.chunks) == (13, 4)
    assert min(stats.commit_ms, stats.denoise_ms, stats.decode_ms) > 0
    assert stats.chunk_ms == pytest.approx(stats.commit_ms + stats.denoise_ms + stats.decode_ms)
    assert 0.5 < stats.fps * stats.chunk_ms / 4000 < 2
    assert streamer.describe(stats.past_bytes).startswith(
        "stream: chunks of 1, window 2 + sink 1, 2 calls + 1 commit per chunk, past "
    )


@pytest.mark.parametrize(
    ("frames", "message"), [(24, r"one more than a multiple of 4.*21 or 25"), (0, "1 or 5"), (5, "no chunk of 3")]
)
def test_frames_that_no_video_has(model: LoadedModel, frames: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Streamer(model, spec(Reach(3))).open(OLD, frames=frames)


@pytest.fixture(scope="module")
def clip() -> Frames:
    return np.random.default_rng(0).integers(0, 256, (13, 16, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("reach", [REACH, Reach(1), Reach(3)], ids=str)
def test_a_stream_goes_on_from_given_frames(model: LoadedModel, clip: Frames, reach: Reach) -> None:
    """Its frames are the continuation of a past of these frames, and before them what the decoder makes of them."""
    sampler = spec(reach, guidance=1.5)
    latents = model.adapter.codec.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    real = torch.cat([latents, torch.zeros_like(latents[:, :, : reach.chunk])], dim=2)
    batch = StreamBatch(model, sampler, [OLD], prompt_seeds(5, [OLD]))
    ((_, expected),) = continued(batch, real, (4,), 4 * reach.chunk)
    stream = Streamer(model, sampler, seed=5).open(OLD, given=clip)
    given, made = taken(stream, 1 if reach.chunk == 3 else 4), taken(stream, 1)
    decoded = to_frames(model.adapter.codec.decode(latents)[0])
    assert np.abs(given.astype(int) - decoded).max() <= 1, "a convolution may round by its number of frames"
    assert np.array_equal(np.concatenate([given[-1:], made]), to_frames(expected[0]))
    assert stream.frames == 13 + 4 * reach.chunk


def test_a_moment_among_given_frames(streamer: Streamer, clip: Frames) -> None:
    """It goes on with those that are left; a cut forgets them; the times of chunks are those of made ones."""
    stream = streamer.open(OLD, given=clip)
    taken(stream, 2)
    moment = stream.snapshot()
    assert stream.stats.fps == 0.0
    whole = taken(stream, 4)
    assert stream.stats.fps > 0.0
    again = streamer.resume(moment)
    assert np.array_equal(taken(again, 4), whole)
    cut = streamer.resume(moment)
    cut.prompt(NEW, "cut")
    assert [len(chunk) for chunk in itertools.islice(cut, 3)] == [1, 4, 4]
    assert cut.stats.fps > 0.0


def test_the_last_chunk_behind_given_frames_is_cut_at_the_end(model: LoadedModel, clip: Frames) -> None:
    whole, cut = (Streamer(model, spec(Reach(3))).open(OLD, frames=n, given=clip) for n in (25, 17))
    assert np.array_equal(taken(cut), taken(whole)[:17])


@pytest.mark.parametrize(
    ("count", "frames", "message"),
    [
        (12, None, "12 frames: one more than a multiple of 4 is expected, such as 9 or 13"),
        (5, None, "the first chunk of this model has 9 frames, and it never met a shorter one: .* got 5"),
        (13, 13, "given: 13 frames, and a video of 13 has none behind them"),
    ],
)
def test_given_frames_that_are_refused(
    model: LoadedModel, clip: Frames, count: int, frames: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Streamer(model, spec(Reach(3))).open(OLD, frames=frames, given=clip[:count])


def test_given_frames_of_another_form_are_refused(streamer: Streamer, clip: Frames) -> None:
    for other in (clip[:, :8], clip.astype(np.float32), clip[0]):
        with pytest.raises(UserError, match=r"given: frames are uint8 \[n, 16, 32, 3\], got (uint8|float32) \["):
            streamer.open(OLD, given=other)


def test_a_seed_below_zero(streamer: Streamer) -> None:
    with pytest.raises(UserError, match="seed must be 0 or more, got -1"):
        streamer.open(OLD, seed=-1)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (spec(None), "generates whole videos at once"),
        (SamplerSpec((0.8, 0.4), 1.0, "renoise", REACH), "start from pure noise, time 1, and the ladder from 0.8"),
    ],
    ids=["whole", "ladder"],
)
def test_models_that_cannot_stream(model: LoadedModel, sampler: SamplerSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Streamer(model, sampler)


def test_another_window_is_warned_of() -> None:
    assert window_note(spec(), None) is None
    assert window_note(spec(), 2) is None
    assert "trained with a window of 2, and window 4" in str(window_note(spec(), 4))
    assert with_window(spec(), 4).reach == Reach(1, window=4, sink=1)
    with pytest.raises(UserError, match=r"^window: a positive multiple of chunk 3"):
        with_window(spec(Reach(3, window=3)), 4)
