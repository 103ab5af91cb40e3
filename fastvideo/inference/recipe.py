"""``recipe.json`` of a run's result: sampler and origin of the model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from fastvideo.distillation.adapters.base import ModelFolder
from fastvideo.distillation.builder import Config
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.registry import load_method
from fastvideo.errors import UserError, counted

Weights = Literal["ema", "live"]
"""Averaged weights, or those of the last step."""


@dataclass(frozen=True)
class StreamingRecipe:
    """The section ``streaming`` of a student that generates chunk by chunk.

    Attributes:
        reach: frames that a chunk sees.
        context_time: noise of finished chunks as the next ones see them, in [0, 1]; 0 is clean.
        first_ladder: times of the first chunk, where they are not those of the others.
    """

    reach: Reach
    context_time: float = 0.0
    first_ladder: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """Chunks and what they see, for people."""
        reach = self.reach
        seen = "all earlier ones" if reach.window is None else f"the {reach.window} before them"
        sink = f" and the first {reach.sink}" if reach.sink else ""
        return f"chunks of {counted(reach.chunk, 'latent frame')} that see {seen}{sink}"


def streaming_of(recipe: Mapping[str, Any]) -> StreamingRecipe | None:
    """The streaming section of a recipe; ``None`` for a model of whole videos.

    Raises:
        UserError: for a section that is not of this form.
    """
    if "streaming" not in recipe:
        return None
    section = recipe["streaming"]
    try:
        fields = dict(section)
        own = {key: fields.pop(key) for key in ("context_time", "first_ladder") if key in fields}
        return TypeAdapter(StreamingRecipe).validate_python({"reach": fields, **own})
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe.json: streaming {section!r} cannot be read: {error}") from error


def result_recipe(config: Config, folder: ModelFolder, weights: Weights, step: int) -> dict[str, Any]:
    """The recipe of a run's student after ``step`` steps."""
    recipe: dict[str, Any] = {
        "distill_model": config.distill_model,
        "method": config.distill_method,
        "model": config.model.model_dump(mode="json"),
        "sampler": load_method(config.distill_method).sampler,
        "weights": weights,
        "steps": step,
    }
    if not load_method(config.distill_method).makes_teachers:
        return recipe | {"ladder": list(config.ladder.times), "guidance": 1.0}
    if "guidance" in folder.recipe:
        # The result is a teacher: any number of steps, with the guidance of its base model.
        return recipe | {"guidance": folder.recipe["guidance"]}
    return recipe
