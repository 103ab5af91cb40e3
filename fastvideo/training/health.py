"""Health of a run, at every validation: a few videos of several seeds, compared with the teacher's of the same prompts.

The reference is made once, with a bar, and its figures are kept in the run's folder. All noise comes from streams of
its own, so training goes on as if nothing had been looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvideo.distillation.builder import Adapter, Config, Method
from fastvideo.distillation.engine.checkpoint.durable import replace_file
from fastvideo.distillation.engine.optim import relative_update
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.methods.distribution_matching.dmd2 import dmd_gradient
from fastvideo.distillation.noise import add_noise
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.rollout import at_time
from fastvideo.evaluation.health import Figures, find_alarms, measure
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import SamplerSpec, generate_latents
from fastvideo.stopping import step_done, unit_done

PANEL_TIME, PANEL_VIDEOS = 0.5, 4
"""Noise level at which the roles' estimates of the clean video are shown, and of how many videos."""
STEPS_AHEAD = 100
"""Steps over which the share of a role's updates is counted."""
REFERENCE = "reference.json"


@dataclass(frozen=True)
class Subject:
    """What is looked at: a run's model, the prompts (one per video, seeds of a prompt in a row), given frames."""

    config: Config
    adapter: Adapter
    method: Method
    prompts: Sequence[str]
    frames: Tensor | None
    writes: bool
    together: bool


class HealthCheck:
    """Called with the step at every validation; what it returns is logged.

    Args:
        write: a video ``[3, T, H, W]`` to a file.
    """

    def __init__(self, subject: Subject, folder: Path, tracker: Tracker, write: Callable[[Path, Tensor], None]) -> None:
        self.subject, self.folder, self.tracker, self.write = subject, folder, tracker, write
        self.options = subject.config.health
        self._reference: tuple[str, Figures] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Measure, compare, say and write down what is wrong."""
        method = self.subject.method
        latents = self._sample(method.bundle["student"].network, self._student_spec(), "health")
        videos = self._decode(latents)
        if videos.shape[1] != 3:
            return {}
        live = self._measure(videos, latents)
        training = self._training(step) | self._panels(latents, step)
        source, reference = self._reference or self._find_reference()
        self._reference = source, reference
        alarms = find_alarms(live, reference or None, training, self.options)
        for alarm in alarms:
            self.tracker.say(f"health, step {step}: {alarm.text}")
        line = {"step": step, "alarms": [asdict(alarm) for alarm in alarms], "student": _finite(live)}
        self.tracker.write_line("health.jsonl", {**line, "training": training, source: dict(reference)})
        logged = {f"health/{name}": value for name, value in {**live, **training}.items() if math.isfinite(value)}
        return {**logged, **{f"health/{source}/{n}": v for n, v in reference.items()}, "health/alarms": len(alarms)}

    def _student_spec(self) -> SamplerSpec:
        return SamplerSpec.student(self.subject.method.ladder, kind=self.subject.method.sampler)

    def _sample(self, network: nn.Module, spec: SamplerSpec, label: str) -> Tensor:
        subject, count = self.subject, len(self.subject.prompts)
        with PatientBar(label, count * spec.network_calls) as bar:

            def progress(done: int) -> None:
                step_done() if subject.together else bar(done)

            return generate_latents(
                subject.adapter,
                network,
                subject.prompts,
                spec,
                seed=subject.config.validation.seed,
                batch_size=min(count, subject.config.data.batch_size),
                frames=subject.frames,
                progress=progress,
            )

    def _decode(self, latents: Tensor) -> Tensor:
        adapter, size = self.subject.adapter, self.subject.config.data.batch_size
        parts = []
        for part in latents.split(size):
            step_done() if self.subject.together else unit_done()
            parts.append(adapter.codec.decode(part.to(adapter.device)).float().cpu())
        return torch.cat(parts)

    def _measure(self, videos: Tensor, latents: Tensor) -> dict[str, float]:
        seeds = self.options.seeds
        grouped = [x.view(-1, seeds, *x.shape[1:]) for x in (videos, latents)]
        return measure(*grouped, block=videos.shape[-1] // latents.shape[-1])

    def _find_reference(self) -> tuple[str, Figures]:
        """Figures of the teacher's videos, or of real ones of the tiny world; none where there is neither."""
        source = "teacher" if "teacher" in self.subject.method.bundle else "real"
        file, key = self.folder / REFERENCE, self._key()
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("key") != key:
            kept = {"key": key, "figures": self._make_reference(source)}
            if self.subject.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(file, json.dumps(kept, indent=2) + "\n")
        if not kept["figures"]:
            self.tracker.say(
                "health: no teacher role and no tiny world to compare with; figures are logged, without alarms"
            )
        return source, kept["figures"]

    def _make_reference(self, source: str) -> dict[str, float]:
        subject = self.subject
        if source == "teacher":
            guidance = subject.config.method.model_dump().get(
                "teacher_guidance", subject.adapter.folder.published_guidance
            )
            spec = SamplerSpec(subject.adapter.folder.teacher_times(self.options.teacher_steps), guidance, "euler")
            latents = self._sample(subject.method.bundle["teacher"].network, spec, "the teacher's videos")
            videos = self._decode(latents)
            if subject.writes:
                self.write(self.folder / "teacher.mp4", _row(videos))
            return self._measure(videos, latents)
        if subject.config.data.path != "tiny" or subject.config.data.prompts is not None:
            return {}
        from fastvideo.tiny.world import TinyWorld

        videos = TinyWorld("heldout").sample(4 * len(subject.prompts), subject.config.validation.seed).videos
        latents = subject.adapter.codec.encode(videos.to(subject.adapter.device)).cpu()
        figures = self._measure(videos, latents)
        return {name: value for name, value in figures.items() if name != "diversity"}  # not of one prompt

    def _key(self) -> str:
        options = self.options.model_dump(include={"prompts", "seeds", "teacher_steps"})
        inputs = [options, list(self.subject.prompts), self.subject.config.validation.seed]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def _training(self, step: int) -> dict[str, float]:
        """How far a step moves each role, relative to its weights, and the critic's over the student's."""
        method = self.subject.method
        ahead = [role for i in range(STEPS_AHEAD) for role in method.active_roles(step + i)]
        moved = {
            handle.name: size * ahead.count(handle.name) / STEPS_AHEAD
            for handle in method.bundle
            if handle.trainable and (size := relative_update(handle)) is not None
        }
        found = {f"{role}_movement": value for role, value in moved.items()}
        if moved.get("student") and "critic" in moved:
            found["update_balance"] = moved["critic"] / moved["student"]
        return found

    def _panels(self, latents: Tensor, step: int) -> dict[str, float]:
        """Estimates of the clean video by student, critic and teacher at one noisy one; the DMD gradient from them."""
        subject, bundle = self.subject, self.subject.method.bundle
        if "teacher" not in bundle or "critic" not in bundle:
            return {}
        adapter, count = subject.adapter, min(PANEL_VIDEOS, len(latents))
        x0 = latents[:count].to(adapter.device)
        given = adapter.conditioner.condition_on(None if subject.frames is None else subject.frames[:count])
        condition = adapter.conditioner.encode_prompts(subject.prompts[:count]) | given
        negative = adapter.conditioner.negative(count) | given
        noise = normal(tuple(x0.shape), seeded(subject.config.validation.seed)).to(adapter.device)
        x_t, t = add_noise(x0, noise, at_time(x0, PANEL_TIME)), at_time(x0, PANEL_TIME)
        guidance = subject.config.method.model_dump().get("teacher_guidance", adapter.folder.published_guidance)
        real = bundle["teacher"].x0_guided(x_t, t, condition, negative, guidance)
        fake, own = (bundle[role].x0(x_t, t, condition) for role in ("critic", "student"))
        if subject.writes:
            rows = [_row(self._decode(latents)) for latents in (x0, own, fake, real)]
            self.write(self.folder / f"step-{step:06d}-x0.mp4", torch.cat(rows, dim=-2))
        gradient = dmd_gradient(x0, real=real, fake=fake, given=condition.given)
        rms = float(gradient.square().mean().sqrt())
        return {"dmd_gradient_rms": rms} if math.isfinite(rms) else {}


def _row(videos: Tensor) -> Tensor:
    """``[B, 3, T, H, W]`` side by side, the first few."""
    return torch.cat(list(videos[:8]), dim=-1)


def _finite(figures: Figures) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
