"""Reading what the repeated blocks of a network give, through forward hooks: no network is forked or copied for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvideo.distillation.types import Condition, UserError

Tokens = tuple[Tensor, ...]
"""Token features, one ``[B, L, D]`` per tap, in the order of the taps."""


class _Reached(Exception):
    """Raised at the door of the first block that nobody asked for."""


def check_taps(taps: Sequence[int], widths: Sequence[int], family: str) -> None:
    """Check that every tap is a block of the network.

    Raises:
        UserError: if the family names no blocks, or a tap is outside them.
    """
    if not widths:
        raise UserError(f"{family} has no features to tap: a family names its blocks and their widths for that")
    wrong = [tap for tap in taps if not 0 <= tap < len(widths)]
    if wrong or not taps:
        raise UserError(f"taps {list(taps)}: blocks 0 to {len(widths) - 1} of {family} can be tapped, at least one")


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
    """Where the tokens of each tap will be, once its block has run."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    for index in taps:
        hooks.enter_context(blocks[index].register_forward_hook(keep(index)))
    return found


class FeatureTaps:
    """The part of a family that answers features: it names its blocks and their widths, the rest is here."""

    blocks: ClassVar[str] = ""
    """Attribute of the network that lists its repeated blocks, for :meth:`features`."""

    whole_forwards: bool = False
    """Set where several processes share a network: they all have to run every forward to its end."""

    @abstractmethod
    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        """The call during which features are read."""

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width ``D`` of the tokens after each repeated block, known without the network; empty: no features."""
        return ()

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[int]) -> Tokens:
        """Tokens float32 ``[B, L, D]`` after each of the repeated blocks ``taps``, frame by frame along ``L``.

        Differentiable in ``x_t`` and in the network; nothing runs after the last tap (but see ``whole_forwards``).

        Raises:
            UserError: for a tap that is no block, or a family without features.
        """
        check_taps(taps, self.feature_widths, type(self).__name__)
        if self.whole_forwards:
            return self.velocity_and_features(network, x_t, t, condition, taps)[1]
        return tapped_early(lambda: self.velocity(network, x_t, t, condition), getattr(network, self.blocks), taps)

    def velocity_and_features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[int]
    ) -> tuple[Tensor, Tokens]:
        """:meth:`velocity` and :meth:`features` from one call of the network."""
        check_taps(taps, self.feature_widths, type(self).__name__)
        blocks = getattr(network, self.blocks)
        u, tokens = tapped(lambda: self.velocity(network, x_t, t, condition), blocks, taps)
        tokens = self.joined(network, tokens)
        if self.whole_forwards:
            # In backward a split network is gathered when the gradient of its prediction comes, so one has to come.
            tokens = (tokens[0] + 0.0 * u.mean(), *tokens[1:])
        return u, tokens

    def joined(self, network: nn.Module, tokens: Tokens) -> Tokens:
        """All tokens of a sample, where the network has those of this process alone."""
        return tokens
