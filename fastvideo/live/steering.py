"""Prompts of the tiny world for a live stream: checked, said in words, and changed in one attribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastvideo.errors import UserError
from fastvideo.inference.streaming import check_caption
from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes, caption_of, parse_caption
from fastvideo.wording import did_you_mean

WORDS: Mapping[str, tuple[str, ...]] = {"digit": DIGITS, "colour": COLOURS, "direction": DIRECTIONS}
"""Words of each attribute, in the order of the judge's heads."""
Asked = dict[str, str | None]
"""A word per attribute; ``None`` for one that is left open."""


def attributes_of(prompt: str) -> Attributes:
    """Attributes that a prompt names.

    Raises:
        UserError: for a prompt outside of the tiny world, with its own message.
    """
    check_caption(prompt)
    return parse_caption(prompt)


def asked(attributes: Attributes) -> Asked:
    """Attributes as words."""
    found = vars(attributes)
    return {name: None if found[name] is None else words[found[name]] for name, words in WORDS.items()}


def changed(prompt: str, change: Mapping[str, Any]) -> str:
    """The prompt with another word for some attributes, or, for ``None``, without one.

    Raises:
        UserError: for a prompt, an attribute or a word outside of the tiny world.
    """
    attributes = attributes_of(prompt)
    for name, word in change.items():
        if name not in WORDS:
            raise UserError(f"change: one of {', '.join(WORDS)} is expected, got {name!r}")
        if word is not None and word not in WORDS[name]:
            hint = did_you_mean(str(word), WORDS[name])
            raise UserError(f"change.{name}: one of {', '.join(WORDS[name])} is expected, got {word!r}{hint}")
        attributes = replace(attributes, **{name: None if word is None else WORDS[name].index(word)})
    return caption_of(attributes)
