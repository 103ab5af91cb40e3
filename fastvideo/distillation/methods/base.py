"""``DistillMethod``: an algorithm as a generator of losses, and its config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from fastvideo.distillation.bundle import ModelBundle
from fastvideo.distillation.config.base import MethodConfig, OptimizerConfig
from fastvideo.distillation.denoiser import Family
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import SamplerKind
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Batch, Need, RoleLoss

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class DistillMethod(ABC, Generic[ConfigT]):
    """An algorithm: which role is trained when, on which loss.

    It sees roles, a ladder and random streams; never a model family, a device, a process group or a file.

    Args:
        config: the method's options.
        bundle: the roles; checked against ``trainable_roles``, ``frozen_roles`` and ``optional_roles``.
        ladder: the student's noise levels.
        rng: where every random draw comes from.

    Raises:
        UserError: if a role is missing, unknown, or trainable where it must be frozen (or the reverse).
    """

    Config: ClassVar[type[MethodConfig]]
    trainable_roles: ClassVar[tuple[str, ...]]
    frozen_roles: ClassVar[tuple[str, ...]] = ()
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Frozen roles that a run may leave out: what the method then does without them is its own to say."""
    sampler: ClassVar[SamplerKind]
    """The sampler that the training matches: validation, generation and the recipe of the result use it."""
    needs_latents: ClassVar[bool] = False
    """Whether every config of this method trains on clean latents; see :meth:`uses_latents`."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it needs of the model family, at most; see :meth:`needs_of`. ``flow_map`` is about the student's network."""
    needs_trajectories: ClassVar[bool] = False
    """Whether its data are a teacher's stored walks, with the latents that they end in."""
    bridges: ClassVar[bool] = False
    """Whether teacher and critic may live in another latent space than the student (``ModelBundle.bridge``)."""
    makes_teachers: ClassVar[bool] = False
    """Whether its result is sampled in any number of guided steps, and not as the run's ladder says."""
    summary: ClassVar[str]
    """One line: what it is and its paper."""
    notes: tuple[str, ...] = ()
    """What a run says once in its log about choices that do not show in the metrics."""

    def __init__(self, config: ConfigT, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        roles = (*self.trainable_roles, *self.frozen_roles)
        bundle.require_roles(roles, trainable=self.trainable_roles, optional=self.optional_roles)
        self.config = config
        self.bundle = bundle
        self.ladder = ladder
        self.rng = rng

    @classmethod
    @abstractmethod
    def optimizers(cls, config: ConfigT) -> Mapping[str, OptimizerConfig]:
        """The optimizer of every trainable role."""

    @classmethod
    def uses_latents(cls, config: ConfigT) -> bool:
        """Whether this configuration needs clean latents, or prompts alone."""
        return cls.needs_latents

    @classmethod
    def needs_of(cls, config: ConfigT) -> frozenset[Need]:
        """What this configuration needs of the model family; a family that lacks it is refused before loading."""
        return cls.needs

    @classmethod
    def heads(cls, config: ConfigT, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        """Networks of the roles that are the method's own, such as a loss weight, by role.

        ``families`` are those of the roles.
        """
        return {}

    def active_roles(self, step: int) -> tuple[str, ...]:
        """The roles that are stepped at ``step``: the only truth about who trains."""
        return self.trainable_roles

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """Yield one loss at a time; the trainer runs backward before it asks for the next, so one graph is alive.

        Never yield inside a ``with``: the context would leak into the trainer.
        """

    def state_dict(self) -> dict[str, Any]:
        """State of the algorithm itself that must survive a restart; most have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
