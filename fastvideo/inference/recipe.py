"""``recipe.json`` of a run's result: sampler and origin of the model beside it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.base import ModelFolder
from fastvideo.distillation.builder import Config
from fastvideo.distillation.chunks import STREAMING, Reach
from fastvideo.distillation.config.causal import streaming
from fastvideo.distillation.registry import load_method
from fastvideo.inference.licences import OTHER_MODELS, other_models
from fastvideo.wording import counted

Weights = Literal["ema", "live"]
"""Averaged weights, or those of the last step."""


def result_recipe(config: Config, folder: ModelFolder, weights: Weights, step: int) -> dict[str, Any]:
    """The recipe of a run's student after ``step`` steps, with the licences that are known on this machine."""
    method = load_method(config.distill_method)
    recipe: dict[str, Any] = {
        "distill_model": config.distill_model,
        "method": config.distill_method,
        "model": config.model.model_dump(mode="json"),
        "sampler": method.sampler,
        "weights": weights,
        "steps": step,
        OTHER_MODELS: other_models(config),
    }
    if (own := streaming(config.method)) is not None:
        recipe[STREAMING] = {**asdict(own.reach), "context_time": own.context_time}
        if first := own.first_times:
            recipe[STREAMING]["first_ladder"] = list(first)
    if not method.makes_teachers:
        return recipe | {"ladder": list(config.ladder.times), "guidance": 1.0}
    # The result is a teacher: any number of steps, with guidance and usual steps of its base model.
    usual = ("guidance", "sampling_steps")
    base = of_folder(folder).recipe_of(None)
    return recipe | {key: base[key] for key in usual if key in base}


def reach_text(reach: Reach) -> str:
    """Chunks and what they see, for people."""
    seen = "all earlier ones" if reach.window is None else f"the {reach.window} before them"
    sink = f" and the first {reach.sink}" if reach.sink else ""
    return f"chunks of {counted(reach.chunk, 'latent frame')} that see {seen}{sink}"
