"""Sampling shared between the processes of a run: each takes some of the prompts, the main one gets all videos."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvideo.distillation.builder import Adapter
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.runtime import Processes
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.stopping import Stopped, step_done


@dataclass(frozen=True)
class SharedSampler:
    """Samples and decodes prompts on all processes; a split network needs the same forwards on each, which it gets.

    Args:
        family: of the sampled networks.
        processes: this one among all.
    """

    family: Adapter
    processes: Processes

    @property
    def writes(self) -> bool:
        """True if this process gets the results."""
        return self.processes.is_main

    def from_main(self, latents: Tensor | None, count: int) -> Tensor:
        """Latents ``[count, C, F, H, W]`` of the main process on every process's device; the others pass ``None``."""
        return self.processes.spread_from_main(latents, (count, *self.family.codec.latent_shape))

    def rows(self, count: int) -> list[int]:
        """Prompts of this process; equally many on all, so the last ones may be sampled more than once."""
        ranks, rank = self.processes.data_size, self.processes.data_rank
        each = -(-count // ranks)
        return [min(rank + ranks * i, count - 1) for i in range(each)]

    def videos(self, denoiser: Denoiser, wanted: Sampling) -> Tensor | None:
        """Videos ``[N, 3, T, H, W]`` of all prompts on the main process; ``None`` on the others."""
        return self._joined(
            self.decode(self._own(denoiser, wanted), wanted.batch_size, together=True), len(wanted.prompts)
        )

    def latents_and_videos(self, denoiser: Denoiser, wanted: Sampling, label: str) -> tuple[Tensor, Tensor] | None:
        """Latents ``[N, C, F, H, W]`` and videos of all prompts on the main process; ``None`` on the others."""
        own, count = self._own(denoiser, wanted, label), len(wanted.prompts)
        videos = self._joined(self.decode(own, wanted.batch_size, together=True), count)
        latents = self._joined(own, count)
        return None if latents is None or videos is None else (latents, videos)

    def unit_done(self) -> None:
        """Count a unit of work that all processes do together, and stop there if a signal asked any of them to.

        Raises:
            Stopped: on all processes at the same unit.
        """
        step_done()
        if number := self.processes.stop_signal():
            raise Stopped(number)

    def _own(self, denoiser: Denoiser, wanted: Sampling, label: str | None = None) -> Tensor:
        mine = replace(wanted, rows=self.rows(len(wanted.prompts)))
        calls = len(mine.rows or ()) * wanted.sampler.calls_of(wanted.shape(self.family)[1])
        if label is None or self.processes.world_size > 1:
            return sample_latents(self.family, denoiser, mine, lambda done: self.unit_done())
        with PatientBar(label, calls) as bar:
            return sample_latents(self.family, denoiser, mine, bar)

    def decode(self, latents: Tensor, batch_size: int, *, together: bool = False) -> Tensor:
        """Videos ``[B, 3, T, H, W]`` of this process's latents, float32 on the host.

        Args:
            together: all processes decode equally many, so that they may stop in between.
        """
        done = self.unit_done if together or self.processes.world_size == 1 else step_done
        parts = []
        for part in latents.split(batch_size):
            done()
            parts.append(self.family.codec.decode(part.to(self.family.device)).float().cpu())
        return torch.cat(parts)

    def _joined(self, own: Tensor, count: int) -> Tensor | None:
        """Rows of all processes in the order of the prompts, without the repeated ones."""
        parts = self.processes.gather_to_main(own)
        return None if parts is None else parts.transpose(0, 1).flatten(0, 1)[:count]
