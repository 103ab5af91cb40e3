"""``BatchPreparer``: data to the batches that methods train on, for the families of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import Codec, Conditioner
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, Condition, RawBatch, UserError


@dataclass(frozen=True)
class BatchPreparer:
    """Captions and first frames to conditions, latents to the device in float32.

    Attributes:
        codec: of the latents in the data.
        conditioners: of every family that reads the batch, the codec's own first; one per key is enough.
        any_size: take latents of every number of frames, height and width, as a dataset with buckets has them.
    """

    codec: Codec
    conditioners: Sequence[Conditioner]
    any_size: bool = False

    def __call__(self, raw: RawBatch) -> Batch:
        """One micro-batch.

        Raises:
            UserError: if the latents do not have the codec's shape, or the data lacks what conditions are made of.
            RuntimeError: before ``ensure_negative_conditioning``.
        """
        x0, count = self._latents(raw), len(raw.captions)
        texts = [
            each.text_of(raw if number == 0 else _text_for(each, raw)) for number, each in enumerate(self.conditioners)
        ]
        shape = self.codec.latent_shape if x0 is None else x0.shape[1:]
        given = [of_frames(each) for each in self.conditioners]
        first = _joined([each.first_frames_of(raw) for each in given if each.needs_frames])
        return Batch(
            shape=(count, *shape),
            condition=_joined(texts) | first,
            negative=_joined([each.negative(count) for each in self.conditioners]) | first,
            x0=x0,
            trajectory=Trajectory.of(raw.extras, self.codec.device),
            parts=self.codec.parts,
            switch=_joined([each.encode_prompts(raw.switches) for each in self.conditioners]) if raw.switches else None,
        )

    def _latents(self, raw: RawBatch) -> Tensor | None:
        if raw.latents is None:
            return None
        shape, found = self.codec.latent_shape, tuple(raw.latents.shape[1:])
        alike = self.codec.parts is None and found[0] == shape[0] and len(found) == len(shape)
        if found != shape and not (self.any_size and alike):
            raise UserError(f"data: latents have shape {found} (C, F, H, W), the model expects {shape}")
        return raw.latents.to(self.codec.device, torch.float32, non_blocking=True)


def text_name(conditioner: Conditioner) -> str:
    """Name in a raw batch of the stored text of a family that is not the student's."""
    return f"text_embedding/{conditioner.key}"


def _text_for(conditioner: Conditioner, raw: RawBatch) -> RawBatch:
    """The stored text of a family that is not the student's, or else the captions.

    Raises:
        UserError: for a caption that is missing, where an embedding stands for it.
    """
    if (name := text_name(conditioner)) in raw.extras:
        return RawBatch(raw.captions, extras={"text_embedding": raw.extras[name]})
    if "text_embedding" in raw.extras and not all(raw.captions):
        raise UserError(
            "data: a second model family must encode the captions, and a sample has none: its text embedding is the "
            "student's; preprocess again with captions"
        )
    return RawBatch(raw.captions)


def _joined(conditions: Sequence[Condition]) -> Condition:
    return reduce(or_, conditions, Condition({}))
