"""``Experts``: two networks of one kind as one, each for its own range of times (Wan 2.2 A14B, arXiv 2503.20314)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fastvideo.distillation.config.sections import Level
from fastvideo.distillation.types import Need
from fastvideo.errors import UserError

T = TypeVar("T")
SUPPORTS: frozenset[Need] = frozenset({"frames"})
"""Abilities of a model of two experts: a sample at several times would need both, and the tokens of either differ."""
LEVEL: Level = "tiny equality"
"""Proof that such a model has passed."""


class Experts(nn.Module):
    """Calls ``transformer`` for samples at times from ``boundary`` up, and ``transformer_2`` for those below.

    The children have diffusers' names, and so have all parameters. A call runs each expert at most once, on its
    samples, and answers in the order of the batch. The expert that is not called gets no gradient: its ``grad`` stays
    ``None``, and an optimizer leaves it alone, weight decay and moments too.

    Args:
        transformer: expert of high noise.
        transformer_2: expert of low noise.
        boundary: rectified-flow time between them; a sample exactly there is the high-noise expert's.
        time_units: number that the networks' own time is at ``t = 1``.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float, time_units: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.boundary, self.time_units = boundary, time_units
        self.assumed_side: bool | None = None
        """Side of every sample, True for high noise, where times have no values (a plan); ``None``: by their times."""

    def forward(self, x: Tensor, timestep: Tensor, *inputs: Tensor | None, **options: Any) -> tuple[Tensor]:
        """The network call of either expert, for ``timestep`` ``[B]`` in the networks' units."""
        sides = self._sides(timestep)
        if all(sides) or not any(sides):
            return self._expert(sides[0])(x, timestep, *inputs, **options)  # type: ignore[no-any-return]
        rows = {side: [row for row, own in enumerate(sides) if own is side] for side in (True, False)}
        found = []
        for side, own in rows.items():
            index = torch.tensor(own, device=x.device)
            given = [None if value is None else value[index] for value in (x, timestep, *inputs)]
            found.append(self._expert(side)(*given, **options)[0])
        order = torch.tensor([*rows[True], *rows[False]], device=x.device).argsort()
        return (torch.cat(found)[order],)

    @property
    def _no_split_modules(self) -> list[str] | None:
        """Classes of the repeated blocks, as diffusers' networks name them."""
        return self.transformer._no_split_modules  # type: ignore[return-value]

    def enable_gradient_checkpointing(self, checkpoint: Callable[..., Any]) -> None:
        """As diffusers' networks have it, for both."""
        for expert in networks_of(self):
            expert.enable_gradient_checkpointing(checkpoint)

    def enable_parallelism(self, **options: Any) -> None:
        """As diffusers' networks have it, for both."""
        for expert in networks_of(self):
            expert.enable_parallelism(**options)

    def _expert(self, high: bool) -> nn.Module:
        return self.transformer if high else self.transformer_2

    def _sides(self, timestep: Tensor) -> list[bool]:
        if self.assumed_side is not None:
            return [self.assumed_side] * len(timestep)
        # diffusers compares in the network's units and float32 too, so both agree on the last bit.
        return (timestep >= self.boundary * self.time_units).tolist()


SIDES = {"transformer": "high_noise", "transformer_2": "low_noise"}
"""Names of the experts in files, by their place in the module."""


def by_expert(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Values by the names of an expert's own parameters, under its name in :data:`SIDES`; ``""`` for one network."""
    if not any(name.startswith("transformer_2.") for name in named):
        return {"": dict(named)}
    found: dict[str, dict[str, T]] = {side: {} for side in SIDES.values()}
    for name, value in named.items():
        part, _, own = name.partition(".")
        found[SIDES[part]][own] = value
    return found


def side_file(side: str, name: str) -> str:
    """Name of the file of one expert; that of a network which is one is ``name`` itself."""
    return f"{side}_{name}" if side else name


@runtime_checkable
class TrainsOneExpert(Protocol):
    """Method whose losses may leave one of two experts as it is."""

    @classmethod
    def idle_expert_of(cls, config: Any) -> str | None:
        """Name in the network of the expert that no loss of this config reaches; ``None`` if both are trained."""
        ...


def idle_expert_of(method: type, config: object) -> str | None:
    """Name in the network of the expert that no loss reaches; ``None`` if all there are learn."""
    return method.idle_expert_of(config) if issubclass(method, TrainsOneExpert) else None


def boundary_of(network: nn.Module) -> float | None:
    """Time at which a network changes experts; ``None`` for a network that is one at all times."""
    return network.boundary if isinstance(network, Experts) else None


def networks_of(network: nn.Module) -> list[Any]:
    """The experts of a network, or the network itself."""
    return [network.transformer, network.transformer_2] if isinstance(network, Experts) else [network]


def check_boundary(times: tuple[float, ...], boundary: float, where: str) -> None:
    """Check that no step of a ladder is exactly on the boundary, where rounding would choose the expert.

    Raises:
        UserError: with a time to take instead.
    """
    for time in times:
        if abs(time - boundary) < ON_BOUNDARY:
            raise UserError(
                f"{where}: the step {time:g} is exactly the boundary between the two experts of the model, and "
                f"rounding would choose between them; move it, for example to {time + 0.01:g} or {time - 0.01:g}"
            )


ON_BOUNDARY = 1e-5
"""Difference below which a time counts as the boundary."""


def boundary_between(times: tuple[float, ...], boundary: float) -> float:
    """Boundary with the same steps of a ladder on either side, half-way between the two steps next to it.

    So a program that compares with ``>`` instead of ``>=``, or in lower precision, calls the same expert. A ladder on
    one side alone keeps the boundary.
    """
    above, below = [t for t in times if t >= boundary], [t for t in times if t < boundary]
    return (above[-1] + below[0]) / 2 if above and below else boundary


def same_steps(times: tuple[float, ...], one: float, other: float) -> bool:
    """True if no step of a ladder lies between two boundaries, so that its calls are those of the same experts."""
    return all((time >= one) == (time >= other) for time in times)
