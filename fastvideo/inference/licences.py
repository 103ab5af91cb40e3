"""Licences of the models that a student comes from: its base, and those that its run asked beside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastvideo.distillation.adapters.diffusers.folder import read_recipe
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED, local_path
from fastvideo.distillation.adapters.diffusers.sources import HUB_ID
from fastvideo.distillation.builder import Config
from fastvideo.distillation.config.reading import family_of

OTHER_MODELS = "other_models"
"""Key of a student's recipe: names and licence keys of the models beside its base."""
PACKAGE_LICENSE = {"license": "apache-2.0"}
"""Licence of the embedded pipelines."""


def read_front_matter(folder: Path) -> dict[str, Any]:
    """YAML at the head of a folder's ``README.md``; empty if absent or unreadable."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def other_models(config: Config) -> list[dict[str, str]]:
    """Models of a run's roles beside its own ``model.path``, each once, and those that these were trained by.

    Returns:
        ``name`` and the licence keys of each; the name alone where no card is on this machine.

    Raises:
        UserError: for an invalid ``model`` section of a role, or a ``recipe.json`` that is no JSON object.
    """
    found: list[dict[str, str]] = []
    paths = [options.path or family_of(config, role)[1].path for role, options in config.roles.items()]
    for path in dict.fromkeys([config.model.path, *paths]):
        own = [{"name": public_name(path), **licence_of(path)}] if path != config.model.path else []
        own += read_recipe(str(_folder(path))).get(OTHER_MODELS, [])
        found += [model for model in own if model not in found]
    return found


def public_name(path: str) -> str:
    """The name of a model for people elsewhere: a local path without its folders."""
    return path if path in EMBEDDED or HUB_ID.fullmatch(path) else Path(path).name


def licence_of(path: str) -> dict[str, str]:
    """Licence keys of a model's card; empty if none is on this machine."""
    card = read_front_matter(_folder(path))
    found = {key: str(value) for key, value in card.items() if key.startswith("license")}
    return found or (PACKAGE_LICENSE if path in EMBEDDED else {})


def _folder(path: str) -> Path:
    """Folder of a model, which need not exist: nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "README.md") if HUB_ID.fullmatch(path) and not Path(path).exists() else None
    return Path(cached).parent if isinstance(cached, str) else local_path(path)


def licence_name(keys: Mapping[str, Any]) -> str:
    """Short name of a licence by the keys of a card."""
    return str(keys.get("license_name") or keys.get("license") or "unknown")


def shared_licence(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Licence keys of a card for what comes from several models: those of all, or ``other`` with all names."""
    names = dict.fromkeys(map(licence_name, models))
    if len(names) == 1:
        return {key: value for key, value in models[0].items() if key.startswith("license")}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", "-and-".join(names).lower())}


def licence_lines(recipe: Mapping[str, Any]) -> list[str]:
    """Lines on the models beside a student's base, for people; none if there are no such models."""
    if OTHER_MODELS not in recipe and "method" in recipe:
        return ["", "Its `recipe.json` does not say which other models trained it."]
    lines = []
    for model in recipe.get(OTHER_MODELS, []):
        keys = [str(value) for key, value in model.items() if key.startswith("license")]
        unknown = "not known here; look it up before you publish this student"
        lines.append(f"* `{model['name']}`: {', '.join(keys) or unknown}")
    head = ["", "Other models took part in its training, and their licences may bind it too:", ""]
    return [*head, *lines] if lines else []
