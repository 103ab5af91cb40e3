"""Frames of a video and its latent frames: the first holds one video frame, each of the others several."""

from __future__ import annotations

from fastvideo.errors import UserError


def latent_frames(frames: int, temporal: int) -> int:
    """Latent frames of a video of ``frames``: one for the first, and one for each ``temporal`` frames after it.

    Raises:
        UserError: for a number of frames that no video has.
    """
    rest = (frames - 1) % temporal
    if frames < 1 or rest:
        below = max(1, frames - rest)
        raise UserError(
            f"{frames} frames: one more than a multiple of {temporal} is expected, such as {below} or "
            f"{below + temporal}"
        )
    return (frames - 1) // temporal + 1


def first_frame(latent: int, temporal: int) -> int:
    """First video frame of a latent frame: the video frames of those before it."""
    return 0 if latent == 0 else 1 + (latent - 1) * temporal


def latent_frame(frame: int, temporal: int) -> int:
    """Number of the latent frame that holds a video frame."""
    return -(-frame // temporal)
