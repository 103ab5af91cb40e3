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

Table = Tensor
"""Cosine and sine ``[1, L, 1, D / 2, 2]`` for each pair of channels of ``L`` tokens."""
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
        table: of the call's own tokens, if each has one position; they are rotated once instead of once per part.
        past: remembered (keys, values) per layer of each piece, keys without rotation.
        past_table: of the tokens of the past.
        turned: keys of the past per layer, joined and rotated; empty: every call does that anew.
        taken: receives (keys, values) of every layer, in order, during a commit.
    """

    parts: tuple[Part, ...]
    table: Table | None = None
    past: tuple[tuple[tuple[Tensor, ...], ...], ...] = ()
    past_table: Table | None = None
    turned: tuple[Tensor, ...] = ()
    taken: list[tuple[Tensor, ...]] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """Attention of one layer; all tensors ``[B, L, heads, D]``, keys not yet rotated."""
        if self.taken is not None:
            self.taken.append((key, value))
        if self.table is not None:
            query, key = rotate(query, self.table), rotate(key, self.table)
        if self.past:
            self._check_dtype(key)
            key = torch.cat((self._past_keys(layer), key), dim=1)
            value = torch.cat((*(piece[layer][1] for piece in self.past), value), dim=1)
        if self._sees_all(key):
            return attention(query, key, value)
        queries = Cut.of(query, [part.queries for part in self.parts])
        keys, values = (Cut.of(x, [run for part in self.parts for run in part.keys]) for x in (key, value))
        cut = [(queries.joined([p.queries]), keys.joined(p.keys), values.joined(p.keys)) for p in self.parts]
        mixed = [self._attend(part, *tokens, attention) for part, tokens in zip(self.parts, cut, strict=True)]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def _check_dtype(self, key: Tensor) -> None:
        """Check that a network still computes as it did.

        Raises:
            UserError: if not.
        """
        if (made := self.past[-1][0][0].dtype) != key.dtype:
            raise UserError(f"a past of {made} keys cannot continue in a network that computes in {key.dtype}")

    def _past_keys(self, layer: int) -> Tensor:
        """Keys of the past, rotated. Those of a call are not kept, so that recomputation keeps one copy of a past."""
        assert self.past_table is not None
        return self.turned[layer] if self.turned else turned_keys(self.past, layer, self.past_table)

    def _sees_all(self, key: Tensor) -> bool:
        """True if every query sees every key, as in a call of the next chunk: there is nothing to cut."""
        return len(self.parts) == 1 and self.parts[0].table is None and self.parts[0].keys == ((0, key.shape[1]),)

    def _attend(self, part: Part, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        if part.table is not None:
            query, key = rotate(query, part.table[:, -query.shape[1] :]), rotate(key, part.table)
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
    """Rotary embedding of ``[B, L, heads, D]``, on a CPU to the bit as diffusers' Wan has it, in a fifth of its time.

    Compilers make no kernels of complex numbers: compiled blocks get the same products one by one.
    """
    pairs = x.to(torch.promote_types(x.dtype, table.dtype)).reshape(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        (first, second), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).type_as(x)


def paired(cos: Tensor, sin: Tensor) -> Tensor:
    """Table ``[..., D / 2, 2]`` of cosines and sines ``[..., D]`` that hold each value twice, once per channel."""
    return torch.stack([cos[..., ::2], sin[..., ::2]], dim=-1)


def turned_keys(past: Sequence[Sequence[Sequence[Tensor]]], layer: int, table: Table) -> Tensor:
    """Keys of a layer of all pieces, joined and rotated."""
    return rotate(torch.cat([piece[layer][0] for piece in past], dim=1), table)


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
        frames, rows, columns = (axis_table(dim, at).to(device) for dim, at in zip(self.axes, sizes, strict=True))
        shape = (len(frames), self.height, self.width, -1, 2)
        spread = [frames[:, None, None].expand(shape), rows[None, :, None].expand(shape)]
        spread.append(columns[None, None].expand(shape))
        return torch.cat(spread, dim=3).reshape(1, len(frames) * self.tokens, 1, -1, 2)


def axis_table(dim: int, positions: tuple[int, ...]) -> Tensor:
    """Cosines and sines ``[len(positions), dim / 2, 2]`` along one axis, in diffusers' own way."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    at = torch.tensor(positions)
    cos, sin = get_1d_rotary_pos_embed(dim, at, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    return paired(cos, sin)


def next_view(network: Any, past: Past, x: Tensor, grid: TokenGrid) -> View:
    """View of the next chunk ``x`` ``[B, C, c, H, W]`` on its past.

    Calls on one past share its rotated keys. Activation checkpointing would keep them until backward, for every chunk
    those of its whole past; its calls rotate them anew.
    """
    past.check(x)
    kept = not (torch.is_grad_enabled() and network.gradient_checkpointing)
    of_call = tuple(x.shape[2:]), x.device, kept
    if of_call not in past.derived:
        past.derived[of_call] = _next_view(past, x.shape[2], grid, x.device, kept)
    return past.derived[of_call]  # type: ignore[no-any-return]


@torch.inference_mode(False)
@torch.no_grad()
def _next_view(past: Past, frames: int, grid: TokenGrid, device: torch.device, kept: bool) -> View:
    part = Part(grid.span((0, frames)), (grid.span((0, past.frames + frames)),), None)
    table, start = grid.table(past.positions(frames), device), part.keys[0][1] - part.queries[1]
    layers, before, own = tuple(piece.layers for piece in past.pieces), table[:, :start], table[:, start:]
    turned = tuple(turned_keys(layers, i, before) for i in range(len(layers[0]))) if kept and layers else ()
    return View((part,), own, layers, before, turned)


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
