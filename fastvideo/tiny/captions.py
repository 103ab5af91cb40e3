"""Captions of the tiny world: written from attributes, and parsed back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
DIRECTIONS = ("up", "down", "left", "right", "up and left", "up and right", "down and left", "down and right")
WORDS = ("a", "an", "digit", "moving", "and", "up", "down", "left", "right", *DIGITS, *COLOURS)

# Longest first: "up and left" must not be read as "up".
_DIRECTION = "|".join(sorted(DIRECTIONS, key=len, reverse=True))
_PATTERN = re.compile(
    rf"an? (?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<digit>digit|{'|'.join(DIGITS)})"
    rf"(?: moving (?P<direction>{_DIRECTION}))?"
)


@dataclass(frozen=True)
class Attributes:
    """Attributes of a caption: indices into DIGITS, COLOURS and DIRECTIONS; None for an open one."""

    digit: int | None = None
    colour: int | None = None
    direction: int | None = None


def caption_of(attributes: Attributes) -> str:
    """The caption of these attributes, such as "a green seven moving up and left"."""
    noun = "digit" if attributes.digit is None else DIGITS[attributes.digit]
    words = noun if attributes.colour is None else f"{COLOURS[attributes.colour]} {noun}"
    article = "an" if words.startswith("e") else "a"  # "an eight"
    motion = "" if attributes.direction is None else f" moving {DIRECTIONS[attributes.direction]}"
    return f"{article} {words}{motion}"


def parse_caption(text: str) -> Attributes:
    """Attributes of a caption.

    Raises:
        ValueError: for words outside the vocabulary, or words in an order that no caption has.
    """
    clean = " ".join(text.lower().split())
    unknown = sorted(set(clean.split()) - set(WORDS))
    if unknown:
        raise ValueError(f"{text!r}: unknown word {', '.join(unknown)}. The tiny world knows: {', '.join(WORDS)}")
    match = _PATTERN.fullmatch(clean)
    if match is None:
        raise ValueError(f"{text!r} is not a caption of the tiny world: write 'a green seven moving up and left'")
    colour, digit, direction = match["colour"], match["digit"], match["direction"]
    return Attributes(
        digit=None if digit == "digit" else DIGITS.index(digit),
        colour=None if colour is None else COLOURS.index(colour),
        direction=None if direction is None else DIRECTIONS.index(direction),
    )


def outside_note(prompts: Sequence[str]) -> str | None:
    """A warning about prompts outside the tiny world; ``None`` without any."""
    outside = [prompt for prompt in prompts if not _is_caption(prompt)]
    if not outside:
        return None
    share = f"{len(outside)} of {len(prompts)} prompts are" if len(prompts) > 1 else "the prompt is"
    return (
        f"warning: {share} outside the world of this tiny model ({outside[0]!r}): it knows ten digits, "
        f"{len(COLOURS)} colours and {len(DIRECTIONS)} directions, as in 'a green seven moving up and left'"
    )


def _is_caption(text: str) -> bool:
    try:
        parse_caption(text)
    except ValueError:
        return False
    return True
