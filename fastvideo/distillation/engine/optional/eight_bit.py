"""AdamW's moments in one byte per weight and a scale per block (arXiv 2110.02861), over torchao.

Only large parameters whose rows are whole blocks have 8-bit moments; all others have float32. So no shard cuts a block,
and a checkpoint loads exactly into every layout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastvideo.distillation.engine.parallel.sharding import local
from fastvideo.errors import UserError

BLOCK = 64
"""Values that share a scale; it divides the rows of the networks that are trained here."""
SMALLEST = 4096
"""Fewest elements of a parameter with 8-bit moments, as in bitsandbytes and torchao."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""True for a moment that has a sign."""
CODES, SCALE = "codes", "scale"
TABLE_BYTES = 256 * 4
"""Bytes of the table of values behind the codes; every moment has its own."""


class EightBit:
    """Marks an optimizer with 8-bit moments."""


def check_installed() -> None:
    """Check that torchao is installed.

    Raises:
        UserError: naming the extra to install.
    """
    if find_spec("torchao") is None:
        raise UserError(
            "trainer.optimizer_states: 8bit needs torchao, which is not installed: "
            "pip install 'fastvideo-distillation[eightbit]'"
        )


def _torchao(module: str) -> Any:
    """Import a module of torchao without its warnings about kernels for other devices."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return import_module(module)
    finally:
        logging.disable(before)


def has_codes(shape: Sequence[int]) -> bool:
    """True if a parameter of this shape has 8-bit moments."""
    count = math.prod(shape)
    return count >= SMALLEST and (count // shape[0]) % BLOCK == 0


def moment_bytes(shape: Sequence[int], own: int) -> int:
    """Bytes of one moment of ``own`` elements, a part of the rows of a parameter of this shape."""
    if not has_codes(shape) or not own:
        return own * 4
    return own + own // BLOCK * 4 + TABLE_BYTES


def adamw_8bit(
    parameters: Sequence[nn.Parameter], rate: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """torchao's AdamW, with its state made here by the rule of this module, before the first step.

    torchao compiles the update of every shape; on a CPU it runs eagerly, without a compiler.
    """
    base: Any = _torchao("torchao.optim").AdamW8bit

    class AdamW8bit(base, EightBit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            """Pass the rate as a tensor, which torchao expects; outside a step it is a number."""
            rates = [group["lr"] for group in self.param_groups]
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            for group, value in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(value, dtype=torch.float32)
            try:
                with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                    return super().step(closure)
            finally:
                for group, value in zip(self.param_groups, rates, strict=True):
                    group["lr"] = value

    optimizer: Optimizer = AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=weight_decay, block_size=BLOCK)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for p in parameters:
        moments = {name: _zeros(p.detach(), signed) for name, signed in SIGNED.items()}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _zeros(parameter: Tensor, signed: bool) -> Tensor:
    own = local(parameter)
    if not has_codes(parameter.shape) or not own.numel():  # a process may have no rows
        return torch.zeros_like(parameter)
    state = _torchao("torchao.optim.subclass_8bit").OptimState8bit
    return split_like(parameter, state.zeros(own.shape, signed, BLOCK, own.device, dtype=own.dtype))


def split_like(parameter: Tensor, rows: Tensor) -> Tensor:
    """This process's rows of a tensor that is sharded like ``parameter``; ``rows`` itself if that is whole."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    whole = DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return whole.to(parameter.device)  # weights on the host may be sharded over a mesh of devices


def entries(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """A parameter's state with its 8-bit moments as :func:`parts`."""
    coded = set(SIGNED) if has_codes(parameter.shape) else set()
    return {name: parts(parameter, value) if name in coded else value for name, value in state.items()}


def parts(parameter: Tensor, moment: Tensor) -> dict[str, Tensor]:
    """Codes of an 8-bit moment, in the parameter's shape, and scales ``[rows, blocks]``; not copies."""
    own: Any = local(moment)
    per_row = math.prod(parameter.shape[1:]) // BLOCK
    if own.numel():
        found = {CODES: own.codes, SCALE: own.scale.view(-1, per_row)}
    else:
        found = {CODES: own.to(torch.uint8), SCALE: own.new_zeros((0, per_row))}
    return {name: split_like(parameter, rows) for name, rows in found.items()}


@torch.no_grad()
def fill_moment(moment: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """Fill a moment with :func:`parts` of another one."""
    own: Any = local(moment)
    if own.numel():
        own.codes.copy_(local(stored[CODES]))
        own.scale.copy_(local(stored[SCALE]).flatten())
    return moment
