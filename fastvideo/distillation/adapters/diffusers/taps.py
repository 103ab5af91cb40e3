"""Outputs of a network's repeated blocks, read through forward hooks: no network is forked or copied for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from fastvideo.distillation.adapters.base import Tokens


class _Reached(Exception):
    """Raised at the door of the first block that no tap needs."""


def tapped(call: Callable[[], Tensor], blocks: Sequence[nn.Module], taps: Sequence[int]) -> tuple[Tensor, Tokens]:
    """``call()``, and the tokens that the blocks ``taps`` give during it.

    A block gives its tokens alone, or first of several tensors. Activation checkpointing inside the call is fine: the
    hooks are gone when it runs the blocks again.
    """
    with ExitStack() as hooks:
        found = _listen(hooks, blocks, taps)
        result = call()
    return result, tuple(found[index].float() for index in taps)


def tapped_early(call: Callable[[], Tensor], blocks: Sequence[nn.Module], taps: Sequence[int]) -> Tokens:
    """The tokens alone: ``call`` ends at the door of the block after the last tap."""

    def leave(module: nn.Module, inputs: Any) -> None:
        raise _Reached

    with ExitStack() as hooks:
        found = _listen(hooks, blocks, taps)
        if max(taps) + 1 < len(blocks):
            # Before any hook of the block, such as one that gathers its weights.
            hooks.enter_context(blocks[max(taps) + 1].register_forward_pre_hook(leave, prepend=True))
        with suppress(_Reached):
            call()
    return tuple(found[index].float() for index in taps)


def _listen(hooks: ExitStack, blocks: Sequence[nn.Module], taps: Sequence[int]) -> dict[int, Tensor]:
    """Tokens by tap, filled in as the blocks run."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    for index in taps:
        hooks.enter_context(blocks[index].register_forward_hook(keep(index)))
    return found
