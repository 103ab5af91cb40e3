"""Weights to export: those of a student's folder, or of a run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.builder import Config, build_adapter, build_families, load_role
from fastvideo.distillation.config.reading import config_of, read_yaml
from fastvideo.distillation.engine.checkpoint.manifest import DamagedError, complete_checkpoints, verified
from fastvideo.distillation.engine.checkpoint.restore import role_parts, role_weights
from fastvideo.distillation.engine.lora import is_adapter, merge
from fastvideo.distillation.engine.runtime import Processes
from fastvideo.distillation.registry import families, load_adapter
from fastvideo.distillation.types import UserError
from fastvideo.inference.loading import LoadedModel, load_model, load_recipe
from fastvideo.inference.recipe import Weights, result_recipe

RUN_CONFIG = "config.yaml"
PARTS: dict[Weights, str] = {"ema": "ema", "live": "network"}
"""The part of a role's checkpoint that holds each kind of weights."""


@dataclass(frozen=True)
class ExportSource:
    """One set of weights: those in ``folder``, or those in ``checkpoint`` for the model in ``folder``.

    ``run`` is the run's folder, if any; an unfinished run has no model ``folder`` yet. ``step`` counts the training
    steps; 0 if unknown.
    """

    run: Path | None
    folder: Path | None
    checkpoint: Path | None
    weights: str | None
    step: int

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's resolved config as it stands in the file; empty without a run."""
        return read_yaml(self.run / RUN_CONFIG) if self.run else {}

    @property
    def run_config(self) -> Config:
        """The run's config, validated."""
        return config_of(self.config, f"{self.run}/{RUN_CONFIG}")


def find_source(path: str, weights: Weights | None = None) -> ExportSource:
    """Find the newest weights of the wanted kind without loading them.

    Args:
        path: a run's folder, or a model folder.
        weights: averaged or live; ``None`` prefers the averaged ones.

    Raises:
        UserError: if the folder is neither, or lacks such weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"export: folder {path!r} does not exist; give a run's folder or a student's")
    if not (folder / RUN_CONFIG).is_file():
        return _of_model(folder, weights)
    family = read_yaml(folder / RUN_CONFIG).get("distill_model", "")
    if not load_adapter(family).Config.pipelines:
        raise UserError(f"export: {path} is a run of the family {family!r}, which has no diffusers pipeline")
    return _of_run(folder, weights)


def _of_model(folder: Path, wanted: Weights | None) -> ExportSource:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"export: {folder} is no run ({RUN_CONFIG}) and no model folder (model_index.json)")
    found = _saved(folder.parent if (folder.parent / RUN_CONFIG).is_file() else None, folder)
    if wanted not in (None, found.weights):
        raise UserError(
            f"--{wanted}: {folder} holds {found.weights or 'no named kind of'} weights alone; give the run's "
            f"folder, whose checkpoints hold both kinds"
        )
    return found


def _saved(run: Path | None, folder: Path) -> ExportSource:
    recipe = load_recipe(str(folder))
    return ExportSource(run, folder, None, recipe.get("weights"), int(recipe.get("steps", 0)))


def _of_run(run: Path, wanted: Weights | None) -> ExportSource:
    student = run / "student"
    offers = [_saved(run, student)] if student.is_dir() else []
    folder = student if offers else None
    for checkpoint in complete_checkpoints(run / "checkpoints")[-1:]:
        step, parts = int(checkpoint.name.removeprefix("step-")), role_parts(checkpoint, "student")
        kinds = [kind for kind, part in PARTS.items() if part in parts]
        offers += [ExportSource(run, folder, checkpoint, kind, step) for kind in kinds]
    kind = wanted or ("ema" if any(offer.weights == "ema" for offer in offers) else "live")
    fitting = [offer for offer in offers if offer.weights == kind]
    if not fitting:
        held = ", ".join(f"{offer.weights} (step {offer.step})" for offer in offers) or "none"
        raise UserError(
            f"export: {run} holds no {kind} weights; it holds: {held}. Checkpoints hold live and averaged ones; a run "
            f"keeps them with checkpoint.every"
        )
    return max(fitting, key=lambda offer: (offer.step, offer.checkpoint is None))


def load_source(source: ExportSource) -> LoadedModel:
    """The model with the source's weights and their recipe, on the CPU.

    Raises:
        UserError: for an unreadable or unfitting model folder, config or checkpoint.
    """
    if source.checkpoint is None:
        return load_model(str(source.folder), exact=True)
    try:
        verified(source.checkpoint)
    except DamagedError as error:
        raise UserError(f"checkpoint {source.checkpoint} cannot be used: {error}") from error
    state = role_weights(source.checkpoint, "student", PARTS[source.weights])  # type: ignore[index]
    return with_weights(source, state, source.checkpoint)


def with_weights(source: ExportSource, state: Mapping[str, Tensor], where: Path) -> LoadedModel:
    """The source's model with weights of its student, or its adapter merged, and their recipe.

    Args:
        state: the student's trained tensors.
        where: their place.

    Raises:
        UserError: for weights of another network.
    """
    adapted = is_adapter(state)  # an adapter's own network, not a result with one merged
    model = load_model(str(source.folder), exact=True) if source.folder and not adapted else _unfinished(source)
    try:
        if adapted:
            merge(model.network, state, adapter_scaling(source))
        else:
            model.network.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{where} does not fit the network that the run's config names: {error}") from error
    return replace(model, recipe={**model.recipe, "weights": source.weights, "steps": source.step})


def source_recipe(source: ExportSource) -> dict[str, Any]:
    """The recipe of the source's model, without its weights."""
    if source.folder:
        return load_recipe(str(source.folder))
    config = source.run_config
    return result_recipe(config, build_adapter(config).folder, source.weights, source.step)  # type: ignore[arg-type]


def adapter_scaling(source: ExportSource) -> float:
    """``alpha / rank`` of the student's adapter in the run's config."""
    lora = source.config["roles"]["student"]["lora"]
    return float((lora.get("alpha") or lora["rank"]) / lora["rank"])


def _unfinished(source: ExportSource) -> LoadedModel:
    """The run's initial model with the recipe of its result."""
    config = source.run_config
    adapter = build_adapter(config)
    network = load_role(config, build_families(config, adapter, Processes()), "student").requires_grad_(False)
    recipe = result_recipe(config, adapter.folder, source.weights, source.step)  # type: ignore[arg-type]
    return LoadedModel(resolve_pipeline(config.model.path, tuple(families())), adapter, recipe, network)
