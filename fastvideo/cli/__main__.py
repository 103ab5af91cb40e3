"""``python -m fastvideo.cli`` is ``fastvideo``."""

from fastvideo.cli import program

program()
