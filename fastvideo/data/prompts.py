"""Prompts files: plain text, one prompt per line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.errors import UserError
from fastvideo.storage import Place, place, read_bytes, state_of
from fastvideo.texts import decoded, lines_of

COUNTED = 8192
"""Prompts whose tokens are counted at once."""


def read_prompts(path: str) -> Sequence[str]:
    """The non-empty lines of a text file, local or at a URL, read once while it does not change.

    Raises:
        UserError: for an unreadable file or one without a prompt.
    """
    try:
        at = place(path)
        prompts = _read(at, state_of(at))
    except OSError as error:
        raise UserError(f"prompts file {path!r}: {error.strerror}") from error
    if not prompts:
        raise UserError(f"prompts file {path!r} has no prompt; one per line is expected")
    return prompts


@lru_cache(maxsize=1)
def _read(file: Place, state: str) -> tuple[str, ...]:
    lines = lines_of(decoded(read_bytes(file), f"prompts file {str(file)!r}"))
    return tuple(prompt for line in lines if (prompt := line.strip()))


def too_long(conditioner: Conditioner, prompts: Sequence[str]) -> dict[int, int]:
    """Tokens of the prompts that have more than the text encoder takes, by their place."""
    found: dict[int, int] = {}
    for start in range(0, len(prompts), COUNTED):
        counts = conditioner.token_counts(prompts[start : start + COUNTED])
        limit = conditioner.text_length
        found |= {start + i: count for i, count in enumerate(counts) if limit is not None and count > limit}
    return found
