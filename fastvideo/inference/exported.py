"""Parts that every export of a whole network shares: its mark, its precision, its ladder in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo.distillation.experts import networks_of

MARK = "exported_to"
"""Key in the recipe of an export; only exports may be overwritten."""
CLOSE = 1.001e-3
"""Tolerance per time between another program's ladder and the student's; a bit more than from 0.999 to 1."""


@dataclass(frozen=True)
class Export:
    """Written folder, with a summary and warnings for the terminal."""

    folder: Path
    summary: str
    warnings: tuple[str, ...]


def ladder_text(times: Sequence[float]) -> str:
    """A ladder for people; abbreviates a long one."""
    texts = [f"{time:.4f}" for time in times]
    return " ".join(texts if len(texts) <= 8 else [*texts[:4], "...", *texts[-2:]])


def without_path(network: nn.Module) -> None:
    """Forget the folder of this machine that a network was loaded from, which its config would name."""
    for one in networks_of(network):
        one.register_to_config(_name_or_path="")


def in_precision(network: Any, dtype: str | None) -> Any:
    """Round weights to ``dtype``, except those that diffusers keeps in float32."""
    if dtype is None:
        return network
    kept = networks_of(network)[0]._keep_in_fp32_modules or ()
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and not set(kept) & set(name.split(".")):
            weight.data = weight.data.to(getattr(torch, dtype))
    return network


def edit_json(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON object of a folder that is being written."""
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
