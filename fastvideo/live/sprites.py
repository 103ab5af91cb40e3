"""Frames of a chunk as one image, in the form that a page can show."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

LOSSLESS = 128 * 128
"""Pixels of a frame up to which a chunk is sent as PNG; larger ones are sent as JPEG."""
QUALITY = 90


def sprite(frames: npt.NDArray[np.uint8]) -> str:
    """The ``data:`` URL of frames ``[n, H, W, 3]``, one below the other."""
    n, height, width, _ = frames.shape
    image = Image.fromarray(np.ascontiguousarray(frames).reshape(n * height, width, 3))
    buffer = io.BytesIO()
    if height * width <= LOSSLESS:
        kind = "png"
        image.save(buffer, "PNG")
    else:
        kind = "jpeg"
        image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
