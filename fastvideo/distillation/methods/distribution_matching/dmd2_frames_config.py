"""Options of DMD2 with a frame teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import model_validator

from fastvideo.distillation.config.base import Guidance, TimeRange
from fastvideo.distillation.frame_bridge import FrameSpace
from fastvideo.distillation.methods.distribution_matching.dmd2_config import DMD2Config
from fastvideo.distillation.methods.distribution_matching.refused import refused
from fastvideo.distillation.types import Need
from fastvideo.ranges import LearningRate, NonNegativeFloat, NonNegativeInt, PositiveInt
from fastvideo.sampling_ranges import BatchSize


class DMD2FramesConfig(DMD2Config):
    """Options of DMD2 and of its frame term."""

    needs: ClassVar[frozenset[Need]] = frozenset({"frames"})
    score_and_train: Annotated[bool, refused("two terms meet at the student's sample")] = False
    """Not possible here."""
    video_weight: NonNegativeFloat = 1.0
    """Weight of the video term, that is of DMD2 itself."""
    frame_weight: NonNegativeFloat = 0.25
    """Weight of the frame term beside the video term; 0 leaves it out."""
    frame_time_range: TimeRange = (0.02, 0.5)
    """Noise levels, evenly drawn, at which frame teacher and frame critic are compared. A frame teacher knows how
    things look; at high noise it would pull at the layout, which is the video teacher's."""
    frame_guidance: Guidance = 2.0
    """Classifier-free guidance of the frame teacher; lower than for stills, since it narrows what a frame may be."""
    frame_videos: BatchSize = 8
    """Videos of a batch whose frames are scored, the first ones; decoding with gradient takes memory for each."""
    frames_per_video: PositiveInt = 2
    """Frames of each of them, of different latent frames."""
    first_frame: bool = True
    """Take the first frame always, which is cheapest to decode, and draw the others."""
    frame_space: FrameSpace = "auto"
    """Way of the frames to the frame teacher: `auto` hands on the first latent frame as it is where the two families
    share their latent space and decodes the others, `identity` scores that frame alone, `decoded` decodes all."""
    share_frame_noise: bool = False
    """Noise all frames of a video alike."""
    frame_critic_learning_rate: LearningRate = 8e-6
    """AdamW learning rate of the frame critic."""
    frame_warmup_steps: NonNegativeInt = 200
    """Steps before the frame term is switched on: the frame critic learns the student's frames, and in their second
    half frame teacher and frame critic are compared on real ones. If the teacher is not better there, the run stops."""
    trust_frame_teacher: bool = False
    """Switch the frame term on without that test, which needs videos (`data.path`)."""
    allow_frames_only: bool = False
    """Allow `video_weight: 0`. A frame teacher sees no motion, and neither keeps nor restores it."""
    allow_resize: bool = False
    """Allow frames to be squeezed to the shape of the frame teacher's pictures, and pictures larger than those that it
    was trained on."""

    @model_validator(mode="after")
    def _frames_fit(self) -> DMD2FramesConfig:
        if self.video_weight == 0 and not self.allow_frames_only:
            raise ValueError(
                "video_weight: 0 leaves the frame teacher alone, which sees no motion; set allow_frames_only: true for "
                "that"
            )
        if self.frame_time_range[0] == self.frame_time_range[1]:
            raise ValueError(f"frame_time_range is empty: {list(self.frame_time_range)}")
        if not (self.frame_warmup_steps or self.trust_frame_teacher):
            raise ValueError(
                "frame_warmup_steps: 0 leaves no step to test the frame teacher in; set trust_frame_teacher: true to "
                "go without the test"
            )
        return self
