"""``recipe.json`` of a run's result: sampler and origin of the model beside it."""

from __future__ import annotations

from typing import Any, Literal

from fastvideo.distillation.adapters.base import ModelFolder
from fastvideo.distillation.builder import Config
from fastvideo.distillation.registry import load_method

Weights = Literal["ema", "live"]
"""Averaged weights, or those of the last step."""


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
