"""The page of a live stream: one HTML file without external resources."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastvideo.live.session import LONGEST
from fastvideo.live.steering import WORDS

PAD = (
    ("up and left", "↖"), ("up", "↑"), ("up and right", "↗"),
    ("left", "←"), ("", "any"), ("right", "→"),
    ("down and left", "↙"), ("down", "↓"), ("down and right", "↘"),
)  # fmt: skip
"""Directions as they lie around a centre, each with its sign."""


def render(name: str, about: str, width: int, height: int, fps: float, world: bool) -> str:
    """The page of a model.

    Args:
        name: of the model.
        about: one line on how it makes a chunk.
        width, height: of a frame in pixels.
        fps: frames per second of the play-out.
        world: true for a model of the tiny world, whose words are offered and whose videos are judged.
    """
    pages = Environment(
        loader=PackageLoader("fastvideo.live"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return pages.get_template("page.html.j2").render(
        name=name, about=about, width=width, height=height, fps=f"{fps:g}", world=world, longest=LONGEST, dash="\u2014",
        pad=PAD, colours=("", *WORDS["colour"]), digits=("", *WORDS["digit"]),
    )  # fmt: skip
