"""Requirements of a run on its dataset, checked before the first step; errors name both numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fastvideo.data.index import FileIndex, Kind, latent_shape
from fastvideo.data.schema import LATENT, TEXT, is_text
from fastvideo.data.stored_texts import Texts, check_same_texts
from fastvideo.distillation.types import UserError


@dataclass(frozen=True)
class DataRequirements:
    """Tensors that a run reads, and their shapes.

    Attributes:
        latents: ``(C, F, H, W)``, or ``None`` to leave latents on disk.
        any_size: take latents of every size that has those channels.
        extras: shape of one sample by name (``Conditioner.stored_shapes``); texts may be absent.
        names: name in a batch of each text column that has another; the model's own is ``text_embedding``.
        text_length: most tokens of the model's own text.
        texts: settings of the text columns that every file shares.
        normalise: raw latents of the codec to normalised ones.
        codec_keys: of the model's codec (``Codec.known_keys``); none takes latents of any.
        unmarked: scale of latents in files that do not say it.
    """

    latents: tuple[int, ...] | None = None
    any_size: bool = False
    extras: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    text_length: int | None = None
    texts: Texts = field(default_factory=dict)
    normalise: Callable[[Tensor], Tensor] | None = None
    codec_keys: Sequence[str] = ()
    unmarked: Literal["raw", "normalised"] = "raw"

    @property
    def required(self) -> list[str]:
        """Tensors that every row must have."""
        return ([LATENT] if self.latents else []) + [name for name in self.extras if not is_text(name)]

    def named(self, column: str) -> str:
        """Name in a batch of what a column holds."""
        return self.names.get(column, column)


def is_raw(made: Mapping[str, Any]) -> bool:
    """True if a file holds latents as the VAE gives them: FastVideo's files do, and it normalises in training."""
    return made.get("latents") != "normalised"


def sample_shape(name: str, kind: Kind, wanted: DataRequirements) -> tuple[int, ...]:
    """A stored shape as the shape of one sample: without a batch dimension of 1."""
    shape = kind[0]
    if name == LATENT:
        return latent_shape(shape)
    return shape[1:] if len(shape) == len(wanted.extras[name]) + 1 and shape[0] == 1 else shape


def check_fits(file: FileIndex, wanted: DataRequirements) -> None:
    """Refuse a file that the model cannot be trained on.

    Raises:
        UserError: naming the file and both values of latent shape, channels, text width or codec.
    """
    for name in wanted.required:
        if file.tensors[name].missing:
            row = int(np.flatnonzero(file.tensors[name].codes < 0)[0])
            raise UserError(f"{file.path}, row {row}: no {name}, which the model needs")
    if wanted.latents:
        _check_latents(file, wanted.latents, wanted)
    check_same_texts(file.path, file.made.get("texts", {}), wanted.texts)
    for name, expected in wanted.extras.items():
        for kind in file.tensors[name].kinds if name in file.tensors else ():
            found = sample_shape(name, kind, wanted)
            if len(found) != len(expected) or any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
                shown = ["any" if e is None else e for e in expected]
                raise UserError(f"{file.path}: {name} has shape {list(found)}, the model takes {shown}")
            if wanted.named(name) == TEXT and wanted.text_length is not None and found[0] > wanted.text_length:
                raise UserError(
                    f"{file.path}: a text embedding has {found[0]} tokens, the model takes {wanted.text_length} "
                    f"(model.max_sequence_length)"
                )
            _check_dtype(file, name, kind[1])


def _check_dtype(file: FileIndex, name: str, dtype: str) -> None:
    said = file.made.get("texts", {}).get(name, {}).get("dtype", dtype)
    if dtype != said:
        raise UserError(f"{file.path}: {name} holds {dtype}, and the file says that it was written in {said}")


def _check_latents(file: FileIndex, expected: tuple[int, ...], wanted: DataRequirements) -> None:
    for shape in (latent_shape(shape) for shape, _ in file.tensors[LATENT].kinds):
        if len(shape) != 4 or shape[0] != expected[0]:
            raise UserError(f"{file.path}: latents have {shape[0]} channels, the model's codec has {expected[0]}")
        if shape != expected and not wanted.any_size:
            raise UserError(
                f"{file.path}: latents have shape {shape} (C, F, H, W), the model is configured for {expected}: set "
                f"model.height, model.width and model.num_frames to what the data has, or data.buckets: true"
            )
    made = file.made.get("codec_key")
    if made and wanted.codec_keys and made not in wanted.codec_keys:
        raise UserError(
            f"{file.path}: its latents were encoded with another VAE (of {file.made.get('model')}, {made[:12]}) than "
            f"the model's ({wanted.codec_keys[0][:12]})"
        )
