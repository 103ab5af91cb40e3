"""Causal calls of a bidirectional network: attention that reads a view of the past.

A network asks once per call for its table of positions and hands it to every self-attention untouched. For a causal
call that table is a :class:`View`: which tokens see which, and the remembered keys. It travels as an argument, so that
nothing is kept on a module, and recomputation in backward sees what the forward saw.

Every mask of streaming is "a run of queries sees a few runs of keys". So there is no mask, but one call of attention
per run on slices of the keys, on any backend of diffusers, and on the same shapes as when chunks come one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvideo.distillation.chunks import Past, Run, Span
from fastvideo.errors import UserError

Table = tuple[Tensor, Tensor]
"""Cosines and sines ``[1, L, 1, D]`` of the rotation of ``L`` tokens."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values ``[B, L, heads, D]``."""


@dataclass(frozen=True)
class Part:
    """A run of queries and its keys, in tokens; keys count over ``[past, own]`` and end with the queries' own.

    ``table`` is that of the keys; ``None`` if the view has one for all.
    """

    queries: Span
    keys: tuple[Span, ...]
    table: Table | None


@dataclass(frozen=True)
class View:
    """Input of self-attention in one call.

    Attributes:
        parts: runs of queries with their keys.
        table: of all tokens ``[past, own]``, if every token has one position; rotated once instead of once per part.
        past: remembered (keys, values) per layer of each piece, keys without rotation.
        taken: receives (keys, values) of every layer, in order, during a commit.
    """

    parts: tuple[Part, ...]
    table: Table | None = None
    past: tuple[tuple[tuple[Tensor, ...], ...], ...] = ()
    taken: list[tuple[Tensor, ...]] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """Attention of one layer; all tensors ``[B, L, heads, D]``, keys not yet rotated."""
        if self.taken is not None:
            self.taken.append((key, value))
        if self.past:
            if (made := self.past[-1][layer][0].dtype) != key.dtype:
                raise UserError(f"a past of {made} keys cannot continue in a network that computes in {key.dtype}")
            earlier = zip(*(piece[layer] for piece in self.past), strict=True)
            key, value = (torch.cat((*old, own), dim=1) for old, own in zip(earlier, (key, value), strict=True))
        if self.table is not None:
            query, key = rotate_last(query, self.table), rotate(key, self.table)
        if self._sees_all(key):
            return attention(query, key, value)
        queries = Cut.of(query, [part.queries for part in self.parts])
        keys, values = (Cut.of(x, [run for part in self.parts for run in part.keys]) for x in (key, value))
        cut = [(queries.joined([p.queries]), keys.joined(p.keys), values.joined(p.keys)) for p in self.parts]
        mixed = [self._attend(part, *tokens, attention) for part, tokens in zip(self.parts, cut, strict=True)]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def _sees_all(self, key: Tensor) -> bool:
        """True if every query sees every key, as in a call of the next chunk: there is nothing to cut."""
        return len(self.parts) == 1 and self.parts[0].table is None and self.parts[0].keys == ((0, key.shape[1]),)

    def _attend(self, part: Part, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        if part.table is not None:
            query, key = rotate_last(query, part.table), rotate(key, part.table)
        return attention(query, key, value)


class ReadsView:
    """Mark of a processor of attention that reads a :class:`View`, and the number of its layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer


def check_causal(network: Any, blocks: str) -> None:
    """Check that a network's attention reads views.

    Raises:
        UserError: if its tokens are split between processes, or a processor of attention was replaced.
    """
    if network._parallel_config is not None:
        raise UserError(
            "parallel.context: attention over several processes sees no past, so chunks need parallel.context: 1"
        )
    for number, block in enumerate(getattr(network, blocks)):
        processor = block.attn1.processor
        if not isinstance(processor, ReadsView) or processor.layer != number:
            raise UserError(
                f"{blocks}.{number}.attn1 has the processor {type(processor).__name__}, which sees no past: a network "
                f"that continues chunk by chunk keeps the processors that it was loaded with"
            )


@dataclass(frozen=True)
class Cut:
    """Tokens ``[B, L, heads, D]``, cut once where any run begins or ends.

    A slice of its own for each run would have a gradient of the whole length: a third of a teacher-forced step.
    """

    edges: tuple[int, ...]
    pieces: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor, runs: Sequence[Span]) -> Cut:
        """Cut for these runs."""
        edges = tuple(sorted({0, x.shape[1], *(edge for run in runs for edge in run)}))
        return cls(edges, torch.split(x, [end - start for start, end in itertools.pairwise(edges)], dim=1))

    def joined(self, runs: Sequence[Span]) -> Tensor:
        """Runs of tokens, one after the other."""
        found = [self.pieces[i] for run in runs for i in range(*map(self.edges.index, run))]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotary embedding of ``[B, L, heads, D]``, to the bit as diffusers' Wan computes it, in half the time.

    A table holds each value twice, once for both channels of a pair, so that all products are of whole rows.
    """
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * table[0] + turned * table[1]).type_as(x)


def rotate_last(x: Tensor, table: Table) -> Tensor:
    """:func:`rotate` with the last rows of a table."""
    cos, sin = (half[:, -x.shape[1] :] for half in table)
    return rotate(x, (cos, sin))


class TokenGrid(Protocol):
    """Tokens of the frames of a family's videos, and their rotation."""

    def span(self, frames: Span) -> Span:
        """Frames in tokens."""
        ...

    def table(self, positions: tuple[int, ...], device: torch.device) -> Table:
        """Rotation of every token of frames at these positions."""
        ...


@dataclass(frozen=True)
class Grid:
    """Tokens of a frame, and the axes of the rotation of a Wan network."""

    height: int
    width: int
    axes: tuple[int, int, int]
    """Channels of a head that are rotated by frame, row and column."""

    @classmethod
    def of(cls, network: Any, x: Tensor) -> Grid:
        """Grid of latents ``[B, C, F, H, W]``."""
        _, height, width = network.config.patch_size
        rope = network.rope
        return cls(x.shape[3] // height, x.shape[4] // width, (rope.t_dim, rope.h_dim, rope.w_dim))

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    def span(self, frames: Span) -> Span:
        """Frames in tokens."""
        return frames[0] * self.tokens, frames[1] * self.tokens

    def table(self, positions: tuple[int, ...], device: torch.device) -> Table:
        """Rotation of every token of frames at these positions: computed, so that no length ends it."""
        sizes = (positions, tuple(range(self.height)), tuple(range(self.width)))
        axes = [[half.to(device) for half in axis_table(dim, at)] for dim, at in zip(self.axes, sizes, strict=True)]
        return self._spread([cos for cos, _ in axes]), self._spread([sin for _, sin in axes])

    def _spread(self, axes: Sequence[Tensor]) -> Tensor:
        frames, rows, columns = axes
        shape = (len(frames), self.height, self.width, -1)
        spread = [frames[:, None, None].expand(shape), rows[None, :, None].expand(shape)]
        spread.append(columns[None, None].expand(shape))
        return torch.cat(spread, dim=-1).reshape(1, len(frames) * self.tokens, 1, -1)


def axis_table(dim: int, positions: tuple[int, ...]) -> Table:
    """Cosines and sines float32 ``[len(positions), dim]`` along one axis, in diffusers' own way."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    at = torch.tensor(positions)
    cos, sin = get_1d_rotary_pos_embed(dim, at, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    return cos, sin


def next_view(past: Past, x: Tensor, grid: TokenGrid) -> View:
    """View of the next chunk ``x`` ``[B, C, c, H, W]`` on its past."""
    past.check(x)
    of_call = tuple(x.shape[2:]), x.device
    if of_call not in past.derived:
        past.derived[of_call] = _next_view(past, x.shape[2], grid, x.device)
    return past.derived[of_call]  # type: ignore[no-any-return]


@torch.inference_mode(False)
def _next_view(past: Past, frames: int, grid: TokenGrid, device: torch.device) -> View:
    part = Part(grid.span((0, frames)), (grid.span((0, past.frames + frames)),), None)
    return View((part,), grid.table(past.positions(frames), device), tuple(piece.layers for piece in past.pieces))


def view_of(runs: Sequence[Run], grid: Grid, device: torch.device) -> View:
    """View of one call over all chunks."""
    if whole := _one_position_each(runs):
        parts = tuple(Part(grid.span(run.queries), tuple(map(grid.span, run.keys)), None) for run in runs)
        return View(parts, grid.table(whole, device))
    parts = tuple(
        Part(grid.span(run.queries), tuple(map(grid.span, run.keys)), grid.table(run.positions, device)) for run in runs
    )
    return View(parts)


def _one_position_each(runs: Sequence[Run]) -> tuple[int, ...] | None:
    """Position of every frame, if all runs agree on it."""
    found: dict[int, int] = {}
    for run in runs:
        frames = [frame for span in run.keys for frame in range(*span)]
        for frame, position in zip(frames, run.positions, strict=True):
            if found.setdefault(frame, position) != position:
                return None
    return tuple(found[frame] for frame in sorted(found))


@contextmanager
def seeing(network: nn.Module, view: View | None) -> Iterator[None]:
    """Calls of the network inside read ``view`` instead of their table of positions; ``None`` changes nothing."""
    if view is None:
        yield
        return
    rope: nn.Module = network.get_submodule("rope")
    # In place of its own table, which has an end that a long video would run over. Hooks would take twice as long.
    rope.forward = lambda hidden_states: view
    try:
        yield
    finally:
        del rope.forward
