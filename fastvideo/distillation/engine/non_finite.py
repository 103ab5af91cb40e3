"""Losses and gradients that are not finite: found and left out on the device, read by the host one step later.

Nothing waits for the device. The optimizer kernels are given the verdict as a tensor and do nothing where it says so;
the host reads a copy of it when the next step's losses are already under way, or earlier if somebody needs the outcome.
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
from fastvideo.errors import RunError

Policy = Literal["raise", "skip"]
ADVICE = "Lower its learning rate or the guidance, or look at the batch"


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
    named = [(name, p) for name, p in handle.named_parameters().items() if p.grad is not None]
    gradients = [p.grad for _, p in named if p.grad is not None]
    norms = norms_of(gradients)
    total = torch.linalg.vector_norm(norms)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return Gradient([name for name, _ in named], norms, total)


class Verdict:
    """Whether a step was finite on all processes.

    Args:
        named: the scalars and vectors that must be finite, by what they are.
        asked: number of the signal that asked this process to stop, or 0: it rides on the same collective.

    Attributes:
        skip: float32 scalar on the device: 1 where the step must leave everything as it is, else 0.
    """

    def __init__(self, named: Sequence[tuple[Sequence[str], Tensor]], asked: int) -> None:
        self.names = [name for names, _ in named for name in names]
        device = named[0][1].device
        bad = ~torch.cat([values.detach().to(device).float().view(-1) for _, values in named]).isfinite()
        flag = bad.any().float()
        flags = any_rank(torch.stack([flag, torch.full_like(flag, asked)]))
        self.skip = flags[0]
        # To pinned memory where there is a device, so the copy waits for nothing either.
        self._host = torch.cat([flags, bad.float()]).to("cpu", non_blocking=True)
        self._copied = torch.Event(device.type) if device.type != "cpu" else None
        if self._copied is not None:
            self._copied.record()

    def asked(self) -> int:
        """The number of the signal that asked any process to stop; 0 if none was asked."""
        return int(self._read()[1])

    def _read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy().tolist()  # type: ignore[no-any-return]

    def read(self) -> tuple[bool, list[str]]:
        """Whether the step is left out, and what was not finite on this process."""
        skip, _, *bad = self._read()
        return bool(skip), [name for name, flag in zip(self.names, bad, strict=True) if flag]


@dataclass
class Attempt:
    """A step that the device has taken or left out; the host does not know yet which.

    Attributes:
        rng: the random streams before the step.
        batches: what it was given.
        losses: scalars by what they are.
        metrics: observations that count only if the step does.
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

    def record(self, loss: RoleLoss) -> None:
        """Keep a loss and its metrics on the device."""
        values = {"loss": loss.value, **loss.metrics}
        self.losses.append((loss.role, loss.value.detach()))
        self.metrics.append({f"{loss.role}/{name}": value.detach() for name, value in values.items()})
        self.trained.append(loss.role)

    def judge(self, asked: int) -> Verdict:
        """Put the losses and gradients to the test; all roles of the step stand or fall together.

        Args:
            asked: see :class:`Verdict`.
        """
        named: list[tuple[Sequence[str], Tensor]] = [([f"the loss of role {r!r}"], value) for r, value in self.losses]
        for role, gradient in self.gradients.items():
            of = f"the gradient of role {role!r}"
            named.append(([f"{of} at {name}" for name in gradient.names], gradient.norms))
            named.append(([of], gradient.total))
        self.verdict = verdict = Verdict(named, asked)
        return verdict

    verdict: Verdict = field(init=False)


class NonFiniteGuard:
    """What happens to a step that was left out: the run stops, or goes on for a bounded number of them in a row.

    Args:
        policy: ``raise`` stops at the first, ``skip`` after more than ``max_skips`` in a row.
        folder: where one snapshot per run and process goes; none is written without it.
        rank: of this process.
    """

    def __init__(self, policy: Policy, max_skips: int, folder: Path | None, rank: int = 0) -> None:
        self.bound = max_skips if policy == "skip" else 0
        self.folder, self.rank = folder, rank
        self.total = self.in_a_row = 0

    def complaint(self, attempt: Attempt) -> str | None:
        """Why the step was left out; ``None`` if it was taken.

        Raises:
            NonFiniteError: if it was left out, and there may be no more of them.
        """
        skip, bad = attempt.verdict.read()
        if not skip:
            self.in_a_row = 0
            return None
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        kept = self._snapshot(attempt, bad)
        what = bad[0] if bad else "a loss or gradient of another process"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        message = f"step {attempt.step}: {what}{more} is not finite"
        where = f" The first such batch of the run is in {kept}." if kept else ""
        if self.in_a_row > self.bound:
            row = f", nor were the {self.bound} before it (trainer.max_skips: {self.bound})" if self.bound else ""
            raise NonFiniteError(f"{message}{row}. {ADVICE}.{where}")
        return f"{message}: left out, {self.in_a_row} in a row of at most {self.bound}.{where}"

    def _snapshot(self, attempt: Attempt, bad: Sequence[str]) -> Path | None:
        """Batch, losses and random streams of the first such step of a run, as safetensors and JSON."""
        if self.folder is None:
            return None
        before = sorted(self.folder.glob(f"step-*-rank-{self.rank}.json"))
        if before:
            return before[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{attempt.step}-rank-{self.rank}.json"
        save_file(_tensors(attempt), path.with_suffix(".safetensors"))
        shown = [(name, float(value)) for name, value in attempt.losses]
        content = {
            "step": attempt.step,
            "not_finite": list(bad),
            "losses": [[name, value if math.isfinite(value) else str(value)] for name, value in shown],
            "captions": [list(batch.captions) for batch in attempt.batches],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path

    def state_dict(self) -> dict[str, int]:
        """How many steps were left out, in all and in a row."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self.total, self.in_a_row = int(state["total"]), int(state["in_a_row"])


def _tensors(attempt: Attempt) -> dict[str, Tensor]:
    tensors = {f"rng/{name}": state for name, state in attempt.rng.items()}
    for i, batch in enumerate(attempt.batches):
        own = dict(batch.extras) if batch.latents is None else {**batch.extras, "latents": batch.latents}
        tensors |= {f"batch-{i}/{name}": value for name, value in own.items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
