"""Recipes of the package: the files of ``examples/distillation``, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.wording import nearest

PACKAGE = Path(__file__).parents[2]
IN_WHEEL, IN_CLONE = PACKAGE / "recipes", PACKAGE.parent / "examples" / "distillation"


def recipes() -> dict[str, Path]:
    """Recipe files by name, from the wheel or the clone."""
    folder = IN_WHEEL if IN_WHEEL.is_dir() else IN_CLONE
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(config: str | Path) -> Path:
    """File of a path or a recipe's name; an existing file wins.

    Raises:
        UserError: if there is neither, with the nearest recipe.
    """
    path = Path(config)
    if path.exists() or path.parent != Path():
        return path
    known = recipes()
    name = path.name.removesuffix(".yaml")
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else "`fastvideo recipes` lists them"
    raise UserError(f"config {config}: No such file, and no recipe has that name; {hint}")


def with_own_files(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Values of a recipe, with its missing prompts files replaced by those beside it.

    Recipes name paths as seen from a clone, but a run may start in any folder, and a wheel has no ``examples``.
    """
    data = values.get("data")
    if file.parent not in (IN_WHEEL, IN_CLONE) or not isinstance(data, dict):
        return values
    beside = {
        key: str(file.parent / Path(data[key]).name)
        for key in ("prompts", "switch_prompts")
        if isinstance(data.get(key), str) and not Path(data[key]).exists()
    }
    return {**values, "data": data | {key: path for key, path in beside.items() if Path(path).is_file()}}
