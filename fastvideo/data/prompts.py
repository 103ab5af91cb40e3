"""Prompts files: plain text, one prompt per line."""

from __future__ import annotations

from fastvideo.errors import UserError
from fastvideo.storage import read_bytes


def read_prompts(path: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file, local or at a URL.

    Raises:
        UserError: for an unreadable file or one without a prompt.
    """
    try:
        lines = read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.prompts: cannot read prompts from {path!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"data.prompts: {path!r} has no prompt; one per line is expected")
    return prompts
