"""A stream that goes on from step to step, and its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.distillation.chunks import Past, Piece, Reach
from fastvideo.distillation.types import Batch, Condition, Given


@dataclass(frozen=True)
class RunningStream:
    """A batch of videos that are continued. Immutable, without gradient.

    Attributes:
        past: of the student.
        latents: last clean latents ``[B, C, n, H, W]``: those that are scored, and some before them.
        condition: prompts in force.
        switch: prompts that follow at frame ``switch_at``; ``None`` if none do.
        length: latent frames so far.
        most: latent frames at the end.
    """

    past: Past
    latents: Tensor
    condition: Condition
    switch: Condition | None
    switch_at: int
    length: int
    most: int

    @property
    def switches_now(self) -> bool:
        """True if the next frame is the first one under the second prompt."""
        return self.switch is not None and self.length == self.switch_at

    def fits(self, batch: Batch) -> bool:
        """True if a batch has as many videos, of the same size."""
        mine, theirs = self.latents.shape, batch.shape
        return (*mine[:2], *mine[3:]) == (*theirs[:2], *theirs[3:])


class StreamKeeper:
    """The running stream of this process, in every checkpoint: a resumed run continues it to the bit."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: RunningStream | None = None

    def state_dict(self) -> dict[str, Any]:
        """Nested tensors and numbers; empty without a stream."""
        stream = self.stream
        if stream is None:
            return {}
        given = stream.condition.given
        state: dict[str, Any] = {
            "past": _past_state(stream.past),
            "latents": stream.latents,
            "condition": stream.condition.tensors,
            "given": {} if given is None else {"mask": given.mask, "clean": given.clean},
            "numbers": {"switch_at": stream.switch_at, "length": stream.length, "most": stream.most},
        }
        return state if stream.switch is None else state | {"switch": stream.switch.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the stream of :meth:`state_dict`."""
        self.stream = None
        if not state:
            return
        given = {name: value.to(self.device) for name, value in state.get("given", {}).items()}
        condition = Condition(self._moved(state["condition"]), Given(**given) if given else None)
        switch = Condition(self._moved(state["switch"])) if "switch" in state else None
        past = self._past(state["past"])
        latents = state["latents"].to(self.device)
        self.stream = RunningStream(past, latents, condition, switch, **state["numbers"])

    def load_foreign_state(self, state: Mapping[str, Any], step: int) -> str:
        """Begin anew in a run of other processes, whose batches differ; returns the inexact part."""
        self.stream = None
        return "running streams begin anew"

    def _past(self, state: Mapping[str, Any]) -> Past:
        pieces = [state["pieces"][str(i)] for i in range(len(state.get("pieces", {})))]
        return Past(Reach(**state["reach"]), tuple(map(self._piece, pieces)), state["length"])

    def _piece(self, state: Mapping[str, Any]) -> Piece:
        layers = [state["layers"][str(i)] for i in range(len(state["layers"]))]
        kept = tuple(tuple(layer[str(i)].to(self.device) for i in range(len(layer))) for layer in layers)
        return Piece(state["start"], state["latents"].to(self.device), kept)

    def _moved(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {key: {name: value.to(self.device) for name, value in own.items()} for key, own in tensors.items()}


def _past_state(past: Past) -> dict[str, Any]:
    pieces = {str(i): _piece_state(piece) for i, piece in enumerate(past.pieces)}
    return {"reach": asdict(past.reach), "pieces": pieces, "length": past.length}


def _piece_state(piece: Piece) -> dict[str, Any]:
    layers = {str(i): {str(j): tensor for j, tensor in enumerate(layer)} for i, layer in enumerate(piece.layers)}
    return {"start": piece.start, "latents": piece.latents, "layers": layers}
