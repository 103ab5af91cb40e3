"""Policies of a prompt switch: what a stream remembers of the time before it.

A finished chunk is committed when the next one begins, so that a switch can find it not committed yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from fastvideo.distillation.chunks import Contexts, Past
from fastvideo.distillation.sample import Stream
from fastvideo.errors import UserError, did_you_mean

OnSwitch = Literal["recache", "keep", "flush", "cut"]
"""``recache`` reads the whole past again under the new prompt; ``keep`` leaves it; ``flush`` keeps the sink and the
last chunk alone (arXiv 2511.20649); ``cut`` begins a new video."""
Policy = Callable[[Stream, Stream, Contexts, Tensor], Contexts]
"""From the stream under the old prompt, under the new one, the pasts and the last chunk, not in them yet, to the pasts
of the next chunk."""


def checked_policy(name: str) -> OnSwitch:
    """The policy of this name.

    Raises:
        UserError: if there is none.
    """
    if name not in POLICIES:
        known = get_args(OnSwitch)
        raise UserError(f"on_switch {name!r}: one of {', '.join(known)} is expected{did_you_mean(name, known)}")
    return name  # type: ignore[return-value]


def keep(old: Stream, new: Stream, pasts: Contexts, last: Tensor) -> Contexts:
    """The past stays as it was made."""
    return old.commit(pasts, last)


def flush(old: Stream, new: Stream, pasts: Contexts, last: Tensor) -> Contexts:
    """Only the sink and the last chunk stay."""
    first, second = map(_flushed, old.commit(pasts, last))
    return first, second


def recache(old: Stream, new: Stream, pasts: Contexts, last: Tensor) -> Contexts:
    """The kept chunks are read again under the new prompt; the unconditional past has none, and stays."""
    conditional, unconditional = pasts
    assert isinstance(conditional, Past)
    again, length = Past(conditional.reach), conditional.length + last.shape[2]
    for piece in (piece for piece in conditional.pieces if conditional.reach.sees(piece.start, length)):
        begun = replace(again, length=piece.start)
        again = new.denoiser.commit(begun, piece.latents, new.condition, new.context_time)
    return new.commit((again, unconditional), last)


def cut(old: Stream, new: Stream, pasts: Contexts, last: Tensor) -> Contexts:
    """Nothing stays."""
    return new.opened


POLICIES: Mapping[OnSwitch, Policy] = {"recache": recache, "keep": keep, "flush": flush, "cut": cut}


def _flushed(past: object) -> Past:
    assert isinstance(past, Past)
    kept = tuple(piece for piece in past.pieces[:-1] if piece.start < past.reach.sink)
    return replace(past, pieces=(*kept, *past.pieces[-1:]))
