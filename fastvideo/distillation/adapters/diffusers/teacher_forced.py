"""Teacher forcing of families whose networks take one time per sample: chunk after chunk, on the past of clean ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.chunks import Masked, Past, frames_of, spans
from fastvideo.distillation.types import Condition, UserError


class CausalFamily(Protocol):
    """Family that continues a past."""

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, context: Past
    ) -> Tensor: ...

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float) -> Past: ...


def teacher_forced(
    family: CausalFamily, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, context: Masked
) -> Tensor:
    """A :class:`Masked` call in turn: each noisy chunk on the past of the clean chunks before it.

    The velocity of a family whose networks take one time per sample answers ``Masked`` with it. The numbers are those
    of one call over ``[clean, noisy]``; the gradient flows through the noisy chunks alone, as pasts have none. ``t`` is
    ``[B, F]``, with one time per chunk.

    Raises:
        UserError: for diffusion forcing, and for conditioning frames.
    """
    name, clean = type(family).__name__, context.clean
    if clean is None:
        raise UserError(
            f"{name} takes one time per sample: chunks that are noisy together, each at a time of its own "
            f"(diffusion forcing), need another family; teacher forcing works"
        )
    if condition.given is not None:
        raise UserError(f"{name} takes one time per sample: conditioning frames need another family")
    past, found = Past(context.reach), list[Tensor]()
    for start, end in spans(x_t.shape[2], context.reach.chunk):
        if start:
            before = slice(past.length, start)
            with torch.no_grad():
                seen = frames_of(condition, past.length, start)
                past = family.commit(network, past, clean[:, :, before], seen, context.clean_time)
        own = frames_of(condition, start, end)
        found.append(family.velocity(network, x_t[:, :, start:end], t[:, start], own, context=past))
    return torch.cat(found, dim=2)
