"""Non-finite losses and gradients: found and skipped on the device, read by the host one step later.

Nothing waits for the device. Optimizer kernels read the check as a tensor and do nothing where it fails. The host reads
a copy when the next step's losses are under way, or earlier if a hook needs the outcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.parallel.distributed import any_rank
from fastvideo.distillation.engine.parallel.sharding import local, norms_of
from fastvideo.distillation.types import RawBatch, RoleLoss
from fastvideo.errors import RunError, UserError
from fastvideo.stopping import received
from fastvideo.wording import see


class NonFiniteError(RunError):
    """A loss or gradient that is not finite: names role, step and tensor. No state was changed by that step."""


@dataclass(frozen=True)
class Gradient:
    """One role's gradient: ``norms`` ``[P]`` of the parameters ``names``, and their ``total`` before clipping."""

    names: Sequence[str]
    norms: Tensor
    total: Tensor


def clip_gradient(handle: RoleHandle, max_norm: float) -> Gradient:
    """Scale a role's gradient down to ``max_norm``, without reading it."""
    named = {name: p.grad for name, p in handle.named_parameters().items() if p.grad is not None}
    gradients = list(named.values())
    norms = norms_of(gradients)
    total = torch.linalg.vector_norm(norms)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return Gradient(list(named), norms, total)


class FiniteCheck:
    """Checks on the device that a step is finite on all processes; carries a stop signal on the same collective.

    Args:
        named: scalars and vectors that must be finite, with a name for each element.

    Attributes:
        skip: float32 scalar on the device: 1 where the step must change nothing, else 0.
    """

    def __init__(self, named: Sequence[tuple[Sequence[str], Tensor]]) -> None:
        self.names = [name for names, _ in named for name in names]
        device = named[0][1].device
        bad = ~torch.cat([values.detach().to(device).float().view(-1) for _, values in named]).isfinite()
        flag = bad.any().float()
        flags = any_rank(torch.stack([flag, torch.full_like(flag, received())]))
        self.skip = flags[0]
        # Into pinned memory where there is a device, so the copy waits for nothing either.
        self._host = torch.cat([flags, bad.float()]).to("cpu", non_blocking=True)
        self._copied = torch.Event(device.type) if device.type != "cpu" else None
        if self._copied is not None:
            self._copied.record()

    def _read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy().tolist()  # type: ignore[no-any-return]

    def stop_signal(self) -> int:
        """Number of the signal that asked any process to stop; 0 if none was asked."""
        return int(self._read()[1])

    def outcome(self) -> tuple[bool, list[str]]:
        """True if the step was skipped, and the names of what is not finite on this process."""
        skip, _, *bad = self._read()
        return bool(skip), [name for name, flag in zip(self.names, bad, strict=True) if flag]


@dataclass
class StepRecord:
    """One step: its input, losses, gradients and metrics, all still on the device.

    Attributes:
        rng: random streams before the step.
        losses: role and scalar of each loss.
        metrics: observations that count only if the step was taken.
        trained: roles of the losses of the present micro-batch.
    """

    step: int
    active: tuple[str, ...]
    rng: Mapping[str, Tensor]
    batches: list[RawBatch] = field(default_factory=list)
    losses: list[tuple[str, Tensor]] = field(default_factory=list)
    metrics: list[Mapping[str, Tensor]] = field(default_factory=list)
    gradients: dict[str, Gradient] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    finite: FiniteCheck = field(init=False)

    def add(self, loss: RoleLoss) -> None:
        """Keep a loss and its metrics.

        Raises:
            UserError: with step, role and name, if the role is not active, a value is no scalar tensor, or the loss
                has no gradient.
        """
        if not isinstance(loss, RoleLoss):
            raise UserError(f"step {self.step} of the method: it yielded a {type(loss).__name__}, expected a RoleLoss")
        at = f"step {self.step} of the method: its loss for role {loss.role!r}"
        if loss.role not in self.active:
            raise UserError(f"{at} is of no active role; active_roles({self.step}) are {_listed(self.active)}")
        values = {"loss": loss.value, **loss.metrics}
        for name, value in values.items():
            what = "value" if name == "loss" else f"metric {name!r}"
            if not isinstance(value, Tensor):
                raise UserError(f"{at} has a {type(value).__name__} as {what}; give a scalar tensor")
            if value.shape != ():
                raise UserError(f"{at} has a tensor {list(value.shape)} as {what}; give a scalar, such as its .mean()")
        if not loss.value.requires_grad:
            raise UserError(f"{at} has no gradient: nothing in it is trained, or it was made under no_grad")
        self.losses.append((loss.role, loss.value.detach()))
        self.metrics.append({f"{loss.role}/{name}": value.detach() for name, value in values.items()})
        self.trained.append(loss.role)

    def untrained(self) -> str:
        """The sentence about a micro-batch whose losses were not those of the active roles."""
        return (
            f"step {self.step} of the method: active_roles({self.step}) are {_listed(self.active)}, and its losses "
            f"were for {_listed(self.trained)}; every active role gets a loss, and no other"
        )

    def check(self) -> FiniteCheck:
        """Check all losses and gradients; all roles of the step are skipped, or none."""
        named: list[tuple[Sequence[str], Tensor]] = [([f"the loss of role {r!r}"], value) for r, value in self.losses]
        for role, gradient in self.gradients.items():
            of = f"the gradient of role {role!r}"
            named.append(([f"{of} at {name}" for name in gradient.names], gradient.norms))
            named.append(([of], gradient.total))
        self.finite = FiniteCheck(named)
        return self.finite

    def tensors(self) -> dict[str, Tensor]:
        """Random streams and batches by name, on the host."""
        found = {f"rng/{name}": state for name, state in self.rng.items()}
        for i, batch in enumerate(self.batches):
            own = dict(batch.extras) if batch.latents is None else {**batch.extras, "latents": batch.latents}
            found |= {f"batch-{i}/{name}": value for name, value in own.items()}
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}


def _listed(roles: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(roles)) or "none"


class NonFiniteGuard:
    """Stops the run at a non-finite step, or lets a bounded number of them pass in a row.

    Args:
        policy: ``raise`` stops at the first, ``skip`` after more than ``max_skips`` in a row.
        folder: one snapshot per run and process goes there; ``None`` writes none.
        rank: of this process.
    """

    def __init__(self, policy: Literal["raise", "skip"], max_skips: int, folder: Path | None, rank: int = 0) -> None:
        self.bound = max_skips if policy == "skip" else 0
        self.folder, self.rank = folder, rank
        self.total = self.in_a_row = 0

    def message(self, record: StepRecord) -> str | None:
        """Reason of a skipped step; ``None`` if it was taken.

        Raises:
            NonFiniteError: if it was skipped, and no more may be.
        """
        skipped, bad = record.finite.outcome()
        if not skipped:
            self.in_a_row = 0
            return None
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        kept = self._snapshot(record, bad)
        first = bad[0] if bad else "a loss or gradient of another process"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        message = f"step {record.step}: {first}{more} is not finite"
        where = f" The first such batch of the run is in {kept}." if kept else ""
        if self.in_a_row > self.bound:
            row = f", nor were the {self.bound} before it (trainer.max_skips: {self.bound})" if self.bound else ""
            advice = "Lower its learning rate or the guidance, or look at the batch"
            raise NonFiniteError(f"{message}{row}. {advice}.{where}{see('a-loss-is-not-finite')}")
        return f"{message}: skipped, {self.in_a_row} in a row of at most {self.bound}.{where}"

    def _snapshot(self, record: StepRecord, bad: Sequence[str]) -> Path | None:
        """Write batch, losses and random streams of the run's first such step, as safetensors and JSON."""
        if self.folder is None:
            return None
        before = sorted(self.folder.glob(f"step-*-rank-{self.rank}.json"))
        if before:
            return before[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{record.step}-rank-{self.rank}.json"
        save_file(record.tensors(), path.with_suffix(".safetensors"))
        shown = [(name, float(value)) for name, value in record.losses]
        content = {
            "step": record.step,
            "not_finite": list(bad),
            "losses": [[name, value if math.isfinite(value) else str(value)] for name, value in shown],
            "captions": [list(batch.captions) for batch in record.batches],
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    def state_dict(self) -> dict[str, int]:
        """Number of skipped steps, in all and in a row."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting."""
        self.total, self.in_a_row = int(state["total"]), int(state["in_a_row"])
