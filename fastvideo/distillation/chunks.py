"""Values of streaming: chunks of latent frames, their reach into the past, and the past itself.

A *chunk* is a run of latent frames with one noise level that see each other; the *past* is what a network remembers of
finished chunks. No network is causal: a call is, by its ``context``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastvideo.distillation.types import Batch, Condition, Given
from fastvideo.errors import UserError

Span = tuple[int, int]
"""Frames from the first number up to, and without, the second."""


STREAMING = "streaming"
"""Key of a ``recipe.json`` whose model generates chunk by chunk: the fields of its :class:`Reach`, ``context_time``,
and ``first_ladder`` of a first chunk with other times."""


@dataclass(frozen=True)
class Reach:
    """Frames that a chunk sees beside its own.

    Attributes:
        chunk: Latent frames of a chunk.
        window: Latest past frames that are seen; all if not given. A published window often counts the sink and the
            current chunk too: 12 with a sink of 3 and chunks of 3 is 6 here.
        sink: First frames of a video that stay visible for ever (StreamingLLM, arXiv 2309.17453).
        positions: `window` numbers the visible frames from 0, so that distances stay those of the training; `absolute`
            numbers the frames of the video.

    Raises:
        UserError: for numbers that do not belong together.
    """

    chunk: int = 1
    window: int | None = None
    sink: int = 0
    positions: Literal["window", "absolute"] = "window"

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"reach.chunk: at least 1 latent frame, got {self.chunk}")
        if self.sink < 0 or self.sink % self.chunk:
            raise UserError(f"reach.sink: 0 or a multiple of chunk {self.chunk}, got {self.sink}")
        if self.window is None and self.sink:
            raise UserError("reach.sink: a sink needs a window; without one the whole past is visible anyway")
        if self.window is not None and (self.window < self.chunk or self.window % self.chunk):
            raise UserError(f"reach.window: a positive multiple of chunk {self.chunk}, got {self.window}")

    @classmethod
    def from_visible(cls, chunk: int, visible: int, sink: int = 0) -> Reach:
        """Reach of a published ``local_attn_size`` that counts sink, window and the current chunk."""
        return cls(chunk, visible - sink - chunk, sink)

    def sees(self, start: int, length: int) -> bool:
        """True if a chunk that begins at frame ``length`` sees the earlier one that begins at ``start``."""
        return self.window is None or start < self.sink or start >= length - self.window


def spans(frames: int, chunk: int) -> tuple[Span, ...]:
    """Chunks of a video; the first one takes the remainder, so that all others are equal.

    Raises:
        UserError: if a video is shorter than a chunk.
    """
    if frames < chunk:
        raise UserError(f"reach.chunk: a video of {frames} latent frames has no chunk of {chunk}")
    edges = [0, *range(chunk + frames % chunk, frames + 1, chunk)]
    return tuple(itertools.pairwise(edges))


def per_frame(values: Tensor, frames: int, chunk: int) -> Tensor:
    """One value per chunk ``[B, n]`` as one per frame ``[B, frames]``."""
    counts = torch.tensor([end - start for start, end in spans(frames, chunk)], device=values.device)
    return values.repeat_interleave(counts, dim=1, output_size=frames)


def by_chunk(draw: Callable[[int], Tensor], x0: Tensor, chunk: int) -> Tensor:
    """Values ``[B, F]``, one per chunk of the videos ``x0`` ``[B, C, F, H, W]``, of all that ``draw(count)`` makes."""
    videos, frames = x0.shape[0], x0.shape[2]
    return per_frame(draw(videos * len(spans(frames, chunk))).view(videos, -1), frames, chunk)


@dataclass(frozen=True)
class Masked:
    """Context of one call over all chunks of a video, each with a time of its own (``t`` is ``[B, F]``).

    Without ``clean`` a chunk sees the noisy chunks before it (diffusion forcing, arXiv 2407.01392). With clean latents
    ``[B, C, F, H, W]`` it sees those instead (teacher forcing), and the prediction is the noisy half's.
    ``clean_time`` is the time of the clean latents, for a context with noise.
    """

    reach: Reach
    clean: Tensor | None = None
    clean_time: float = 0.0

    def check_maker(self, maker: object) -> None:
        """Check nothing: latents are for every network."""


@dataclass(frozen=True)
class Piece:
    """One finished chunk in a past.

    Attributes:
        start: number of its first frame in the video.
        latents: ``[B, C, c, H, W]``, as the network saw them.
        layers: what the family's network remembers of them; opaque to everybody else.
    """

    start: int
    latents: Tensor
    layers: tuple[tuple[Tensor, ...], ...]

    @property
    def frames(self) -> int:
        return self.latents.shape[2]


@dataclass(frozen=True)
class Past:
    """Finished chunks that the next one sees. Immutable: pasts share their pieces, and to keep one is a snapshot.

    Attributes:
        reach: of every chunk.
        pieces: those that the next chunk sees, oldest first.
        length: frames committed so far, seen or not.
        maker: network and adapter that committed them; ``None`` for an empty one, and for one of a checkpoint.
        texts: what the family keeps of the prompts of the latest commit for the calls that follow; good until the
            weights change.
        shared: what the family makes once, with its graph, for all calls of a rollout that ends in one backward pass;
            ``None`` if calls stand alone. Passes on to later pasts; good until that pass.
        derived: what the family makes of a past for all calls on it, such as positions; a new past begins without.
    """

    reach: Reach
    pieces: tuple[Piece, ...] = ()
    length: int = 0
    maker: Any = field(default=None, compare=False, repr=False)
    texts: Any = field(default=None, compare=False, repr=False)
    shared: dict[Any, Any] | None = field(default=None, compare=False, repr=False)
    derived: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def add(self, piece: Piece) -> Past:
        """The past after one more chunk; whole pieces beyond sink and window are dropped."""
        length = self.length + piece.frames
        kept = (old for old in (*self.pieces, piece) if self.reach.sees(old.start, length))
        return Past(self.reach, tuple(kept), length, self.maker, shared=self.shared)

    @property
    def frames(self) -> int:
        """Frames that are kept."""
        return sum(piece.frames for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Memory of the network's part of all pieces."""
        tensors = (tensor for piece in self.pieces for layer in piece.layers for tensor in layer)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def positions(self, frames: int) -> tuple[int, ...]:
        """Positions of the kept frames and of the ``frames`` of the next chunk."""
        absolute = [i for piece in self.pieces for i in range(piece.start, piece.start + piece.frames)]
        absolute += range(self.length, self.length + frames)
        return tuple(absolute) if self.reach.positions == "absolute" else tuple(range(len(absolute)))

    def check_maker(self, maker: object) -> None:
        """Check that no other network, nor the same one under another role's adapter, committed the chunks.

        Raises:
            UserError: if one did.
        """
        if self.maker not in (None, maker):
            raise UserError(
                "this past was made by another network, whose keys and values mean nothing to this one: begin with an "
                "empty past, or commit its chunks to this one (causal_rollout.recache)"
            )

    def check(self, x: Tensor) -> None:
        """Check that the next chunk ``[B, C, c, H, W]`` belongs to the same videos.

        Raises:
            UserError: if its batch, channels, size or dtype differ.
        """
        for piece in self.pieces[-1:]:
            if x.dtype != piece.latents.dtype:
                raise UserError(f"a past of {piece.latents.dtype} latents cannot continue with a chunk of {x.dtype}")
            mine, theirs = (tuple(v.shape[:2]) + tuple(v.shape[3:]) for v in (x, piece.latents))
            if mine != theirs:
                raise UserError(f"a past of latents (B, C, H, W) = {theirs} cannot continue with a chunk of {mine}")


Context = Masked | Past
"""Context of a call; ``None`` is a bidirectional one."""
Contexts = tuple[Context | None, Context | None]
"""Contexts of a conditional and of an unconditional call: each has a past of its own."""


def frames_of(condition: Condition, start: int, end: int) -> Condition:
    """Condition of a run of latent frames: conditioning frames and tensors ``[B, C, F, H, W]`` are cut to it.

    Frames behind those of the condition's video are generated ones.
    """
    given = condition.given
    if given is None and not any(value.ndim == 5 for own in condition.tensors.values() for value in own.values()):
        return condition
    cut = condition.map(lambda value: value[:, :, start:end] if value.ndim == 5 else value)
    if given is None or start >= given.mask.shape[1]:
        return Condition(cut.tensors)
    behind = max(0, end - given.mask.shape[1])
    mask = functional.pad(given.mask[:, start:end], (0, behind))
    clean = functional.pad(given.clean[:, :, start:end], (0, 0, 0, 0, 0, behind))
    return Condition(cut.tensors, Given(mask, clean))


def batch_of(batch: Batch, start: int, end: int) -> Batch:
    """A run of latent frames of a batch."""
    channels, _, *size = batch.shape[1:]
    condition = frames_of(batch.condition, start, end)
    negative = Condition(frames_of(batch.negative, start, end).tensors, condition.given)
    x0 = None if batch.x0 is None else batch.x0[:, :, start:end]
    return Batch((len(batch), channels, end - start, *size), condition, negative, x0)


def repeated(condition: Condition) -> Condition:
    """Condition of a video and the same video behind it, for calls that see both."""
    twice = condition.map(lambda value: torch.cat([value, value], dim=2) if value.ndim == 5 else value)
    return Condition(twice.tensors)


@dataclass(frozen=True)
class Run:
    """Frames of one query chunk, and those that it sees, in order; its own are the last.

    ``positions`` number the seen frames. Frames of teacher forcing count on after the clean ones.
    """

    queries: Span
    keys: tuple[Span, ...]
    positions: tuple[int, ...]


def masked_runs(frames: int, reach: Reach, forced: bool) -> tuple[Run, ...]:
    """Runs of one :class:`Masked` call over ``frames`` frames, or twice as many (clean, then noisy) if ``forced``."""
    chunks = spans(frames, reach.chunk)
    runs = []
    for offset in (0, frames) if forced else (0,):
        for index, (start, end) in enumerate(chunks):
            before = [span for span in chunks[:index] if reach.sees(span[0], start)]
            own = (start + offset, end + offset)
            runs.append(Run(own, (*before, own), _positions((*before, (start, end)), reach)))
    return tuple(runs)


def _positions(seen: Sequence[Span], reach: Reach) -> tuple[int, ...]:
    absolute = tuple(itertools.chain.from_iterable(range(*span) for span in seen))
    return absolute if reach.positions == "absolute" else tuple(range(len(absolute)))
