"""Devices that a user names: found out before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvideo.errors import UserError
from fastvideo.wording import counted, did_you_mean

if TYPE_CHECKING:
    import torch

NAMES = ("cpu", "cuda", "cuda:1", "mps")
"""What people name."""


def check_device(name: str) -> None:
    """Check that a device is one, and is here.

    Raises:
        UserError: if torch knows no device of this name, or has none of the kind on this machine.
    """
    if name == "cpu":
        return
    import torch

    known = ", ".join(NAMES)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: one of {known} is expected{did_you_mean(name, NAMES)}") from error
    if why := _why_not(device):
        raise UserError(f"device {name!r} is not on this machine ({why}); one of {known} is expected")


def _why_not(device: torch.device) -> str | None:
    """Reason for which a device cannot be used; ``None`` for one that can."""
    import torch

    if device.type == "cuda":  # counted: a tensor on it would begin a context, which keeps some of its memory
        count = torch.cuda.device_count()
        return None if (device.index or 0) < count else f"torch sees {counted(count, 'CUDA device')}"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two in a torch without the kind
        return str(error).split(". ")[0].splitlines()[0].strip(" .")
    return None
