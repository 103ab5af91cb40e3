"""Prompt switches of a video that is planned whole: frames where chunks begin, and the prompts from there on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastvideo.errors import UserError
from fastvideo.inference.streaming import Streamer
from fastvideo.sampling_ranges import ON_SWITCH, OnSwitch

FORM = 'FRAME:"PROMPT", such as 65:"a red seven moving up", is expected'
QUOTED = re.compile(r"""^(["'])((?:(?!\1).)*)\1$""", re.DOTALL)
"""A text in quotes that do not occur inside it."""


@dataclass(frozen=True)
class PlannedSwitch:
    """A prompt from video frame ``frame`` on, counted from 0."""

    frame: int
    prompt: str


def parse_switch(text: str) -> PlannedSwitch:
    """Read ``FRAME:PROMPT``; quotes around the whole prompt are not part of it, those within are.

    Raises:
        UserError: if it has another form.
    """
    frame, _, prompt = text.partition(":")
    prompt = QUOTED.sub(r"\2", prompt.strip()).strip()
    if not (frame.strip().isdecimal() and prompt):
        raise UserError(f"--switch {text!r}: {FORM}")
    return PlannedSwitch(int(frame), prompt)


@dataclass(frozen=True)
class SwitchPlan:
    """Prompts by the frame of the chunk that begins with each, and notes on those that were asked for elsewhere."""

    prompts: Mapping[int, str]
    on_switch: OnSwitch
    notes: tuple[str, ...] = ()


def plan_switches(
    streamer: Streamer,
    frames: int,
    wanted: Sequence[PlannedSwitch],
    on_switch: OnSwitch = ON_SWITCH,
    given: int = 0,
) -> SwitchPlan:
    """Move every switch to the next chunk, and check its prompt; the first ``given`` frames are not made.

    Raises:
        UserError: for a switch at the start, among given frames, behind the last chunk or at the chunk of another one,
            and for a prompt that the model cannot take.
    """
    if early := [one.frame for one in wanted if 0 < one.frame < given]:
        raise UserError(f"--switch {early[0]}: the first {given} frames are given: frame {given} is the first made")
    starts = chunk_starts(streamer, frames, [one.frame for one in wanted], restarts=on_switch == "cut", given=given)
    prompts: dict[int, str] = {}
    notes = []
    for one in sorted(wanted, key=lambda one: one.frame):
        at = _chunk_of(one, starts, frames)
        if at in prompts:
            raise UserError(f"--switch {one.frame}: the chunk at frame {at} has another switch already")
        if at != one.frame:
            notes.append(f"--switch {one.frame}: inside a chunk; its prompt holds from frame {at} on")
        streamer.check_prompt(one.prompt)
        prompts[at] = one.prompt
    return SwitchPlan(prompts, on_switch, tuple(notes))


def _chunk_of(one: PlannedSwitch, starts: Sequence[int], frames: int) -> int:
    if one.frame == 0:
        raise UserError("--switch 0: the video begins with --prompt; a switch comes later")
    found = next((start for start in starts if start >= one.frame), None)
    if found is None:
        has = f"the video has frames 0 to {frames - 1}"
        raise UserError(f"--switch {one.frame}: {has}, and its last chunk begins at frame {starts[-1]}")
    return found


def chunk_starts(
    streamer: Streamer, frames: int, wanted: Sequence[int], *, restarts: bool, given: int = 0
) -> list[int]:
    """First video frames of all chunks; with ``restarts`` a new video, which begins with one frame, at every switch.

    ``given``: frames that the stream goes on from, whose first chunk takes their remainder.

    Raises:
        UserError: for a number of frames that no video has.
    """
    return list(_starts(streamer, frames, streamer.first_chunk(given or frames), sorted(wanted), restarts))


def _starts(streamer: Streamer, frames: int, first: int, wanted: Sequence[int], restarts: bool) -> Iterator[int]:
    start, latents, begun, waiting = 0, first, 0, list(wanted)
    while start < frames:
        yield start
        if waiting and 0 < waiting[0] <= start:
            waiting.pop(0)
            begun, latents = (start, streamer.reach.chunk) if restarts else (begun, latents)
        start = begun + streamer.video_frames(latents)
        latents += streamer.reach.chunk
