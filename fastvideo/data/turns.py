"""Quarter turns and mirroring of a frame, by the display matrix that phones, cameras and editors write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastvideo.data.faults import VideoError

Image = TypeVar("Image", bound=npt.NDArray[Any])
TOLERANCE = 0.02
"""Sine of the largest angle beside a quarter turn that counts as one: about a degree."""


@dataclass(frozen=True)
class Turn:
    """Turn of a decoded picture into an upright one: swapping its axes, then reversing rows and columns."""

    transposed: bool = False
    rows: bool = False
    columns: bool = False

    def upright(self, image: Image) -> Image:
        """A view of ``image`` ``[H, W, C]`` as it is shown."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return image[:: -1 if self.rows else 1, :: -1 if self.columns else 1]  # type: ignore[return-value]


def turn_of(frame: Any) -> Turn:
    """The turn of a frame's display matrix; none without one.

    Raises:
        VideoError: for an angle that is no quarter turn.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    return Turn() if data is None else _turn(bytes(data))


@cache
def _turn(matrix: bytes) -> Turn:
    """A pixel at (x, y) is shown at (a x + c y, b x + d y): ISO/IEC 14496-12, 8.3.2."""
    a, b, _, c, d = (float(number) for number in np.frombuffer(matrix, np.int32)[:5])
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= TOLERANCE * straight:
        return Turn(False, d < 0, a < 0)
    if max(abs(a), abs(d)) <= TOLERANCE * crossed:
        return Turn(True, b < 0, c < 0)
    raise VideoError(f"turned by {np.degrees(np.arctan2(b, a)):.0f} degrees: only quarter turns can be made upright")
