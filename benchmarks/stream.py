"""What a stream costs: against recomputing its past, over its length, in memory, and beside a hand-written loop.

    python benchmarks/stream.py                          # all sections, minutes; one JSON object as the last line
    python benchmarks/stream.py --only recompute loop
    python benchmarks/stream.py --cpu-time               # on a machine that does other work too

All on the tiny network with its shipped weights, chunks of one latent frame (4 video frames), 4 calls and a commit per
chunk, window 8 + sink 1. What is compared runs in turn in one process, so that a disturbance meets both.

recompute   a call of the last chunk on its past / one bidirectional call over all frames: what a cache saves. The tiny
            network has 4 tokens per frame, so that a call is mostly launches: its ratios are not those of a real model
position    a chunk at position 400 / the first with a full window
memory      growth of the process over thousands of chunks; past and decoder
loop        a chunk / the same calls in a loop by hand over diffusers' modules alone: no view, no denoiser, no sampler
decode      chunk by chunk / the whole video at once, per frame
live        first frame after ``open``, frames per second
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from fastvideo.distillation.abilities import frame_decoder
from fastvideo.distillation.chunks import Masked, Past, Reach
from fastvideo.distillation.noise import full_time
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.streaming import Streamer
from fastvideo.inference.video_stream import VideoStream

PROMPT, TIMES, WINDOW = "a red seven moving left", (1.0, 0.9, 0.75, 0.5), Reach(1, window=8, sink=1)
Clock = Callable[[], float]


def median_seconds(clock: Clock, repeats: int, *actions: Callable[[], object]) -> list[float]:
    """Median seconds of each action; all take turns."""
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for seconds, action in zip(found, actions, strict=True):
            begin = clock()
            action()
            seconds.append(clock() - begin)
    return [statistics.median(seconds[1:]) for seconds in found]  # the first one warms up


def tiny(side: int = 32) -> LoadedModel:
    """The shipped pipeline for videos of this height and width."""
    return load_model("tiny", {"height": side, "width": side, "num_frames": 33})


def streamer() -> Streamer:
    """The tiny network as a streaming student."""
    made = Streamer(tiny(), SamplerSpec(TIMES, 1.0, "renoise", WINDOW))
    made.warm_up()
    return made


def recompute(clock: Clock, repeats: int) -> dict[str, Any]:
    """A cached call of the last chunk against a call over the whole prefix."""
    found = {}
    for name, side, frames, reach in (
        ("33", 32, 33, Reach(1)),
        ("33_window", 32, 33, WINDOW),
        ("129", 32, 129, Reach(1)),
        ("129_window", 32, 129, WINDOW),
        ("33_of_16x16", 128, 33, Reach(1)),
        ("33_of_16x16_window", 128, 33, WINDOW),
    ):
        cached, whole = median_seconds(clock, repeats, *recompute_calls(tiny(side), frames, reach))
        found[name] = {"cached_ms": 1000 * cached, "recompute_ms": 1000 * whole, "ratio": whole / cached}
        print(f"recompute  {name:12} {1000 * cached:8.1f} ms cached {1000 * whole:8.1f} ms whole", flush=True)
    return found


@torch.no_grad()
def recompute_calls(model: LoadedModel, frames: int, reach: Reach) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A call of the last of ``frames`` latent frames on its past, and one over all of them."""
    student, condition = model.denoiser, model.adapter.conditioner.encode_prompts([PROMPT])
    channels, _, *size = model.adapter.codec.latent_shape
    x = torch.randn(1, channels, frames, *size, generator=torch.Generator().manual_seed(0))
    past = Past(reach)
    for chunk in x[:, :, :-1].split(1, dim=2):
        past = student.commit(past, chunk, condition)

    def call(x_t: Tensor, context: Any) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: student.velocity(x_t, full_time(x_t, 0.5), condition, context=context))

    # Bidirectional, and with computed positions: the tiny network's own table ends at 32 frames.
    whole = torch.no_grad()(
        lambda: student.velocity(x, torch.full((1, frames), 0.5), condition, context=Masked(Reach(frames)))
    )
    return call(x[:, :, -1:], past), whole


def position(clock: Clock, chunks: int) -> dict[str, Any]:
    """Chunks behind 400 others against those with the first full window, in turn."""
    made = streamer()
    near, far = advanced(made.open(PROMPT), 10), advanced(made.open(PROMPT), 400)
    first, later = median_seconds(clock, chunks, near.__next__, far.__next__)
    return {"first_full_window_ms": 1000 * first, "chunk_400_ms": 1000 * later, "ratio": later / first}


def advanced(stream: VideoStream, chunks: int) -> VideoStream:
    """The stream after so many chunks."""
    for _ in islice(stream, chunks):
        pass
    return stream


def memory(chunks: int) -> dict[str, Any]:
    """Resident memory after a hundred chunks, and after ``chunks`` more."""
    stream = advanced(streamer().open(PROMPT), 100)
    before, stats = resident(), stream.stats
    advanced(stream, chunks)
    grown, after = resident() - before, stream.stats
    assert (after.past_bytes, after.decoder_bytes) == (stats.past_bytes, stats.decoder_bytes)
    return {
        "chunks": chunks,
        "growth_mb": grown / 1e6,
        "past_bytes": stats.past_bytes,
        "decoder_bytes": stats.decoder_bytes,
    }


def resident() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HandAttention:
    """Self-attention of a layer over its own past, by hand."""

    def __init__(self, loop: HandLoop) -> None:
        self.loop, self.pieces = loop, list[tuple[Tensor, Tensor]]()

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, rotary_emb: Any = None, **__: Any) -> Tensor:
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        keys, values = (torch.cat([*(p[i] for p in self.pieces), own], dim=1) for i, own in enumerate((key, value)))
        if self.loop.committing:
            kept = [*self.pieces, (key, value)]
            self.pieces = kept if len(kept) <= 9 else [kept[0], *kept[2:]]
        cos, sin = self.loop.tables[keys.shape[1]]
        own = slice(keys.shape[1] - query.shape[1], None)
        query, keys = rotated(query, cos[:, own], sin[:, own]), rotated(keys, cos, sin)
        mixed = dispatch_attention_fn(query, keys, values)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in pairs."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class HandText:
    """Cross-attention of a layer, by hand: the keys of the one prompt are computed in the first call."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, text: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = (attn.heads, -1)
        if self.kept is None:
            self.kept = attn.norm_k(attn.to_k(text)).unflatten(2, heads), attn.to_v(text).unflatten(2, heads)
        mixed = dispatch_attention_fn(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads), *self.kept)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2, 3)))


class HandLoop:
    """A stream by hand: diffusers' network and decoder, window 8 + sink 1, chunks of one latent frame."""

    def __init__(self, model: LoadedModel, seed: int) -> None:
        self.network, self.vae = model.adapter.folder.load_network(), model.adapter.codec.vae
        self.generator = torch.Generator().manual_seed(seed)
        self.text = next(iter(model.adapter.conditioner.encode_prompts([PROMPT]).tensors.values()))["prompt_embeds"]
        config = self.vae.config
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        self.cache: list[Any] = [None] * self.vae._cached_conv_counts["decoder"]
        self.committing, self.last = False, None
        self.tables = {
            4 * frames: tuple(half[..., 0::2] for half in self.network.rope(torch.zeros(1, 16, frames, 4, 4)))
            for frames in range(1, 11)
        }
        for block in self.network.blocks:
            block.attn1.set_processor(HandAttention(self))
            block.attn2.set_processor(HandText())

    def call(self, x: Tensor, t: float) -> Tensor:
        return self.network(x, torch.full((1,), 1000 * t), self.text, return_dict=False)[0]

    @torch.no_grad()
    def chunk(self) -> Tensor:
        """Frames uint8 of the next chunk."""
        x = torch.randn(1, 16, 1, 4, 4, generator=self.generator)
        if self.last is not None:
            self.committing = True
            self.call(self.last, 0.0)
            self.committing = False
        for t, after in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
            x = x - t * self.call(x, t)
            if after:
                x = (1 - after) * x + after * torch.randn(x.shape, generator=self.generator)
        frame = self.vae.post_quant_conv(x * self.std + self.mean)
        video = self.vae.decoder(frame, feat_cache=self.cache, feat_idx=[0], first_chunk=self.last is None)
        self.last, video = x, unpatchify(video, patch_size=self.vae.config.patch_size)
        return ((video.clamp(-1, 1) + 1) * 127.5).round().byte()[0].permute(1, 2, 3, 0)


def loop(clock: Clock, chunks: int) -> dict[str, Any]:
    """Overhead over the loop by hand, whose frames are the same."""
    made = streamer()
    stream = made.open(PROMPT)
    hand = HandLoop(tiny(), stream.snapshot().noise.seeds[0])
    largest = 0
    for _ in range(12):
        mine, theirs = torch.from_numpy(next(stream)), hand.chunk()
        largest = max(largest, int((mine.int() - theirs.int()).abs().max()))
    own, by_hand = median_seconds(clock, chunks, stream.__next__, hand.chunk)
    return {"stream_ms": 1000 * own, "by_hand_ms": 1000 * by_hand, "ratio": own / by_hand, "frames_differ_by": largest}


def decode(clock: Clock, repeats: int) -> dict[str, Any]:
    """33 latent frames, one by one and at once."""
    codec = tiny().adapter.codec
    latents = torch.randn(1, 16, 33, 4, 4, generator=torch.Generator().manual_seed(0))

    def chunks() -> None:
        decoder = frame_decoder(codec)
        for chunk in latents.split(1, dim=2):
            decoder(chunk)

    streamed, whole = median_seconds(clock, repeats, chunks, lambda: codec.decode(latents))
    return {"streamed_ms": 1000 * streamed, "whole_ms": 1000 * whole, "ratio": streamed / whole}


def live(clock: Clock, chunks: int) -> dict[str, Any]:
    """First frame after ``open`` with a prompt that is new, and frames per second in a full window."""
    made, firsts = streamer(), []
    for digit in ("zero", "one", "two", "three", "four", "five", "six", "eight", "nine"):
        begin = clock()
        next(made.open(f"a red {digit} moving left"))
        firsts.append(clock() - begin)
    stream = advanced(made.open(PROMPT), 10)
    begin, before = clock(), stream.frames
    advanced(stream, chunks)
    fps, stats = (stream.frames - before) / (clock() - begin), stream.stats
    parts = {name: getattr(stats, name) for name in ("commit_ms", "denoise_ms", "decode_ms")}
    return {"first_frame_ms": 1000 * statistics.median(firsts), "fps": fps, **parts}


SECTIONS: dict[str, Callable[[argparse.Namespace, Clock], dict[str, Any]]] = {
    "recompute": lambda a, clock: recompute(clock, a.repeats),
    "position": lambda a, clock: position(clock, 50),
    "loop": lambda a, clock: loop(clock, 5 * a.repeats),
    "decode": lambda a, clock: decode(clock, max(3, a.repeats // 4)),
    "live": lambda a, clock: live(clock, 5 * a.repeats),
    "memory": lambda a, clock: memory(a.chunks),
}


def main() -> None:
    """Measure the sections, print them, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=20, help="calls of each kind")
    parser.add_argument("--chunks", type=int, default=2000, help="chunks over which memory is watched")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, on a machine that does other work too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    found: dict[str, Any] = {"clock": "cpu" if arguments.cpu_time else "wall"}
    for name in arguments.only:
        found[name] = SECTIONS[name](arguments, clock)
        print(f"{name:10} {found[name]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
