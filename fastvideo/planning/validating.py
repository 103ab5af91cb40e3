"""Bytes of a validation beside what stays in memory: a forward of a batch, then the decoding of that batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec
from fastvideo.distillation.builder import Config
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.frames import latent_frames
from fastvideo.distillation.rollout import full_time
from fastvideo.planning.fake import FakeRun, LiveBytes, fake_codec, fake_run, one_thread

FEW_FRAMES = 4
"""Latent frames after which decoding holds as much for each further one: autoencoders of videos go frame by frame."""


def validation_bytes(config: Config, processes: Processes, gathered: int) -> int:
    """The most that a validation holds on one process; 0 without validations.

    Args:
        gathered: bytes of split networks that are whole while they compute.
    """
    if not config.validation.every:
        return 0
    batch = {"data": config.data.model_copy(update={"batch_size": config.validation_batch})}
    run = fake_run(config.model_copy(update=batch), replace(processes, memory=None), depth=1, gathered=gathered > 0)
    with run.mode, one_thread(), torch.no_grad():
        return max(_forward(run) // processes.context + gathered, decode_bytes(run, config.validation.frames))


def _forward(run: FakeRun) -> int:
    """A forward of the student; without gradient it holds as much at every depth."""
    batch, student = run.batch(), run.method.bundle["student"]
    with LiveBytes() as memory:
        x = torch.empty(batch.shape)
        student.velocity(x, full_time(x, 1.0), batch.condition)
    return memory.peak


def decode_bytes(run: FakeRun, frames_of_stream: int | None = None) -> int:
    """Latents of a batch to videos, extended from a few latent frames to all, or to those of longer streams."""
    codec = run.families.main.codec
    if not isinstance(codec, DiffusersCodec):
        return 0
    fake_codec(run.families.main, run.mode)
    batch, (channels, frames, *size) = run.config.data.batch_size, codec.latent_shape
    frames = latent_frames(frames_of_stream, codec.temporal) if frames_of_stream else frames
    few = min(frames, FEW_FRAMES + frames % 2)  # some go two by two, and take an odd one together with the first
    found = []
    for count in (few,) if few == frames else (few, few + 2):
        latents = torch.empty(batch, channels, count, *size)
        with LiveBytes() as memory:
            codec.decode(latents)
        found.append(memory.peak)
    return int(found[0] + (found[-1] - found[0]) * (frames - few) / 2)
