"""The rules of causal calls catch families that break them; those that keep them are in ``test_adapter_contract``."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastvideo.conformance.run import CHECKS, examine
from fastvideo.conformance.subject import Subject
from fastvideo.distillation.abilities import FrameDecoder
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.diffusers.teacher_forced import teacher_forced
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.frames import WanFrameCodec
from fastvideo.distillation.chunks import Masked, Past
from fastvideo.tests.distillation.tiny import FAMILIES, wan_config, wan_folder

RULES = [rule for rule in CHECKS if rule.run.__module__.endswith("chunk_checks")]


class Forgetful(WanFamily):
    """Sees no past."""

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Any, **options: Any) -> Tensor:
        context = options.pop("context", None)
        if isinstance(context, Masked):
            return teacher_forced(self, network, x_t, t, condition, context)
        return super().velocity(network, x_t, t, condition, **options)


class Bidirectional(WanFamily):
    """Answers one call over all chunks as if it were none."""

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Any, **options: Any) -> Tensor:
        context = options.pop("context", None)
        context = None if isinstance(context, Masked) else context
        return super().velocity(network, x_t, t, condition, context=context, **options)


class Late(WanFamily):
    """Commits chunks at another time than it was told."""

    def commit(self, network: Any, past: Past, x0: Tensor, condition: Any, t: float = 0.0) -> Past:
        return super().commit(network, past, x0, condition, 0.5)


class InPlace(WanFamily):
    """Writes into the pieces of the past."""

    def commit(self, network: Any, past: Past, x0: Tensor, condition: Any, t: float = 0.0) -> Past:
        for piece in past.pieces:
            for layer in piece.layers:
                layer[0].mul_(2.0)
        return super().commit(network, past, x0, condition, t)


class Seams(WanFamily):
    """Decodes every chunk as a video of its own."""

    @cached_property
    def codec(self) -> WanFrameCodec:
        codec = super().codec
        codec.__class__ = type("SeamCodec", (WanFrameCodec,), {"frame_decoder": lambda self: _Fresh(self)})
        return codec


class _Fresh:
    bytes = 0

    def __init__(self, codec: WanFrameCodec) -> None:
        self.codec = codec

    def __call__(self, latents: Tensor) -> Tensor:
        decoder: FrameDecoder = WanFrameCodec.frame_decoder(self.codec)
        return decoder(latents)

    def fork(self) -> _Fresh:
        return self


BROKEN: dict[str, tuple[type[WanFamily], str]] = {
    "forgetful": (Forgetful, "a chunk reads the clean chunks before it and not its own"),
    "bidirectional": (Bidirectional, "a later chunk changes nothing before it"),
    "late": (Late, "chunks on their past equal one call of teacher forcing"),
    "in place": (InPlace, "a past is a value"),
    "seams": (Seams, "a decoded stream has no seams"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_family_is_caught_by_name(mistake: str, tiny_wan: Path, tmp_path: Path) -> None:
    cls, rule = BROKEN[mistake]
    family = cls(wan_config(wan_folder(tiny_wan.parent), num_frames=9))
    outcomes = list(examine(Subject(family, FAMILIES["wan"].prompts, tmp_path), RULES))
    (caught,) = (outcome for outcome in outcomes if outcome.name == rule)
    assert caught.result == "FAILED"
    assert "raised at" not in caught.where, caught


class Whole(AnalyticAdapter):
    """Generates whole videos."""

    supports = AnalyticAdapter.supports - {"chunks"}


@pytest.mark.parametrize(("cls", "kept"), [(Whole, set()), (AnalyticAdapter, {"a past is a value"})])
def test_rules_that_do_not_apply(cls: type[AnalyticAdapter], kept: set[str], tmp_path: Path) -> None:
    """Independent frames have a past that nothing can be seen of, and their videos are not decoded as a stream."""
    config = AnalyticConfig(means=(0.0,), stds=(1.0,), weights=(1,), shape=(1, 3, 1, 1))
    outcomes = {o.name: o.result for o in examine(Subject(cls(config), FAMILIES["analytic"].prompts, tmp_path), RULES)}
    assert "FAILED" not in outcomes.values()
    assert kept <= {name for name, result in outcomes.items() if result == "passed"}
    for rule in ("a chunk reads the clean chunks before it and not its own", "a decoded stream has no seams"):
        assert outcomes[rule] == "not applicable"
