"""AdamW's moments in one byte per weight and a scale per block (arXiv 2110.02861), as torchao keeps them.

A parameter whose rows are whole blocks has such moments, wherever its rows are; others, and small ones, have float32.
So no split over processes cuts a block, and what a checkpoint holds loads exactly into every layout.
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
"""Values that share a scale: small enough to divide the rows of the networks that are trained here."""
SMALLEST = 4096
"""Parameters with fewer elements have float32 moments, as bitsandbytes and torchao have it."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they have a sign."""
CODES, SCALE = "codes", "scale"
TABLE_BYTES = 256 * 4
"""What a code stands for; every moment has its own table."""


class EightBit:
    """Marks an optimizer whose moments are kept so."""


def check_installed() -> None:
    """Check that torchao is there.

    Raises:
        UserError: naming the extra to install.
    """
    if find_spec("torchao") is None:
        raise UserError(
            "trainer.optimizer_states: 8bit needs torchao, which is not installed: "
            "pip install 'fastvideo-distillation[eightbit]'"
        )


def _torchao(module: str) -> Any:
    """A module of torchao, without its warnings about kernels for other devices, which nothing here calls."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return import_module(module)
    finally:
        logging.disable(before)


def has_codes(shape: Sequence[int]) -> bool:
    """Whether the moments of a parameter of this shape are kept in 8 bits."""
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
    """torchao's AdamW; its state is made here and not in the first step, by the rule of this module.

    torchao compiles the update of every shape; on a CPU it runs eagerly, which needs no compiler.
    """
    base: Any = _torchao("torchao.optim").AdamW8bit

    class AdamW8bit(base, EightBit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            """With the rate as a tensor, as torchao wants it; outside a step it is a number, as everybody else does."""
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
    if not has_codes(parameter.shape) or not own.numel():  # a process without rows has nothing to keep in 8 bits
        return torch.zeros_like(parameter)
    state = _torchao("torchao.optim.subclass_8bit").OptimState8bit
    return split_like(parameter, state.zeros(own.shape, signed, BLOCK, own.device, dtype=own.dtype))


def split_like(parameter: Tensor, rows: Tensor) -> Tensor:
    """This process's rows of something that is split like ``parameter``; ``rows`` itself where that is whole."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    whole = DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return whole.to(parameter.device)  # weights on the host may be split over a mesh of devices


def entries(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """A parameter's state with its 8-bit moments as :func:`parts`."""
    coded = set(SIGNED) if has_codes(parameter.shape) else set()
    return {name: parts(parameter, value) if name in coded else value for name, value in state.items()}


def parts(parameter: Tensor, moment: Tensor) -> dict[str, Tensor]:
    """The codes of an 8-bit moment, in the parameter's shape, and the scales ``[rows, blocks]``; not copies."""
    own: Any = local(moment)
    per_row = math.prod(parameter.shape[1:]) // BLOCK
    if own.numel():
        found = {CODES: own.codes, SCALE: own.scale.view(-1, per_row)}
    else:
        found = {CODES: own.to(torch.uint8), SCALE: own.new_zeros((0, per_row))}
    return {name: split_like(parameter, rows) for name, rows in found.items()}


@torch.no_grad()
def fill_moment(moment: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """The moment, with what :func:`parts` gave for it elsewhere."""
    own: Any = local(moment)
    if own.numel():
        own.codes.copy_(local(stored[CODES]))
        own.scale.copy_(local(stored[SCALE]).flatten())
    return moment
