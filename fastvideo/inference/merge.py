"""Model folders with LoRA files merged in, or with the network of a single file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastvideo.distillation.adapters.diffusers.single_file import is_single_file
from fastvideo.distillation.adapters.export.lora import read_lora
from fastvideo.distillation.engine.lora import Merge, merge_file, parameter_shapes
from fastvideo.distillation.registry import load_exporter
from fastvideo.distillation.types import UserError
from fastvideo.files import replacing_folder
from fastvideo.inference.export import check_new_folder
from fastvideo.inference.exported import in_precision, without_path
from fastvideo.inference.loading import LoadedModel, load_model

MARK = "merged"
"""Key in the recipe of a merge; only merges may be overwritten."""


def run_merge(
    model: str, out: Path, lora: Sequence[str], network: str | None, overwrite: bool, dtype: str | None = None
) -> str:
    """Write the folder; returns a line for the terminal.

    Args:
        dtype: precision of the network's weights, rounded once after all is merged; float32 by default.

    Raises:
        UserError: if there is nothing to merge, a file does not fit, or the folder is in use; writes nothing then.
    """
    if not lora and network is None:
        raise UserError("merge: give --lora FILE[:WEIGHT], or --network FILE, or both")
    loaded, out = load_model(model, sized=False, exact=True), Path(os.path.abspath(out))
    check_new_folder(out, Path(loaded.source), overwrite, MARK, "merge")
    weights = _network(loaded, network)
    merges = [_read(text, loaded, weights) for text in lora]
    for file, weight in merges:
        merge_file(weights, file, weight)
    names = [f"{file.source}:{weight:g}" for file, weight in merges]
    _save(out, loaded, in_precision(weights, dtype), {**loaded.recipe, MARK: [*([network] if network else []), *names]})
    size = sum(weight.nbytes for weight in weights.parameters()) / 2**20
    written = f"weights in {dtype or 'float32'}, {size:.1f} MiB"
    return f"{out}: {model} with {', '.join([*([network] if network else []), *names])}; {written}"


def _network(loaded: LoadedModel, path: str | None) -> nn.Module:
    if path is None:
        return loaded.network
    if not is_single_file(path):
        lost = "" if Path(path).exists() else " does not exist"
        raise UserError(f"--network {path!r}{lost}: a file of weights (.safetensors, .pth, ...) is expected")
    return loaded.adapter.folder.load_network(path).requires_grad_(False)


def _read(text: str, loaded: LoadedModel, network: nn.Module) -> Merge:
    path, weight = parse_lora(text)
    return read_lora(path, parameter_shapes(network), load_exporter(loaded.adapter.config)), weight


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse ``FILE`` or ``FILE:WEIGHT``.

    Raises:
        UserError: for a weight that is no finite number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0  # a colon in the path
    if not abs(weight) < float("inf"):
        raise UserError(f"--lora {text!r}: a finite weight is expected, got {tail}")
    return Path(head), weight


def _save(out: Path, loaded: LoadedModel, network: Any, recipe: dict[str, Any]) -> None:
    without_path(network)
    try:
        with replacing_folder(out) as partial:
            loaded.adapter.folder.save(partial, network, recipe)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
