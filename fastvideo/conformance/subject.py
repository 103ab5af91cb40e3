"""The adapter under examination with toy inputs, and the failures of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.abilities import of_frames
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import Condition

COUNT = 3


class Violation(Exception):
    """A failed check; the message names found and expected values."""


class NotApplicable(Exception):
    """A check that does not apply to this family; the message gives the reason."""


def require(holds: bool | Tensor, message: str) -> None:
    """Raise :class:`Violation` with ``message`` unless ``holds``."""
    if not bool(holds):
        raise Violation(message)


def require_close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise :class:`Violation` with the largest difference unless it is within ``tolerance`` of the largest value."""
    require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    found, wanted = 1.0 * found, 1.0 * wanted  # masks too
    worst = float((found - wanted).detach().abs().max())
    allowed = tolerance * max(1.0, float(wanted.detach().abs().max()))
    require(worst <= allowed, f"{what}: differs by up to {worst:.1e}, {allowed:.1e} is allowed")


@dataclass
class Subject:
    """One adapter under examination, with toy inputs of its own shape.

    Attributes:
        adapter: over a folder of real weights, or random ones of a toy size.
        prompts: two prompts with different encodings.
        folder: an empty folder that checks may write into.
    """

    adapter: DistillAdapter[Any]
    prompts: tuple[str, str]
    folder: Path

    @property
    def examined(self) -> type:
        """The adapter's class."""
        return type(self.adapter)

    @cached_property
    def network(self) -> nn.Module:
        """One network; checks do not change it."""
        return self.adapter.folder.load_network()

    @cached_property
    def stock(self) -> Any:
        """The stock pipeline over a folder that the adapter has written, in float32."""
        from diffusers import DiffusionPipeline

        folder = self.folder / "stock"
        self.adapter.folder.save(folder, self.network, {})
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(self.adapter.device)

    @cached_property
    def condition(self) -> Condition:
        """The condition of first prompt, empty prompt, second prompt, each with its own first frames."""
        prompts = [self.prompts[0], "", self.prompts[1]]
        return self.adapter.conditioner.encode_prompts(prompts) | self.first_frames(COUNT)

    @cached_property
    def frames(self) -> Tensor | None:
        """First frames ``[3, 3, T, H, W]`` in steps of 8 bits, for a model that takes some."""
        if not of_frames(self.adapter.conditioner).needs_frames:
            return None
        videos = self.adapter.codec.decode(self.noise(COUNT, seed=3)).clamp(-1, 1)
        return ((videos[:, :, : max(of_frames(self.adapter.conditioner).first_frames)] + 1) * 127.5).round() / 127.5 - 1

    def first_frames(self, count: int) -> Condition:
        """Condition on the first ``count`` of :attr:`frames`."""
        return of_frames(self.adapter.conditioner).condition_on(None if self.frames is None else self.frames[:count])

    @cached_property
    def x_t(self) -> Tensor:
        """Noisy latents ``[3, C, F, H, W]``."""
        return self.noise(COUNT)

    @cached_property
    def times(self) -> Tensor:
        return torch.tensor([0.9, 0.3, 0.6], device=self.adapter.device)

    def noise(self, count: int, seed: int = 2) -> Tensor:
        """Standard normal latents."""
        return normal((count, *self.adapter.codec.latent_shape), seeded(seed)).to(self.adapter.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The adapter's velocity."""
        return self.adapter.velocity(self.network, x_t, t, condition or self.condition)


@dataclass(frozen=True)
class Check:
    """One rule of a contract: its name, its function, and the members to look at when it fails."""

    name: str
    run: Callable[[Any], None]
    where: str


CHECKS: list[Check] = []
"""Every rule of a family, in the order of the report."""
Rule = TypeVar("Rule", bound=Callable[[Any], None])


def check(where: str, into: list[Check] = CHECKS) -> Callable[[Rule], Rule]:
    """Register a function as a rule, named after it, with spaces."""

    def register(run: Rule) -> Rule:
        into.append(Check(run.__name__.replace("_", " "), run, where))
        return run

    return register
