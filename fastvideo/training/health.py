"""Health of a run, at every validation: a few videos of several seeds, compared with the teacher's of the same prompts.

The reference is made once, with a bar, and its figures are kept in the run's folder. All noise comes from streams of
its own, so training goes on as if nothing had been looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import or_
from pathlib import Path

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.builder import Adapter, Config, Method
from fastvideo.distillation.chunks import Masked, spans
from fastvideo.distillation.config.base import by_time
from fastvideo.distillation.config.causal import reach_of, streaming
from fastvideo.distillation.engine.runtime import Tracker
from fastvideo.distillation.engine.training import relative_update
from fastvideo.distillation.methods.distribution_matching.dmd2 import dmd_gradient
from fastvideo.distillation.noise import GuidanceValue, add_noise, full_time
from fastvideo.distillation.parts import Parts
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.types import Condition
from fastvideo.evaluation.alarms import Figures, find_alarms
from fastvideo.evaluation.health import measure
from fastvideo.files import replace_file
from fastvideo.inference.sampler import Sampling
from fastvideo.tiny.world import FRAMES, WORLDS
from fastvideo.training.shared_sampling import SharedSampler
from fastvideo.wording import see

PANEL_TIME, PANEL_VIDEOS = 0.5, 4
"""Noise level at which the roles' estimates of the clean video are shown, and of how many videos."""
PANEL_LATENTS = 2**18
"""Latent numbers of a video above which no panels are written unless asked for: 16 decodings would take minutes."""
STEPS_AHEAD = 100
"""Steps over which the share of a role's updates is counted."""
REFERENCE = "reference.json"


class HealthCheck:
    """Called with the step at every validation, on all processes; the main one measures, and its figures are logged.

    Args:
        shared: samples on all processes.
        wanted: the student's videos, seeds of a prompt in a row.
        write: a video ``[3, T, H, W]`` to a file.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        shared: SharedSampler,
        wanted: Sampling,
        folder: Path,
        tracker: Tracker,
        write: Callable[[Path, Tensor], None],
    ) -> None:
        self.config, self.method, self.shared, self.wanted = config, method, shared, wanted
        self.folder, self.tracker, self.write, self.options = folder, tracker, write, config.health
        self._reference: tuple[str, Figures] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Measure, compare, log and raise alarms."""
        made = self.shared.latents_and_videos(self.method.bundle["student"], self.wanted, "health")
        live = None if made is None else self._measure(made[1], made[0])
        training = self._training(step) | self._panels(None if made is None else made[0], step)
        source, reference = self._reference or self._find_reference()
        self._reference = source, reference
        if live is None:
            return {}
        alarms = find_alarms(live, reference or None, training, self.options)
        for alarm in alarms:
            self.tracker.say(f"health, step {step}: {alarm.text}{see('a-health-alarm')}")
        line = {"step": step, "alarms": [asdict(alarm) for alarm in alarms], "student": _finite(live)}
        self.tracker.write_line("health.jsonl", {**line, "training": training, source: dict(reference)})
        logged = {f"health/{name}": value for name, value in {**live, **training}.items() if math.isfinite(value)}
        return {**logged, **{f"health/{source}/{n}": v for n, v in reference.items()}, "health/alarms": len(alarms)}

    def _measure(self, videos: Tensor, latents: Tensor) -> dict[str, float]:
        seeds = self.options.seeds
        grouped = [x.view(-1, seeds, *x.shape[1:]) for x in (videos, latents)]
        return measure(*grouped, block=videos.shape[-1] // latents.shape[-1])

    def _find_reference(self) -> tuple[str, Figures]:
        """Figures of the frozen teacher's videos, or of real ones of the tiny world; none where there is neither.

        A teacher that the run changes is no reference: it is another one at every validation.
        """
        teacher = self.method.bundle.get("teacher")
        source = "teacher" if teacher is not None and not teacher.trainable else "real"
        file, key = self.folder / REFERENCE, self._key()
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not self.shared.processes.main_says(kept.get("key") == key):
            kept = {"key": key, "figures": self._make_reference(source)}
            if self.shared.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(file, json.dumps(kept, indent=2) + "\n")
        if not kept.get("figures") and self.shared.writes:
            self.tracker.say(
                "health: no frozen teacher role and no tiny world to compare with; figures are logged, without alarms"
            )
        return source, kept.get("figures", {})

    def _make_reference(self, source: str) -> dict[str, float]:
        if source == "teacher":
            return self._of_teacher()
        data, adapter = self.config.data, self.shared.family
        if data.path not in WORLDS or data.prompts is not None or not self.shared.writes:
            return {}
        world = WORLDS[data.path]("heldout", self.config.model.model_dump().get("num_frames", FRAMES))
        videos = world.sample(4 * len(self.wanted.prompts), self.wanted.seed).videos
        latents = adapter.codec.encode(videos.to(adapter.device)).cpu()
        figures = self._measure(videos, latents)
        return {name: value for name, value in figures.items() if name != "diversity"}  # not of one prompt

    def _of_teacher(self) -> dict[str, float]:
        teacher = self.method.bundle["teacher"]
        family = teacher.adapter
        sampler = SamplerSpec.teacher(family.folder.teacher_times(self.options.teacher_steps), self._guidance(family))
        if (own := streaming(self.method.config)) is not None and "teacher" in own.autoregressive_roles:
            sampler = replace(sampler, reach=self.wanted.sampler.reach)
        shared, wanted = replace(self.shared, family=family), replace(self.wanted, sampler=sampler)
        made = shared.latents_and_videos(teacher, wanted, "the teacher's videos")
        if made is None:
            return {}
        self.write(self.folder / "teacher.mp4", _row(made[1]))
        return self._measure(made[1], made[0])

    def _guidance(self, family: Adapter) -> GuidanceValue:
        return by_time(self.config.method.model_dump().get("teacher_guidance", family.folder.published_guidance))

    def _key(self) -> str:
        options = self.options.model_dump(include={"prompts", "seeds", "teacher_steps"})
        inputs = [options, list(self.wanted.prompts), self.wanted.seed]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def _training(self, step: int) -> dict[str, float]:
        """Distance that a step moves each role, relative to its weights, and the critic's over the student's."""
        method = self.method
        ahead = [role for i in range(STEPS_AHEAD) for role in method.active_roles(step + i)]
        moved = {
            handle.name: size * ahead.count(handle.name) / STEPS_AHEAD
            for handle in method.bundle
            if handle.trainable and (size := relative_update(handle)) is not None
        }
        found = {f"{role}_movement": value for role, value in moved.items()}
        if moved.get("student") and "critic" in moved and self._has_critic:
            found["update_balance"] = moved["critic"] / moved["student"]
        return found

    @property
    def _has_critic(self) -> bool:
        """True if a role ``critic`` denoises, as DMD's does; a head of that name, such as a WGAN's, scores samples."""
        critic = self.method.bundle.get("critic")
        return critic is not None and not critic.is_head

    def _panels(self, latents: Tensor | None, step: int) -> dict[str, float]:
        """Estimates of the clean video by student, critic and teacher at one noisy one; the DMD gradient from them."""
        if "teacher" not in self.method.bundle or not self._has_critic:
            return {}
        count, size = min(PANEL_VIDEOS, len(self.wanted.prompts)), self.wanted.batch_size
        x0 = self.shared.from_main(None if latents is None else latents[:count], count)
        parts = [self._estimates(x0[i : i + size], range(count)[i : i + size]) for i in range(0, count, size)]
        if self.shared.writes and self._shows_panels:
            self._write_panels([torch.cat(row).cpu() for row in list(zip(*parts, strict=True))[:-1]], step)
        squares = torch.cat([gradient for *_, gradient in parts]).square()
        rms = float((squares if (own := self._state_parts) is None else own.balanced(squares)).mean().sqrt())
        found = {"dmd_gradient_rms": rms, **self._critic_lag(parts)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _critic_lag(self, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
        """The critic's squared error in the last chunk over that in the first, of a student that has chunks."""
        reach = reach_of(self.method.config)
        if reach is None:
            return {}
        squares = torch.cat([(fake - x0).square() for x0, _, fake, *_ in parts])
        means = [squares[:, :, a:b].mean() for a, b in spans(squares.shape[2], reach.chunk)]
        return {"critic_lag": float(means[-1] / means[0])}

    @property
    def _state_parts(self) -> Parts | None:
        """Parts of the state that teacher and critic score."""
        return self.method.bundle["teacher"].adapter.codec.parts

    @property
    def _shows_panels(self) -> bool:
        if self.options.panels is not None:
            return self.options.panels
        return math.prod(self.shared.family.codec.latent_shape) <= PANEL_LATENTS

    def _estimates(self, x0: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Latents of a batch, then estimates by student, critic and teacher, then the DMD gradient."""
        bundle, teacher = self.method.bundle, self.method.bundle["teacher"].adapter
        condition, negative = self._conditions(rows)
        reach = reach_of(self.method.config)
        context = None if reach is None else Masked(reach, x0)
        x_t, t = self._noised(x0, rows)
        times = t if context is None else t[:, None].expand(-1, x0.shape[2])
        own = bundle["student"].x0(x_t, times, condition, context=context)
        scored = bundle.bridge("student", "teacher")(x0)
        x_t, t = self._noised(scored, rows)
        real = bundle["teacher"].x0_guided(x_t, t, condition, negative, self._guidance(teacher))
        fake = bundle["critic"].x0(x_t, t, condition)
        given = self._state_parts or condition.given
        return x0, own, fake, real, dmd_gradient(scored, real=real, fake=fake, given=given)

    def _write_panels(self, shown: Sequence[Tensor], step: int) -> None:
        """One row of videos per estimate; the last two are in the teacher's latent space."""
        of_teacher = replace(self.shared, family=self.method.bundle["teacher"].adapter)
        families = (self.shared, self.shared, of_teacher, of_teacher)
        size = self.wanted.batch_size
        rows = [_row(shared.decode(latents, size)) for shared, latents in zip(families, shown, strict=True)]
        self.write(self.folder / f"step-{step:06d}-x0.mp4", torch.cat(rows, dim=-2))

    def _conditions(self, rows: Sequence[int]) -> tuple[Condition, Condition]:
        """Condition and negative condition of some prompts, with the texts of every family."""
        frames, adapter = self.wanted.frames, self.shared.family
        families = (adapter, self.method.bundle["teacher"].adapter)
        conditioners = {family.conditioner.key: family.conditioner for family in families}.values()
        given = of_frames(adapter.conditioner).condition_on(None if frames is None else frames[list(rows)])
        prompts = [self.wanted.prompts[row] for row in rows]
        texts = [conditioner.encode_prompts(prompts) for conditioner in conditioners]
        negatives = [conditioner.negative(len(rows)) for conditioner in conditioners]
        return reduce(or_, texts) | given, reduce(or_, negatives) | given

    def _noised(self, x0: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents at the panel's noise level, from fixed noise of each row, and that level ``[B]``."""
        noise = torch.stack([normal(tuple(x0.shape[1:]), seeded(self.wanted.seed + row)) for row in rows])
        t = full_time(x0, PANEL_TIME)
        return add_noise(x0, noise.to(x0.device), t), t


def _row(videos: Tensor) -> Tensor:
    """``[B, 3, T, H, W]`` side by side, the first few."""
    return torch.cat(list(videos[:8]), dim=-1)


def _finite(figures: Figures) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
