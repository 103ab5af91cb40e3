"""Networks in one file: the authors' own layout, ComfyUI's, and its fp8 weights with scales.

A whole checkpoint, with VAE and text encoders beside the network, is read for its network alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.gguf_file import GGUFFile, multiplied_out
from fastvideo.distillation.scaling import is_gguf
from fastvideo.distillation.types import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
SCALES = (".scale_weight", ".weight_scale")
"""Suffixes of the scale beside an fp8 weight, in ComfyUI's earlier and present files."""
INPUT_SCALES = (".scale_input", ".input_scale")
"""Scales of activations, which float computation does not need."""
MARKS = ("scaled_fp8", ".comfy_quant")
"""Tensors that only say that a file is quantised."""
DROPPED = (*SCALES, *INPUT_SCALES, *MARKS)
"""Ends of the names of tensors that are no weights."""
ROOT = "model.diffusion_model."
"""Prefix of the network in a whole checkpoint."""
UNET = "UNet2DConditionModel"
"""Class of diffusers whose converter asks for :data:`ROOT` and the config, and passes over what it does not know."""
WRAPPER = "model."
"""Prefix of Self-Forcing's wrapper around its network."""
GENERATORS = ("generator_ema", "generator")
"""Keys of the networks in a checkpoint of Self-Forcing and LongLive, the averaged one first."""
LIGHTNING = "state_dict"
"""Key of the tensors in a checkpoint of Lightning, as Stable Diffusion's authors wrote them."""
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError)
"""Errors of safetensors and of torch on files that hold something else."""
UNKNOWN_LAYOUT = (
    "none of its names is this network's, so that it holds another model, or this one in a layout that diffusers does "
    "not convert: give a pipeline folder of diffusers"
)
OTHER_SIZE = "for a network of another size than the model's, put the config.json of its folder beside the file"
OTHER_CONFIG = "the config.json in it describes other weights: copy the folder anew, or mend its config.json"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_single_file(path: str | None) -> bool:
    """True for a path that names a file of weights and not a folder; a .gguf file need not be there."""
    return is_gguf(path) or (path is not None and path.endswith(SUFFIXES) and Path(path).is_file())


def is_quantised(path: str | None) -> bool:
    """True for a single file that holds fp8 weights; in a whole checkpoint the network's alone count."""
    if not is_single_file(path) or not str(path).endswith(".safetensors"):
        return False
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        own = [name for name in names if name.startswith(ROOT)] or names
        return any(file.get_slice(name).get_dtype().startswith("F8") for name in own)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file; packed ones of a .gguf file are multiplied out.

    A pickle is read if it holds nothing but tensors and plain values, such as numbers and texts. Of a checkpoint of
    Self-Forcing the tensors are the averaged generator's, or the generator's where no average is kept; of one of
    Lightning, those of its ``state_dict``.

    Raises:
        UserError: if it cannot be read, or holds anything else, such as the objects of a training.
    """
    if is_gguf(str(file)):
        return {name: multiplied_out(tensor) for name, tensor in GGUFFile(str(file), str(file)).tensors().items()}, {}
    try:
        if file.suffix != ".safetensors":
            content = dict(torch.load(file, map_location="cpu", weights_only=True))
            return _tensors_alone(file, _generator(content) or content.get(LIGHTNING, content)), {}
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
    except UnpicklingError as error:  # torch's own text tells to switch its protection off
        raise UserError(
            f"{file} cannot be read as a file of weights: it is damaged, or holds Python objects beside tensors: save "
            f"the weights as .safetensors"
        ) from error
    except UNREADABLE as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as a file of weights: {first}") from error


def _generator(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The network in a checkpoint of Self-Forcing, without the wrapper's prefix; ``None`` in any other file."""
    held = [content[key] for key in GENERATORS if isinstance(content.get(key), Mapping)]
    return {name.removeprefix(WRAPPER): value for name, value in held[0].items()} if held else None


def _tensors_alone(file: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise UserError(
            f"{file} holds more than tensors by name, such as a training's checkpoint does ({', '.join(other[:5])}): "
            f"save the weights alone, as .safetensors"
        )
    return content


def load_single_file(network: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a single file's tensors into a network of the right size, which may be on the meta device.

    Each fp8 tensor is let go when it is multiplied out, if nobody else holds it.

    Raises:
        UserError: as :func:`dequantised`, :func:`in_diffusers` and :func:`check_fit`.
    """
    tensors = of_network(tensors)
    state = in_diffusers(network, dequantised(path, tensors, stored_dtypes(network, tensors, path)), path)
    check_fit(network, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    own = network.state_dict()
    network.load_state_dict({name: state.pop(name).to(own[name].dtype) for name in own}, assign=True)


def stored_dtypes(network: nn.Module, tensors: Mapping[str, Tensor], path: str) -> dict[str, torch.dtype]:
    """Dtype in a network of each fp8 tensor of a file: its own where it is only renamed, or else that of matrices."""
    if not any(tensor.dtype in FLOAT8 for tensor in tensors.values()):
        return {}
    empty = {name: tensor.to("meta") for name, tensor in tensors.items() if not name.endswith(DROPPED)}
    renamed = {id(tensor): name for name, tensor in in_diffusers(network, empty, path).items()}
    own = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    matrices = min(own.values(), key=lambda dtype: dtype.itemsize)
    return {name: own.get(renamed.get(id(tensor), ""), matrices) for name, tensor in empty.items()}


def check_fit(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: str, hint: str = OTHER_SIZE) -> None:
    """Check that tensors, given by their shapes under diffusers' names, are those of a network.

    Args:
        path: the file or folder that holds them.
        hint: the way out if some of them are the network's and others are not.

    Raises:
        UserError: with the first that are not.
    """
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    way_out = hint if own.keys() & shapes else UNKNOWN_LAYOUT
    check_names(type(network), own.keys() - shapes.keys(), shapes.keys() - own.keys(), path, way_out)
    wrong = [name for name in own if own[name] != shapes[name]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: {len(wrong)} tensors do not fit this network, the first of them {name} with {shapes[name]} where "
            f"{own[name]} is expected; {hint}"
        )


def check_names(cls: type[Any], missing: Iterable[str], unknown: Iterable[str], path: str, hint: str) -> None:
    """Refuse weights of which some are missing or unknown, with the number of both and their first names."""
    kinds = (("missing", sorted(missing)), ("unknown", sorted(unknown)))
    if lists := [f"{len(names)} {kind} ({', '.join(names[:5])})" for kind, names in kinds if names]:
        raise UserError(f"{path} is no {cls.__name__} of this size: {', '.join(lists)}; {hint}")


def of_network(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's among a file's tensors, without the prefixes of whole checkpoints and of ComfyUI."""
    own = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items() if name.startswith(ROOT)}
    return own or {name.removeprefix("diffusion_model."): tensor for name, tensor in tensors.items()}


def in_diffusers(network: nn.Module, state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors under a network's own names, by diffusers' own converter of its class where it has one.

    Of the names as they are and those converted, the ones nearer to the network's are taken.

    Args:
        state: those of :func:`of_network`.

    Raises:
        UserError: if the converter does not find what it looks for.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name, own, plain = type(network).__name__, network.state_dict().keys(), dict(state)
    if plain.keys() == own or name not in SINGLE_FILE_LOADABLE_CLASSES:
        return plain
    try:
        converted = _converted(network, SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"], state)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if len(own & plain.keys()) > len(own) / 2:
            return plain
        raise UserError(
            f"{path} is no {name}: diffusers cannot convert its tensors ({error}); it holds another model, or this one "
            f"in another layout: give a pipeline folder of diffusers"
        ) from error
    return min(plain, converted, key=lambda found: len(found.keys() ^ own))


def _converted(network: Any, convert: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that a converter gives them; those that a UNet's passes over, by their own."""
    if type(network).__name__ != UNET:
        return dict(convert(checkpoint=dict(state)))
    found = dict(convert(checkpoint={f"{ROOT}{name}": tensor for name, tensor in state.items()}, config=network.config))
    taken = {id(tensor) for tensor in found.values()}
    return found | {name: tensor for name, tensor in state.items() if id(tensor) not in taken}


def dequantised(path: str, state: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Weights of fp8 ones times their scales, multiplied in float32 and rounded once; other tensors as they are.

    Args:
        state: the tensors; it is left empty, so that a network is never held twice.
        dtypes: of the products, by name.

    Raises:
        UserError: for weights that are quantised in another way.
    """
    scales = {name.removesuffix(s): value for name, value in state.items() for s in SCALES if name.endswith(s)}
    found = {}
    for name in list(state):
        tensor = state.pop(name)
        if name.endswith(DROPPED):
            continue
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {name} holds {kind} numbers: of quantised files, those in scaled fp8 alone are read"
            )
        if tensor.dtype in FLOAT8:
            scale = _scale_of(f"{path}: {name}", tensor, scales.get(name.removesuffix(".weight")))
            tensor = tensor.float().mul_(scale).to(dtypes[name])
        found[name] = tensor
    return found


def _scale_of(name: str, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The factor of a weight, which broadcasts over it: one for all, or one for each of its rows."""
    if scale is None or scale.numel() == 1:
        return torch.ones(()) if scale is None else scale.float().reshape(())
    if scale.numel() != weight.shape[0]:
        raise UserError(f"{name}: a scale of shape {tuple(scale.shape)} for {tuple(weight.shape)} is not known")
    return scale.float().reshape(-1, *[1] * (weight.ndim - 1))
