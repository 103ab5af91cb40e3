"""Prompts files: plain text, one prompt per line."""

from __future__ import annotations

from pathlib import Path

from fastvideo.errors import UserError


def read_prompts(path: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        UserError: for an unreadable file or one without a prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.prompts: cannot read prompts from {path!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"data.prompts: {path!r} has no prompt; one per line is expected")
    return prompts
