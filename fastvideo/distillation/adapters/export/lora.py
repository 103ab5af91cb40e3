"""LoRA files of other programs: their names, and which layers of a network they change.

Five layouts are read and written, as far as a family's ``Exporter.original_name`` has the authors' names. Which one a
file has is not asked: every layer of the network is looked up under all of its spellings. A layer under another name,
or one that stands for several, goes through the converter of the family's diffusers pipeline, and a name that this does
not explain either is an error.

| layout | prefix | layer | factors | alpha |
|---|---|---|---|---|
| diffusers | ``transformer.`` or ``unet.`` | diffusers' | ``lora_A``, ``lora_B`` | multiplied in |
| peft | ``base_model.model.`` | diffusers' | ``lora_A``, ``lora_B`` | in ``adapter_config.json`` |
| kohya (musubi-tuner) | ``lora_unet_`` | authors', dots as underscores | ``lora_down``, ``lora_up`` | in the file |
| comfy | ``diffusion_model.`` | authors' | ``lora_A``, ``lora_B`` | multiplied in |
| lightx2v | ``diffusion_model.`` | authors' | ``lora_down``, ``lora_up`` | multiplied in |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.adapters.diffusers.single_file import load_tensors
from fastvideo.distillation.adapters.export.base import Exporter
from fastvideo.distillation.experts import SIDES, by_expert
from fastvideo.distillation.lora_file import LoRAFile
from fastvideo.distillation.types import UserError
from fastvideo.texts import read_text
from fastvideo.wording import did_you_mean

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "unet.", "")
TEXT_PREFIXES = ("lora_te", "text_encoder")
"""Prefixes of layers of text encoders."""
OF_TEXTS = (
    "; text encoders stay as they are here: merge the file with diffusers, which changes both "
    "(pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.save_pretrained(FOLDER)), and give the folder"
)
"""Way out for a file that changes text encoders, as the end of a message."""
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora_B.default.weight", ".lora.up.weight")
ALPHA = ".alpha"
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ""}
"""Suffixes of whole changes of a parameter, beside those of low rank."""
OTHER_KINDS = {"dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon", "lora_magnitude": "DoRA"}
"""Parts of names that only other kinds of adapters have."""
PEFT_CONFIG, PEFT_METADATA = "adapter_config.json", "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""File names of an adapter in a folder, of diffusers and of peft."""
SIDE_WORD = re.compile(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)", re.IGNORECASE)
"""Word in a file's name that says for which of two experts it is: ``HIGH``, ``HighNoise``, ``high_noise``."""
Name = Callable[[str], str]
"""From diffusers' name of a module or parameter to the authors'."""


@dataclass(frozen=True)
class Scale:
    """Factor on ``B A`` that a file states outside of its tensors: ``alpha`` per layer, over the rank or its root."""

    alpha: Callable[[str], float | None]
    rank_stabilised: bool = False

    def of(self, layer: str, rank: int, stored: float | None) -> float:
        """The factor of a layer; ``stored`` is the alpha among the tensors."""
        alpha = self.alpha(layer) if stored is None else stored
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.rank_stabilised else rank)


NO_SCALE = Scale(lambda layer: None)


def find_file(path: Path) -> Path:
    """The file of an adapter behind a path: itself, or the one in a folder.

    Raises:
        UserError: if there is none, or several and no usual name among them.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; a LoRA's .safetensors file, or a folder with one, is expected")
    usual = [path / name for name in FILES if (path / name).is_file()]
    found = usual or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        held = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} holds several .safetensors files, or none: name one of them (found: {held})")
    return found[0]


def read_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], exporter: Exporter) -> LoRAFile:
    """Read an adapter of any layout for a network.

    A network of two experts has a file for each, in one folder or one alone, whose names say which (:data:`SIDE_WORD`).

    Args:
        path: its file, or a folder that holds it.
        shapes: shape of every parameter of the network, by diffusers' name.
        exporter: of the family.

    Raises:
        UserError: if the file cannot be read, holds another kind of adapter or a name that no layer of the network has,
            or does not fit.
    """
    experts = by_expert(shapes)
    if "" not in experts:
        return _read_experts(path, experts, exporter)
    file = find_file(path)
    tensors, metadata = load_tensors(file)
    _check_kind(file, tensors)
    known = spellings(shapes, exporter.original_name)
    parts = _sorted_parts(file, _in_diffusers(file, tensors, known, exporter), known, shapes)
    scale = _scale_beside(file, metadata)
    factors = {layer: _factors(file, layer, found, shapes, scale) for layer, found in parts.low_rank.items()}
    for name, change in parts.differences.items():
        _check_shape(file, name, change, shapes[name])
    if not factors and not parts.differences:
        raise UserError(f"{file} holds no adapter: it has no low-rank factors (lora_A, lora_down) at all")
    return LoRAFile(file, factors, parts.differences)


def _read_experts(path: Path, experts: Mapping[str, Mapping[str, tuple[int, ...]]], exporter: Exporter) -> LoRAFile:
    """The files of two experts as one, under the names of the module that holds both."""
    factors, differences = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
    parts = {side: part for part, side in SIDES.items()}
    for side, file in _files_by_side(path).items():
        read = read_lora(file, experts[side], exporter)
        factors |= {f"{parts[side]}.{name}": value for name, value in read.factors.items()}
        differences |= {f"{parts[side]}.{name}": value for name, value in read.differences.items()}
    return LoRAFile(path, factors, differences)


def _files_by_side(path: Path) -> dict[str, Path]:
    """The file of each expert, by its side; one file alone, or all of a folder.

    Raises:
        UserError: if a name says no side or both, two say the same, or there is no file.
    """
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [find_file(path)]:
        sides = {f"{word.lower()}_noise" for word in SIDE_WORD.findall(file.stem)}
        if len(sides) != 1:
            raise UserError(
                f"{file}: the network has two experts, and the file's name "
                f"{'says both' if sides else 'does not say which it is for'}: {' or '.join(SIDES.values())} is "
                f"expected (such as high_noise_lora.safetensors); rename it, or move it elsewhere if it is no part of "
                f"the LoRA"
            )
        if (side := sides.pop()) in found:
            raise UserError(f"{path} holds several files for {side}: {found[side].name}, {file.name}; keep one")
        found[side] = file
    if not found:
        raise UserError(f"{path} holds no .safetensors file; one for each of the network's two experts is expected")
    return found


def _check_kind(file: Path, tensors: Iterable[str]) -> None:
    for name in tensors:
        for part, kind in OTHER_KINDS.items():
            if part in name:
                raise UserError(f"{file} is a {kind} ({name}); plain LoRA files are read alone")


def spellings(parameters: Iterable[str], original: Name) -> dict[str, str]:
    """Every spelling of a module or parameter, without prefix and suffix, to diffusers' name."""
    found: dict[str, str] = {}
    for parameter in parameters:
        own = parameter.removesuffix(".weight").removesuffix(".bias")
        for name in {own, _or_same(original, own)}:
            found[name] = found[name.replace(".", "_")] = own
            if name.endswith("modulation"):  # LightX2V writes `blocks.0.diff_m`
                found[name.rpartition(".")[0]] = own
    return found


def _or_same(original: Name, name: str) -> str:
    try:
        return original(name)
    except UserError:
        return name


def _in_diffusers(
    file: Path, tensors: Mapping[str, Tensor], known: Mapping[str, str], exporter: Exporter
) -> dict[str, Tensor]:
    """The file with diffusers' names for layers that are not known, where its converter gives known ones."""
    found, unknown = dict(tensors), dict[str, dict[str, Tensor]]()
    for name in tensors:
        if not _is_known(name, known):
            unknown.setdefault(_split(name)[0], {})[name] = found.pop(name)
    for stem, layer in unknown.items():
        made = _converted(stem, layer, known, exporter)
        if found.keys() & made.keys():
            raise UserError(f"{file}: {stem} changes layers that have tensors of their own: merge the parts one by one")
        found |= made
    return found


def _is_known(name: str, known: Mapping[str, str]) -> bool:
    return any(stem in known for stem in _stems(_split(name)[0]))


def _converted(stem: str, layer: dict[str, Tensor], known: Mapping[str, str], exporter: Exporter) -> dict[str, Tensor]:
    """Both factors of one layer by the pipeline's converter; the layer as it is, if that knows it under no suffixes.

    It gets one layer at a time, so that what it leaves out is seen, with ``alpha`` multiplied in, which it forgets for
    some layers.
    """
    import diffusers

    found = {_split(name)[1]: tensor for name, tensor in layer.items()}
    convert = getattr(getattr(diffusers, next(iter(exporter.config.pipelines), ""), None), "lora_state_dict", None)
    if convert is None or found.keys() - {"alpha"} != {"down", "up"}:
        return layer
    down, up, alpha = found["down"], found["up"], found.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        return layer
    up = up if alpha is None else up.float() * (alpha.float() / down.shape[0])
    for suffixes in zip(DOWN, UP, strict=True):
        try:
            made = convert({stem + suffixes[0]: down, stem + suffixes[1]: up})
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue
        made = made[0] if isinstance(made, tuple) else made  # Stable Diffusion's has alphas beside
        if made and all(_is_known(name, known) for name in made):
            return dict(made)
    return layer


@dataclass
class _Parts:
    """Tensors of a file, by diffusers' name of their layer or parameter."""

    low_rank: dict[str, dict[str, Tensor]]
    differences: dict[str, Tensor]


def _sorted_parts(
    file: Path, tensors: Mapping[str, Tensor], known: Mapping[str, str], parameters: Container[str]
) -> _Parts:
    parts, unknown = _Parts({}, {}), []
    for name, tensor in tensors.items():
        stem, kind = _split(name)
        layer = next((known[s] for s in _stems(stem) if s in known), None)
        changed = f"{layer}{DIFFERENCES.get(kind or '', '.weight')}"
        if kind is None or layer is None or changed not in parameters:
            unknown.append(name)
        elif kind in DIFFERENCES:
            _add(file, name, parts.differences, changed, tensor)
        else:
            _add(file, name, parts.low_rank.setdefault(layer, {}), kind, tensor)
    if unknown:
        others = [name for name in unknown if not name.startswith(TEXT_PREFIXES)]
        hint = did_you_mean(_stems(_split(others[0])[0])[0], list(known)) if others else OF_TEXTS
        raise UserError(
            f"{file}: {len(unknown)} of its tensors belong to no layer of this network, the first of them "
            f"{', '.join(sorted(unknown)[:5])}{hint}"
        )
    return parts


def _add(file: Path, name: str, found: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    if key in found:
        raise UserError(f"{file}: {name} is there twice, under two spellings of its layer: merge the parts one by one")
    number = tensor.is_floating_point() or key == "alpha"  # kohya's scripts write whole alphas
    if not number or not tensor.float().isfinite().all():
        kind = "not finite" if number else str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{file}: {name} is {kind}; finite floating-point numbers are expected")
    found[key] = tensor


def _split(name: str) -> tuple[str, str | None]:
    """Name of a layer with its prefix, and the kind of tensor: ``down``, ``up``, ``alpha`` or a difference's suffix."""
    for kind, suffixes in (("down", DOWN), ("up", UP), ("alpha", (ALPHA,))):
        for suffix in suffixes:
            if name.endswith(suffix):
                return name.removesuffix(suffix), kind
    for suffix in DIFFERENCES:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, None


def _stems(stem: str) -> list[str]:
    """Readings of a name, with each prefix taken off that it has."""
    return [stem.removeprefix(prefix) for prefix in PREFIXES if stem.startswith(prefix)]


def _factors(
    file: Path, layer: str, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], scale: Scale
) -> tuple[Tensor, Tensor]:
    if "down" not in found or "up" not in found:
        lacking = "A (down)" if "up" in found else "B (up)"
        raise UserError(f"{file}: the layer {layer} has no factor {lacking}")
    down, up = found["down"].flatten(1), found["up"].flatten(1)
    shape = shapes.get(f"{layer}.weight", ())
    rank = down.shape[0]
    wanted = (shape[0], rank), (rank, torch.Size(shape[1:]).numel()) if shape else ()
    if not shape or not rank or (tuple(up.shape), tuple(down.shape)) != wanted:
        raise UserError(
            f"{file}: the layer {layer} is {tuple(shape)} in this network; B {tuple(up.shape)} and A "
            f"{tuple(down.shape)} do not fit it"
        )
    if "alpha" in found and found["alpha"].numel() != 1:
        raise UserError(f"{file}: the layer {layer} has {found['alpha'].numel()} alphas, one is expected")
    stored = float(found["alpha"]) if "alpha" in found else None
    factor = scale.of(layer, rank, stored)
    return down, up if factor == 1.0 else up.float() * factor


def _check_shape(file: Path, name: str, change: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(change.shape) != tuple(shape):
        raise UserError(f"{file}: the change of {name} is {tuple(change.shape)}, the parameter {tuple(shape)}")


def _scale_beside(file: Path, metadata: Mapping[str, str]) -> Scale:
    """Scale from peft's ``adapter_config.json`` beside the file, or from the header that diffusers writes."""
    beside = file.parent / PEFT_CONFIG
    if beside.is_file() and file.name == FILES[1]:
        return _peft_scale(_json_object(read_text(beside, str(beside)), str(beside)), file)
    if PEFT_METADATA in metadata:
        own = _json_object(metadata[PEFT_METADATA], f"{file}: {PEFT_METADATA} in its header")
        return _peft_scale(
            {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in own.items()}, file
        )
    return NO_SCALE


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: an object is expected, got a {type(found).__name__}")
    return found


def _peft_scale(config: Mapping[str, Any], file: Path) -> Scale:
    if config.get("use_dora"):
        raise UserError(f"{file} is a DoRA (its config says so); plain LoRA files are read alone")
    patterns = config.get("alpha_pattern") or {}
    for value in (*patterns.values(), config.get("lora_alpha")):
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{file}: its config says lora_alpha {value!r}, a finite number is expected")

    def alpha(layer: str) -> float | None:
        from peft.utils.other import get_pattern_key

        value = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha"))
        return None if value is None else float(value)

    return Scale(alpha, bool(config.get("use_rslora")))


@dataclass(frozen=True)
class Layout:
    """Names of one program.

    Attributes:
        file: name of the file.
        prefix: of every layer; ``None`` is the pipeline's name of the network.
        down, up: of every layer's factors.
        original: the authors' names of layers instead of diffusers'.
        underscores: dots in a layer's name are written so.
        alpha: readers want an ``alpha`` per layer; it is the rank, so that strength 1 is right everywhere.
    """

    file: str
    prefix: str | None
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    original: bool = False
    underscores: bool = False
    alpha: bool = False

    def write(self, factors: Mapping[str, tuple[Tensor, Tensor]], original: Name, part: str) -> dict[str, Tensor]:
        """The adapter under this program's names; ``part`` is the pipeline's name of the network.

        Raises:
            UserError: for a layer that it has no name for.
        """
        named: dict[str, Tensor] = {}
        for layer, (down, up) in factors.items():
            name = original(layer) if self.original else layer
            name = (f"{part}." if self.prefix is None else self.prefix) + (
                name.replace(".", "_") if self.underscores else name
            )
            named |= {f"{name}{self.down}": down.contiguous(), f"{name}{self.up}": up.contiguous()}
            if self.alpha:
                named[f"{name}{ALPHA}"] = torch.tensor(float(down.shape[0]))
        return named


LAYOUTS = {
    "diffusers": Layout(FILES[0], None),
    "peft": Layout(FILES[1], "base_model.model."),
    "kohya": Layout("kohya_lora.safetensors", "lora_unet_", DOWN[1], UP[1], True, underscores=True, alpha=True),
    "comfy": Layout("comfyui_lora.safetensors", "diffusion_model.", original=True),
    "lightx2v": Layout("lightx2v_lora.safetensors", "diffusion_model.", DOWN[1], UP[1], original=True),
}
"""Layouts, by name."""
