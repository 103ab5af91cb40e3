"""Prompts files: plain text, one prompt per line."""

from __future__ import annotations

from pathlib import Path

from fastvideo.errors import UserError
from fastvideo.texts import lines_of, read_text


def read_prompts(path: str) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        UserError: for an unreadable file or one without a prompt.
    """
    lines = lines_of(read_text(Path(path), f"data.prompts: {path!r}"))
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"data.prompts: {path!r} has no prompt; one per line is expected")
    return prompts
