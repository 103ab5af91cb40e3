"""Prompt switches of the streaming world: pairs of captions that differ in exactly one attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes, caption_of

COUNTS = (len(DIGITS), len(COLOURS), len(DIRECTIONS))
STREAM = 2
"""Number of the random stream, apart from those of the world's splits."""


@dataclass(frozen=True)
class SwitchPair:
    """A caption, the one after a switch, and the number of the attribute that changes: 0 digit, 1 colour, 2 direction.

    Both captions name all three attributes.
    """

    before: str
    after: str
    changed: int


def switch_pairs(count: int, seed: int) -> list[SwitchPair]:
    """Draw pairs; digit, colour and direction change in turn, so that any three pairs hold one of each.

    The first pairs of a longer draw are those of a shorter one.
    """
    draws = np.random.default_rng([seed, STREAM]).random((count, len(COUNTS) + 1))
    return [_pair(number % len(COUNTS), row) for number, row in enumerate(draws.tolist())]


def _pair(changed: int, draws: Sequence[float]) -> SwitchPair:
    before = [int(draw * count) for draw, count in zip(draws, COUNTS, strict=False)]
    after = list(before)
    others = COUNTS[changed] - 1
    after[changed] = (before[changed] + 1 + int(draws[-1] * others)) % COUNTS[changed]
    return SwitchPair(caption_of(Attributes(*before)), caption_of(Attributes(*after)), changed)
