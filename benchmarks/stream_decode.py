"""Cost of decoding a stream chunk by chunk beside decoding the whole video, per frame, and the memory of its state.

Both run in turn in one process and are timed by the processor's time, so that other work on the machine does not count.

    python benchmarks/stream_decode.py
    python benchmarks/stream_decode.py --model tiny_cogvideox --chunk 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fastvideo.distillation.abilities import frame_decoder
from fastvideo.distillation.adapters.base import Codec
from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter, CogVideoXConfig
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.chunks import spans


def codec_of(model: str, video_frames: int) -> Codec:
    """The codec of a family's pipeline."""
    if "cogvideox" in model:
        return CogVideoXAdapter(CogVideoXConfig(path=model, num_frames=video_frames)).codec
    return WanFamily(WanFamilyConfig(path=model, num_frames=video_frames)).codec


def streamed(codec: Codec, latents: torch.Tensor, chunk: int) -> tuple[torch.Tensor, int]:
    """Video decoded chunk by chunk, and the bytes of the decoder's state at the end."""
    decode = frame_decoder(codec)
    pieces = [decode(latents[:, :, start:end]) for start, end in spans(latents.shape[2], chunk)]
    return torch.cat(pieces, dim=2), decode.bytes


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(model: str, frames: int, chunk: int, repeats: int) -> dict[str, object]:
    """Medians over ``repeats`` of both ways in turn, for ``frames`` latent frames."""
    codec = codec_of(model, 4 * (frames - 1) + 1)
    latents = torch.randn(1, *codec.latent_shape, generator=torch.Generator().manual_seed(0))
    whole, (stream, state) = codec.decode(latents), streamed(codec, latents, chunk)
    times = [
        (seconds(lambda: codec.decode(latents)), seconds(lambda: streamed(codec, latents, chunk)))
        for _ in range(repeats)
    ]
    count = whole.shape[2]
    return {
        "model": model,
        "latent_frames": frames,
        "chunk": chunk,
        "whole_ms_per_frame": round(1e3 * statistics.median(a for a, _ in times) / count, 3),
        "stream_ms_per_frame": round(1e3 * statistics.median(b for _, b in times) / count, 3),
        "ratio": round(statistics.median(b / a for a, b in times), 3),
        "state_bytes": state,
        "bit_equal": torch.equal(whole, stream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, tiny_cogvideox, or a pipeline folder")
    parser.add_argument("--frames", type=int, default=33, help="latent frames of the video")
    parser.add_argument("--chunk", type=int, default=1, help="latent frames of a chunk")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(json.dumps(measure(arguments.model, arguments.frames, arguments.chunk, arguments.repeats)))


if __name__ == "__main__":
    main()
