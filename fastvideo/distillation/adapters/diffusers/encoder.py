"""The text encoder of a pipeline: read whole, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, library_class, load_component
from fastvideo.distillation.types import UserError

FOLDER = "text_encoder"


def load_text_encoder(pipeline: Pipeline[Any], name: str | None = None, part: str = FOLDER) -> nn.Module:
    """A frozen text encoder on the pipeline's device: bfloat16 on CUDA, float32 elsewhere.

    It is the family's, or the class ``name`` in the subfolder ``part``.

    On CUDA the weights go from the mapped file to the device, so that the processes of a machine share one reading.

    Raises:
        UserError: if it cannot be read, or lacks weights that it needs.
    """
    on_cuda = pipeline.device.type == "cuda"
    options: dict[str, Any] = {"device_map": {"": pipeline.device}} if on_cuda else {}
    options["dtype"] = torch.bfloat16 if on_cuda else torch.float32
    cls = library_class("transformers", name or pipeline.spec.text_encoder)
    encoder, info = load_component(cls, pipeline.source, part, output_loading_info=True, **options)
    check_whole(encoder, info["missing_keys"], pipeline.source, part)
    module: nn.Module = encoder.to(pipeline.device).eval().requires_grad_(False)
    return module


def check_whole(encoder: Any, missing: Iterable[str], source: str, part: str = FOLDER) -> None:
    """Refuse an encoder with weights that no file gave it: its embeddings would say nothing of the prompt.

    Published Wan checkpoints store ``shared.weight`` alone and say ``tie_word_embeddings: false``; some versions of
    transformers then leave the encoder's own table of words unset.

    Raises:
        UserError: naming the weights and the versions that are known for it.
    """
    lacking = sorted({*missing, *_untied(encoder, Path(source) / part)})
    if lacking:
        import transformers

        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise UserError(
            f"the text encoder of {source!r} was loaded without {shown}, so every prompt would mean the same. "
            f"transformers {transformers.__version__} read it; 5.0, 5.1 and 5.2 are known to leave the word embeddings "
            f"of such a checkpoint unset: install transformers>=5.3 or <5, or else get the folder text_encoder again"
        )


def _untied(encoder: Any, folder: Path) -> list[str]:
    """Tables of words, by name, that are neither the encoder's shared one nor in its files."""
    shared = encoder.get_input_embeddings().weight
    tables = [
        (f"{name}.weight", module.weight)
        for name, module in encoder.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight.shape == shared.shape
    ]
    apart = [name for name, table in tables if table is not shared and not torch.equal(table, shared)]
    return [name for name in apart if name not in _stored_names(folder)]


def _stored_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    return names
