"""What the tests of exporting share: a user's command, and prompts of the toy words."""

from __future__ import annotations

from pathlib import Path

from fastvideo.cli import main

PROMPTS = ["a green seven moving up", "red three"]


def export(source: Path, out: Path, *flags: str, code: int = 0) -> Path:
    """``fastvideo export``, as a user types it."""
    assert main(["export", str(source), "--to", "diffusers", "--out", str(out), *flags]) == code
    return out
