"""Networks in ``.gguf`` files, the quantised ones of ComfyUI and llama.cpp: their tensors, and layers that stay packed.

diffusers reads the file, and computes each packed matrix anew for its call. A tensor that is quantised and no linear
layer's matrix, or that the family keeps in float32, is multiplied out when it is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.types import UserError

PACKAGE = "gguf"
FEW_BITS = "`quantise: nf4` (or int8) stores the matrices of a pipeline folder in as few bits"
"""Way out where such a file cannot be read, for messages."""
SHAPE_FIELD = "comfy.gguf.orig_shape."
"""Field of a file with the shape of a tensor that was stored in another one, before its name."""
PLAIN = ("F32", "F16")
"""Kinds of numbers that diffusers reads as tensors of their dtype."""


def check_installed(where: str) -> None:
    """Check that the package is there that reads such files.

    Raises:
        UserError: naming the extra to install.
    """
    if find_spec(PACKAGE) is None:
        raise UserError(f"{where}: .gguf files need {PACKAGE}, which is not installed: "
                        f"pip install 'fastvideo-distillation[gguf]'")  # fmt: skip


def is_readable(network: str) -> bool:
    """True for a class of diffusers whose ``from_single_file`` takes the tensors of a file without anything beside."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if network not in SINGLE_FILE_LOADABLE_CLASSES:
        return False
    parameters = inspect.signature(SINGLE_FILE_LOADABLE_CLASSES[network]["checkpoint_mapping_fn"]).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return needed == ["checkpoint"]


class GGUFFile:
    """One file, opened: its tensors are read from the disk when they are asked for.

    Args:
        path: the file.
        where: the config's key, for messages.

    Raises:
        UserError: if the package is missing, the file cannot be read as one of this kind, or it is quantised in a way
            that diffusers does not know.
    """

    def __init__(self, path: str, where: str) -> None:
        check_installed(where)
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
        from gguf import GGUFReader

        if not Path(path).is_file():
            raise UserError(f"{where}: there is no such file")
        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise UserError(f"{where} cannot be read as a .gguf file: {error or type(error).__name__}") from error
        kinds = {t.tensor_type for t in self._reader.tensors if t.tensor_type.name not in PLAIN}
        if unknown := sorted(kind.name for kind in kinds - {*SUPPORTED_GGUF_QUANT_TYPES}):
            raise UserError(f"{where}: diffusers does not read tensors of the kind {', '.join(unknown)}")

    @property
    def architecture(self) -> str:
        """The architecture that the file names, such as ``wan``."""
        field = self._reader.get_field("general.architecture")
        return "none" if field is None else str(field.contents())

    def tensors(self, *, empty: bool = False) -> dict[str, Tensor]:
        """Tensors by the file's names, packed as they are, those in another shape multiplied out.

        Args:
            empty: give the same ones on the meta device, and read nothing.
        """
        return {tensor.name: self._tensor(tensor, empty) for tensor in self._reader.tensors}

    def _tensor(self, stored: Any, empty: bool) -> Tensor:
        from diffusers.quantizers.gguf.utils import GGUFParameter

        like = torch.from_numpy(stored.data[:0].copy())
        shape = stored.data.shape
        tensor = like.new_empty(shape, device="meta") if empty else torch.from_numpy(stored.data.copy())
        if stored.tensor_type.name not in PLAIN:
            tensor = GGUFParameter(tensor, quant_type=stored.tensor_type)
        field = self._reader.get_field(f"{SHAPE_FIELD}{stored.name}")
        return tensor if field is None else multiplied_out(tensor).reshape(tuple(field.contents()))


def multiplied_out(tensor: Tensor) -> Tensor:
    """The numbers of a packed tensor; others as they are."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    if isinstance(tensor, GGUFParameter) and tensor.is_meta:
        return torch.empty(tensor.quant_shape, device="meta")
    return dequantize_gguf_tensor(tensor)  # type: ignore[no-any-return]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape that a tensor has, or a packed one when it is multiplied out."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    return tuple(tensor.quant_shape if isinstance(tensor, GGUFParameter) else tensor.shape)


def packed_matrices(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors, in the network's names, that stay packed."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kept = set(network._keep_in_fp32_modules or ())
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: tensor for name, tensor in state.items() if isinstance(tensor, GGUFParameter) and name in linear}
    return {name: tensor for name, tensor in packed.items() if not kept & set(name.split("."))}


def with_packed(network: Any, state: Mapping[str, Tensor], config: str, dtype: torch.dtype) -> nn.Module:
    """A network like ``network``, which may be empty, with these tensors, computing in ``dtype``.

    Args:
        config: folder of its ``config.json``.
    """
    from diffusers import GGUFQuantizationConfig

    packed = packed_matrices(network, state)
    given = {name: packed[name] if name in packed else multiplied_out(tensor) for name, tensor in state.items()}
    made: nn.Module = type(network).from_single_file(
        given, config=config, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), torch_dtype=dtype
    )
    return made
