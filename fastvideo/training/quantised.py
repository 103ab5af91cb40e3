"""Quantised roles at the start of a run: how far their velocities are from those of the weights as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvideo.data.order import SampleStream
from fastvideo.distillation.builder import Config, merge_files
from fastvideo.distillation.bundle import Bridge, RoleHandle
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.runtime import Processes, Tracker
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.quantised_roles import has_unpacked, key_of, load_unpacked, quantised
from fastvideo.distillation.rng import stream_seed
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import Batch

TIMES = (0.2, 0.4, 0.6, 0.8)
"""Times of the comparison."""
LARGE = 0.02
"""Relative error from which a run says that its target is another one."""
SAMPLES = 4
"""Samples of the batch that are compared."""
STEPS = 8
"""Steps of the samples that stand for latents where a run has none."""


def quantised_notes(
    config: Config, trainer: DistillTrainer, data: SampleStream, tracker: Tracker, processes: Processes
) -> Iterator[str]:
    """Compare each quantised role with its weights as they were, on the run's next batch; the main process does it.

    The weights are read once more, to the host, and every layer is moved to the device for its call alone.
    """
    roles = quantised(config)
    if not roles or not processes.is_main:
        return
    if processes.context > 1:
        yield f"{', '.join(roles)}: quantised; the error is not measured with parallel.context above 1"
        return
    batch, bundle = trainer.prepare(data.source.read(data.rows_ahead(1))), trainer.method.bundle
    for role in roles:
        family: Any = bundle[role].adapter
        if not has_unpacked(config, family, role):
            yield f"{key_of(config, role)}: quantised; without its weights in full precision the error is not measured"
            continue
        errors = velocity_errors(config, bundle[role], batch, bundle.bridge("student", role))
        tracker.log({f"quantised/{role}_error_t{t:g}": error for t, error in errors.items()}, trainer.step)
        from_file = config.roles[role].storage == "gguf"
        exact = f"the weights of {config.model.path}" if from_file else "the weights as they were"
        yield _told(key_of(config, role), exact, errors)


def _told(where: str, exact: str, errors: Mapping[float, float]) -> str:
    listed = ", ".join(f"{error:.2%} at t = {t:g}" for t, error in errors.items())
    line = f"{where}: its velocities are off those of {exact} by {listed}"
    if max(errors.values()) <= LARGE:
        return line
    return f"{line}; WARNING: above {LARGE:.0%}, so the student learns another target: docs/quantised-teachers.md"


@torch.no_grad()
def velocity_errors(config: Config, handle: RoleHandle, batch: Batch, bridge: Bridge) -> dict[float, float]:
    """Relative error ``|u' - u| / |u|`` of a quantised role's velocity on a batch, by time.

    Its states are the batch's latents in the role's space, or else samples of the role itself, with noise.
    """
    family: Any = handle.adapter
    condition = batch.condition.rows(slice(0, SAMPLES))
    count = min(SAMPLES, len(batch))
    noise = SampleNoise([stream_seed(config.seed, "quantised", i) for i in range(count)], family.device)
    if batch.x0 is None:
        sampler = SamplerSpec.teacher(family.folder.teacher_times(STEPS), 1.0)
        x0 = sample(handle, noise, family.codec.latent_shape, sampler, condition)
    else:
        x0 = bridge(batch.x0[:count])
    times = {t: torch.full((count,), t, device=x0.device) for t in TIMES}
    states = {t: add_noise(x0, noise.like(x0), time) for t, time in times.items()}
    packed = {t: handle.velocity(states[t], times[t], condition) for t in TIMES}
    change = partial(merge_files, config, family, handle.name)
    whole = Denoiser(family, load_unpacked(config, family, handle.name, change))
    return {t: _relative(packed[t], whole.velocity(states[t], times[t], condition)) for t in TIMES}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
