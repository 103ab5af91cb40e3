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
from fastvideo.distillation.rollout import Ladder, SamplerKind
from fastvideo.distillation.types import Batch, Need, RoleLoss

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class DistillMethod(ABC, Generic[ConfigT]):
    """Algorithm: which role trains when, on which loss.

    It sees roles, a ladder and random streams; never a model family, a device, a process group or a file.

    Raises:
        UserError: if a role is missing or unknown, or trainable where it must be frozen (or the reverse).
    """

    Config: ClassVar[type[MethodConfig]]
    trainable_roles: ClassVar[tuple[str, ...]]
    frozen_roles: ClassVar[tuple[str, ...]] = ()
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Frozen roles that a run may omit; the method documents the effect."""
    sampler: ClassVar[SamplerKind]
    """Sampler that the training matches; validation, generation and the result's recipe use it."""
    averaged_roles: ClassVar[tuple[str, ...]] = ()
    """Trained roles whose average is part of the algorithm, so that a run without it is another one."""
    needs_trajectories: ClassVar[bool] = False
    """True if it trains on a teacher's stored trajectories; its ``Config`` has ``TrajectoryOptions`` then."""
    bridges: ClassVar[bool] = False
    """True if teacher and critic may use another latent space than the student (``ModelBundle.bridge``)."""
    one_expert_rollouts: ClassVar[tuple[str, ...]] = ()
    """Values of its option ``rollout`` (without one ``simulate``) with which all ranks call one expert at a time."""
    makes_teachers: ClassVar[bool] = False
    """True if its result is sampled with guidance in any number of steps instead of on the ladder."""
    summary: ClassVar[str]
    """One line: the algorithm and its paper."""
    notes: tuple[str, ...] = ()
    """Notes logged once at start."""

    def __init__(self, config: ConfigT, bundle: ModelBundle, ladder: Ladder, rng: RandomStreams) -> None:
        roles = (*self.trainable_roles, *self.frozen_roles)
        bundle.require_roles(roles, trainable=self.trainable_roles, optional=self.optional_roles)
        self.config, self.bundle, self.ladder, self.rng = config, bundle, ladder, rng

    @classmethod
    @abstractmethod
    def optimizers(cls, config: ConfigT) -> Mapping[str, OptimizerConfig]:
        """Optimizer of every trainable role."""

    @classmethod
    def uses_latents(cls, config: ConfigT) -> bool:
        """True if this config trains on clean latents; override it if prompts can suffice."""
        return True

    @classmethod
    def needs_of(cls, config: ConfigT) -> frozenset[Need]:
        """Abilities that this config needs of the families; a family without them is refused before loading."""
        return config.needs | ({"flow_map"} if config.flow_maps else set())

    @classmethod
    def flow_maps_of(cls, config: ConfigT) -> tuple[str, ...]:
        """Roles whose networks read a second time ``r``."""
        return config.flow_maps or (("student",) if "flow_map" in cls.needs_of(config) else ())

    @classmethod
    def heads(cls, config: ConfigT, families: Mapping[str, Family]) -> Mapping[str, nn.Module]:
        """Networks of the method's own, such as a loss weight, by role; ``families`` are those of the other roles."""
        return {}

    def active_roles(self, step: int) -> tuple[str, ...]:
        """Roles that are updated at ``step``."""
        return self.trainable_roles

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        """Yield one loss at a time; the trainer runs its backward before it asks for the next.

        Never yield inside a ``with``: the context would leak into the trainer.
        """

    def state_dict(self) -> dict[str, Any]:
        """State of the algorithm that a checkpoint must hold; most have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
