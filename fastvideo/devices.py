"""Devices that a user names: found out before anything is loaded."""

from __future__ import annotations

from fastvideo.errors import UserError
from fastvideo.wording import did_you_mean

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
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter in a torch that was built without the kind
        why = str(error).split(". ")[0].splitlines()[0].strip(" .")
        raise UserError(f"device {name!r} is not on this machine ({why}); one of {known} is expected") from error
