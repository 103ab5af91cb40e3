"""Notes before the first step: what of the data, the roles and the schedule this run will not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch.optim.lr_scheduler import LambdaLR

from fastvideo.data.order import Bucket, SampleStream
from fastvideo.distillation.builder import Config, Method
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.wording import counted, see

MANY = 1000
"""Steps after which a role that each of them trained counts as one that all train."""


def idle_notes(config: Config, trainer: DistillTrainer, data: SampleStream) -> Iterator[str]:
    """Say which videos are in no batch, which roles no step trains, and from which step a learning rate is 0.

    Call it when a resumed run is at its step.
    """
    yield from left_out(data)
    left = range(trainer.step, config.trainer.max_steps)
    if not left:
        yield (
            f"all {config.trainer.max_steps} steps are done: nothing is trained; --trainer.max-steps extends the run, "
            f"and --method.decay-steps its schedule, if it has one{see('nothing-is-left-to-train')}"
        )
        return
    for handle in trainer.method.bundle:
        if handle.training is not None:
            yield from _role_notes(config, trainer.method, handle, left)


def left_out(data: SampleStream) -> Iterator[str]:
    """Name the buckets that are smaller than a step, and what would take them in."""
    buckets, shard = data.source.buckets, data.shard
    small = [bucket for bucket in buckets if bucket.rows.numel() and not bucket.rounds(shard)]
    if not small:
        return
    lost, total = (sum(len(bucket.rows) for bucket in some) for some in (small, buckets))
    sizes = ", ".join(f"{len(bucket.rows)} of {bucket.name}" for bucket in small)
    takes = f"{shard.per_round} of one size ({shard.batch_size} on each of {counted(shard.world_size, 'process')})"
    which = f"{lost} of {counted(total, 'video')} {'is' if lost == 1 else 'are'} in no batch and never trained on"
    yield f"{which}: {sizes}; a step takes {takes}. {_remedy(small, shard.world_size)}{see('videos-are-in-no-batch')}"


def _remedy(small: Sequence[Bucket], processes: int) -> str:
    """Batch size that takes all videos, if there is one."""
    fits = min(len(bucket.rows) for bucket in small) // processes
    smaller = f"--data.batch-size {fits} takes all" if fits else "Fewer processes take more"
    return f"{smaller}; `fastvideo buckets show` counts them"


def _role_notes(config: Config, method: Method, handle: RoleHandle, left: range) -> Iterator[str]:
    steps = _steps_of(handle.name, method, left)
    if not steps:
        often = handle.name == "student" and "generator_update_interval" in type(config.method).model_fields
        lower = ", or lower method.generator_update_interval" if often else ""
        yield (
            f"{handle.name} is not trained by any of the steps {left.start + 1} to {left.stop}: raise "
            f"--trainer.max-steps{lower}{see('a-role-is-not-trained')}"
        )
    elif isinstance(schedule := handle.training.lr_scheduler, LambdaLR):
        yield from _rate_notes(handle.name, schedule, steps)


def _steps_of(role: str, method: Method, left: range) -> Sequence[int]:
    """Steps that train a role; of a role that is not always trained, those of the first million."""
    if all(role in method.active_roles(step) for step in left[:MANY]):
        return left
    return [step for step in left[: MANY**2] if role in method.active_roles(step)]


def _rate_notes(role: str, schedule: LambdaLR, steps: Sequence[int]) -> Iterator[str]:
    """Judge the factors on the rate at the updates of ``steps``, the first of which is the schedule's next."""
    (factor,), done = schedule.lr_lambdas, schedule.last_epoch
    if not isinstance(factor, partial):
        return
    warmup, decay = factor.args
    total = done + len(steps)
    if decay and total > warmup + decay:
        first = steps[max(0, warmup + decay - done)] + 1
        yield (
            f"the learning rate of {role} is 0 from step {first} on, its decay of {decay} updates is over: nothing "
            f"changes up to step {steps[-1] + 1}. --method.decay-steps {total - warmup} ends it with the run, also "
            f"when the run is resumed; 0 keeps the rate{see('the-learning-rate-is-0')}"
        )
    elif warmup >= total:
        yield (
            f"the learning rate of {role} reaches {factor(total - 1):.0%} of its value: its warm-up of {warmup} "
            f"updates is not over after the last of {total}; lower method.warmup_steps{see('a-warm-up-is-not-over')}"
        )
