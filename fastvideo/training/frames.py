"""A run's frame teacher: its admission before its term is switched on, and the balance of the two terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastvideo.distillation.builder import Config, Method
from fastvideo.distillation.engine.runtime import Tracker
from fastvideo.distillation.methods.distribution_matching.dmd2_frames import DMD2FramesMethod
from fastvideo.distillation.methods.distribution_matching.frame_admission import Admission
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.errors import UserError

BALANCED = (0.05, 20.0)
"""Norms of the frame term's gradient over the video term's between which both count."""
LOOK_EVERY = 100
"""Steps between looks at that balance, each of which waits for the device."""


def frame_notes(config: Config, method: Method) -> Iterator[str]:
    """Say from which step on the frame term trains the student, and on which condition."""
    if not isinstance(method, DMD2FramesMethod):
        return
    warmup, steps = method.config.frame_warmup_steps, config.trainer.max_steps
    if method.config.trust_frame_teacher:
        yield f"frame teacher: taken as it is, without a test on real frames; its term is on after step {warmup}"
    else:
        yield (
            f"frame teacher: on trial for {warmup} steps (method.frame_warmup_steps), in which its critic learns the "
            f"student's frames; its term is switched on if it is better than that critic on real ones"
        )
    if warmup >= steps:
        yield (
            f"frame teacher: its term never trains the student in {steps} steps; lower method.frame_warmup_steps, or "
            f"raise trainer.max_steps"
        )


def frame_hooks(trainer: DistillTrainer, tracker: Tracker) -> tuple[FrameHook, ...]:
    """The hook of a method with a frame teacher; it comes before the one that saves, so that no checkpoint hides a
    teacher that was refused."""
    method = trainer.method
    return (FrameHook(trainer, method, tracker),) if isinstance(method, DMD2FramesMethod) else ()


class FrameHook:
    """Admits the frame teacher, or stops the run; later it says if one of the two terms drowns the other."""

    def __init__(self, trainer: DistillTrainer, method: DMD2FramesMethod, tracker: Tracker) -> None:
        self.agreement, self.method, self.tracker = trainer.runtime.agreement, method, tracker
        self._said = False

    def due(self, step: int) -> bool:
        return step == self.method.config.frame_warmup_steps and not self.method.config.trust_frame_teacher

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Test the teacher at the end of its trial.

        Raises:
            UserError: if it is not admitted; on all processes, which add their errors up.
        """
        if self.due(step):
            self._admit(step)
        if step % LOOK_EVERY == 0:
            self._weigh(step)

    def _admit(self, step: int) -> None:
        sums = sum(self.agreement.from_all(self.method.errors.cpu()))
        found = Admission.of(sums, self.method.config.frame_time_range)  # type: ignore[arg-type]
        if found.refusal is None:
            self.tracker.say(f"frame teacher: admitted at step {step}, its term is on; {found.numbers}")
            return
        raise UserError(
            f"roles.frame_teacher: not admitted at step {step}: {found.refusal}. {found.numbers}. Give a better one, "
            f"or other noise levels (method.frame_time_range); method.trust_frame_teacher: true skips this test"
        )

    def _weigh(self, step: int) -> None:
        """Say once that the balance left its band, and again after it came back."""
        if self.method.balance is None:
            return
        balance = float(self.method.balance)
        outside = not BALANCED[0] <= balance <= BALANCED[1]
        if outside and not self._said:
            few = balance < BALANCED[0]
            effect, change = (
                ("hardly counts", "Raise") if few else ("drowns the video term, and motion with it", "Lower")
            )
            self.tracker.say(
                f"frame teacher, step {step}: at the student's sample the gradient of the frame term is {balance:.3g} "
                f"times that of the video term ({BALANCED[0]} to {BALANCED[1]:.0f} is usual): it {effect}. {change} "
                f"method.frame_weight"
            )
        self._said = outside
