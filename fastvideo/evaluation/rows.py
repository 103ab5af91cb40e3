"""Rows of a comparison: model folders with their samplers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastvideo.distillation.rollout import Ladder, SamplerKind
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.stream_recipe import streaming_of
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import OpenedModel, load_recipe, student_sampler


@dataclass(frozen=True)
class RowSpec:
    """One row: a model folder and its sampler. ``None`` is the model's own choice.

    Attributes:
        folder: a path or ``tiny``.
        steps: sampling steps.
        guidance: standard convention, 1 = none.
        ladder: times of the student's sampler, also for a teacher or a student of another ladder.
        kind: the sampler over ``ladder``.
        like: recipe of the student whose chunks a ladder is sampled in; the model's own if ``None``.
    """

    folder: str
    steps: int | None = None
    guidance: float | None = None
    ladder: tuple[float, ...] | None = None
    kind: SamplerKind | None = None
    like: Mapping[str, Any] | None = None

    def sampler(self, model: OpenedModel) -> SamplerSpec:
        """The sampler of this row.

        Raises:
            UserError: for steps that a student was not trained for, or a bad ladder.
        """
        if self.ladder is not None:
            guidance = 1.0 if self.guidance is None else self.guidance
            spec = SamplerSpec.student(Ladder(self.ladder), guidance, self.kind or student_sampler(model.recipe))
            return replace(spec, **streaming_of(model.recipe if self.like is None else self.like))
        return model.sampler(self.steps, self.guidance)


def comparison_rows(teacher: str, student: str, teacher_steps: int = 50) -> dict[str, RowSpec]:
    """Rows that compare a student with a ladder of ``K`` steps with its alternatives.

    ``teacher_50``, ``teacher_K``, ``teacher_1`` with the teacher's own guidance; ``untrained_K``, the teacher's weights
    under the student's sampler; ``student_K``, ``student_1``.

    Raises:
        UserError: if ``student`` has no ladder in its recipe, or an unknown sampler.
    """
    recipe = load_recipe(student)
    if "ladder" not in recipe:
        raise UserError(f"{student!r} is not a student: its recipe.json names no ladder")
    ladder = tuple(recipe["ladder"])
    few = len(ladder)
    return {
        f"teacher_{teacher_steps}": RowSpec(teacher, steps=teacher_steps),
        f"teacher_{few}": RowSpec(teacher, steps=few),
        "teacher_1": RowSpec(teacher, steps=1),
        f"untrained_{few}": RowSpec(teacher, ladder=ladder, kind=student_sampler(recipe), like=recipe),
        f"student_{few}": RowSpec(student),
        "student_1": RowSpec(student, steps=1),
    }
