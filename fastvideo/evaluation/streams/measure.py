"""Measure streaming models: every row of the comparison has the same prompts, noise, real streams and switches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.chunks import Reach, spans
from fastvideo.distillation.frames import first_frame, latent_frames
from fastvideo.distillation.types import UserError
from fastvideo.environment import environment
from fastvideo.evaluation.evaluate import Evaluation, kind_of_row, students_of
from fastvideo.evaluation.measuring import video_shape
from fastvideo.evaluation.metrics import ATTRIBUTES, SampledRow, named_attributes
from fastvideo.evaluation.rows import RowSpec
from fastvideo.evaluation.statistics import Estimate, resample_counts
from fastvideo.evaluation.streams.drift import drift_figures, drift_series
from fastvideo.evaluation.streams.exposure import exposure_places, exposure_series
from fastvideo.evaluation.streams.latency import switch_figures
from fastvideo.evaluation.streams.sampling import RealStreams, SampledStreams, StreamSource, real_streams
from fastvideo.evaluation.streams.seams import seam_figures, seam_frames
from fastvideo.evaluation.streams.series import Series
from fastvideo.evaluation.streams.world import STRIDE, StreamJudge
from fastvideo.inference.loading import load_model
from fastvideo.inference.sampler import BATCH_SIZE
from fastvideo.inference.stream_batches import Change
from fastvideo.sampling_ranges import ON_SWITCH, OnSwitch
from fastvideo.tiny.classifier import FRAMES, WEIGHTS_NAME
from fastvideo.tiny.paths import CLASSIFIER_FOLDER
from fastvideo.tiny.switches import switch_pairs
from fastvideo.tiny.world import SIZE

FLOORED = (*(f"{name}_last" for name in ATTRIBUTES), "frechet_last")
"""Figures beside which a row has those of real streams, as ``NAME_floor``."""


@dataclass(frozen=True)
class StreamTask:
    """Measurement of every model.

    Attributes:
        judge: prompts and length of the streams.
        switches: prompt switches, none or at least 2.
        on_switch: treatment of the past at a switch.
        batch_size: streams made together.
        keep: first streams to return whole.
    """

    judge: StreamJudge
    switches: int = 0
    on_switch: OnSwitch = ON_SWITCH
    batch_size: int = BATCH_SIZE
    keep: int = 4
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class StreamRow(SampledRow):
    """The figures of a streaming model; ``network_calls`` are those of a chunk without its commit.

    Attributes:
        figures: by name, see ``drift_figures``, ``seam_figures``, ``switch_figures`` and ``exposure_series``.
        series: curves along the stream; those of real streams begin with ``real_``.
        streaming: chunk, window, sink and positions; empty for a model that makes whole videos.
    """

    figures: Mapping[str, Estimate | float]
    series: Mapping[str, Series]
    streaming: Mapping[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        own = dict(vars(self))
        lines = {name: line.to_dict() for name, line in own.pop("series").items()}
        return {**own.pop("figures"), **own, "series": lines}


def measure_streams(rows: Mapping[str, RowSpec], task: StreamTask) -> Evaluation[StreamRow]:
    """Measure every row beside the real streams through its own VAE.

    Raises:
        UserError: for a bad folder or sampler, or a model that cannot make such streams, before anything is sampled.
    """
    models = {spec.folder: load_model(spec.folder, device=task.device) for spec in rows.values()}
    judge, sources = task.judge, {}
    for name, spec in rows.items():
        model = models[spec.folder]
        sources[name] = StreamSource(name, model, spec.sampler(model), judge.frames, judge.seed, task.batch_size)
        check_streams(sources[name], bool(task.switches))
    reals: dict[str, RealStreams] = {}
    measured: dict[str, StreamRow] = {}
    videos: dict[str, Tensor] = {}
    for name, source in sources.items():
        key = source.model.adapter.codec.latent_key
        if key not in reals:
            reals[key] = real_streams(source.model, judge, task.batch_size)
        one = _Measurement(source, task, reals[key])
        measured[name], videos[name] = one.row(kind_of_row(rows[name], source.model)), one.sampled.videos
    return Evaluation(measured, videos, judge.prompts[: task.keep], _settings(task), students_of(rows, models))


def check_streams(source: StreamSource, switches: bool = False) -> None:
    """Check that a model can make such streams.

    Raises:
        UserError: if not.
    """
    name, codec, reach = source.name, source.model.adapter.codec, source.sampler.reach
    latents, (whole, height, width) = latent_frames(source.frames, codec.temporal), video_shape(source.model.adapter)
    if of_frames(source.model.adapter.conditioner).needs_frames:
        raise UserError(f"{name} has given frames in its condition, where streams have text alone")
    _check_size(name, (height, width))
    if reach is not None:
        spans(latents, reach.chunk)
        if switches:
            switch_latent(source.frames, reach, codec.temporal)
    elif source.frames != whole:
        raise UserError(
            f"{name} makes whole videos of {whole} frames, not streams (its recipe.json has no `streaming`): "
            f"--long {whole} measures those"
        )
    elif switches:
        raise UserError(f"{name} makes whole videos at once and has no prompt switches: leave out --switches")


def _check_size(name: str, size: tuple[int, int]) -> None:
    """Check that a model's frames are as large as the tiny world's."""
    if size != (SIZE, SIZE):
        raise UserError(
            f"streams are measured on the tiny world, whose frames are {SIZE}x{SIZE}; {name} makes {size[0]}x{size[1]}"
        )


def switch_latent(frames: int, reach: Reach, temporal: int) -> int:
    """First latent frame under a new prompt: that of a chunk in the middle of a stream of ``frames`` video frames.

    Raises:
        UserError: if there is none with a whole window before it and one after it.
    """
    latents = latent_frames(frames, temporal)
    edges = [start for start, _ in spans(latents, reach.chunk)[1:]]
    firsts = {edge: first_frame(edge, temporal) for edge in edges}
    fitting = [edge for edge in edges if FRAMES <= firsts[edge] <= frames - FRAMES]
    if not fitting:
        raise UserError(
            f"--long: a stream of {frames} frames in chunks of {reach.chunk} latent frames has no switch with a window "
            f"of {FRAMES} frames before it and one after it"
        )
    return min(fitting, key=lambda edge: abs(2 * edge - latents))


@dataclass(frozen=True)
class _Measurement:
    """All figures of one model."""

    source: StreamSource
    task: StreamTask
    real: RealStreams

    def row(self, kind: str) -> StreamRow:
        """The row of a model of this kind."""
        figures, series = self._drift()
        reach, sampler = self.reach, self.source.sampler
        if reach is not None:
            figures |= seam_figures(self.sampled.seen, self._seams(reach), self.task.judge.counts)
            bias = self._exposure()
            series |= bias
            figures |= {f"{name}_last": line[-1] for name, line in bias.items()}
            figures |= self._switches(reach) if self.task.switches else {}
        return StreamRow(
            figures=figures,
            series=series,
            streaming={} if reach is None else vars(reach),
            samples=len(self.task.judge.prompts),
            network_calls=sampler.network_calls,
            steps=len(sampler.times),
            guidance=sampler.guidance,
            sampler=sampler.kind,
            denoise_seconds_per_video=self.sampled.denoise_seconds,
            end_to_end_seconds_per_video=self.sampled.seconds,
            batch_size=self.task.batch_size,
            kind=kind,
        )

    @property
    def reach(self) -> Reach | None:
        return self.source.sampler.reach

    @property
    def temporal(self) -> int:
        return self.source.model.adapter.codec.temporal

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Latent frames at which real streams are continued."""
        return exposure_places(self.source.frames, self.reach, self.temporal, STRIDE)

    @cached_property
    def bias_starts(self) -> tuple[int, ...]:
        """First frames of the windows behind :attr:`places`: each is the last one of the past."""
        return tuple(first_frame(place, self.temporal) - 1 for place in self.places)

    @cached_property
    def sampled(self) -> SampledStreams:
        """One stream per prompt."""
        judge = self.task.judge
        return self.source.streams(judge.prompts, sorted({*judge.starts, *self.bias_starts}), self.task.keep)

    def _drift(self) -> tuple[dict[str, Estimate | float], dict[str, Series]]:
        judge = self.task.judge
        against = judge.against(self.real.seen)
        seen = self.sampled.seen.at(judge.starts)
        ours, truth = (drift_series(one, against) for one in (seen, self.real.seen))
        figures: dict[str, Estimate | float] = dict(drift_figures(seen, ours, judge.counts))
        true = drift_figures(self.real.seen, truth, judge.counts)
        figures |= {f"{name}_floor": true[name].value for name in FLOORED}
        figures |= {f"real_{name}": true[name] for name in ("ink_slope", "saturation_slope")}
        return figures, {**ours, **{f"real_{name}": line for name, line in truth.items()}}

    def _seams(self, reach: Reach) -> tuple[int, ...]:
        return seam_frames(self.source.frames, reach, self.temporal)

    def _exposure(self) -> dict[str, Series]:
        judge = self.task.judge
        if not self.places:
            return {}
        own, real = (
            self.sampled.seen.at(self.bias_starts),
            self.source.on_real_pasts(judge.prompts, self.real, self.places),
        )
        return exposure_series(self.bias_starts, own, real, judge.against(None))

    def _switches(self, reach: Reach) -> dict[str, Estimate]:
        """Figures of streams whose prompt changes in one attribute in the middle."""
        frames, seed = self.source.frames, self.task.judge.seed
        pairs = switch_pairs(self.task.switches, seed)
        latent = switch_latent(frames, reach, self.temporal)
        at, after = first_frame(latent, self.temporal), [pair.after for pair in pairs]
        starts = range(at - FRAMES, frames - FRAMES + 1)
        change = Change(after, latent, self.task.on_switch)
        seen = self.source.streams([pair.before for pair in pairs], starts, change=change).seen
        changed = torch.tensor([pair.changed for pair in pairs])
        return switch_figures(seen, at, named_attributes(after), changed, resample_counts(len(pairs), seed))


def _settings(task: StreamTask) -> dict[str, Any]:
    judge = task.judge
    return {
        "frames": judge.frames,
        "prompts": len(judge.prompts),
        "switches": task.switches,
        "on_switch": task.on_switch if task.switches else None,
        "seed": judge.seed,
        "split": judge.world.split,
        "reference_windows": judge.reference_windows,
        "prompts_sha256": hashlib.sha256("\n".join(judge.prompts).encode()).hexdigest(),
        "judge_sha256": hashlib.sha256((CLASSIFIER_FOLDER / WEIGHTS_NAME).read_bytes()).hexdigest(),
        "batch_size": task.batch_size,
        "device": task.device,
        "threads": torch.get_num_threads(),
        **environment(),
    }
