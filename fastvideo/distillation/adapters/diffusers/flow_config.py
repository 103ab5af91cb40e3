"""Options of flow families, and how their stock pipelines are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastvideo.distillation.adapters.diffusers.packing import Packing, Patches
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineConfig
from fastvideo.distillation.adapters.diffusers.stills import ImageConfig
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import UserError
from fastvideo.ranges import GuidanceScale, Pixels, Tokens


@dataclass(frozen=True)
class StockCall:
    """The call of a stock pipeline.

    Attributes:
        guidance: its argument of guidance between two predictions; none for ``None``.
        offset: taken off the standard guidance there: 1 for pipelines that add ``g (conditional - unconditional)``.
        negative: it takes a negative prompt, and guides only with one.
        packed: it takes latents in the network's own layout.
        sigmas: it takes the noise levels of its steps.
        images: it returns pictures.
        sizes: options of the family that it takes.
        lora_layouts: layouts of LoRA files under names that its programs know.
    """

    guidance: str | None = "guidance_scale"
    offset: float = 0.0
    negative: bool = True
    packed: bool = False
    sigmas: bool = True
    images: bool = True
    sizes: tuple[str, ...] = ("height", "width", "max_sequence_length")
    lora_layouts: tuple[str, ...] = ("diffusers", "peft")


def one_guidance(guidance: GuidanceValue) -> float:
    """The number of a guidance with which a stock pipeline is called.

    Raises:
        UserError: for one that depends on the time, which the pipelines of flows do not take.
    """
    if isinstance(guidance, tuple):
        pairs = [list(pair) for pair in guidance]
        raise UserError(f"guidance {pairs}: the stock pipeline of this family takes one number for all times")
    return guidance


def guiding(guidance: GuidanceValue) -> str:
    """The first number of a guidance that is not 1 (none), with its pair if it depends on the time; or empty."""
    if not isinstance(guidance, tuple):
        return "" if guidance == 1.0 else f"{guidance:g}"
    return next((f"{g:g} of the pair [{t:g}, {g:g}]" for t, g in guidance if g != 1.0), "")


class FlowConfig(PipelineConfig):
    """Options of a flow family."""

    exporter: ClassVar[str] = "fastvideo.distillation.adapters.export.flow:FlowExporter"
    stock: ClassVar[StockCall] = StockCall()
    packing: ClassVar[Packing] = Patches(2)
    """Layout of latents inside the network."""

    @property
    def call_arguments(self) -> Mapping[str, Any]:
        """Further arguments of the stock pipeline's call."""
        return {}


class FlowImageConfig(ImageConfig, FlowConfig):
    """Options of a flow family of images."""

    side: ClassVar[int] = 16
    height: Pixels = 1024
    """Picture height in pixels."""
    width: Pixels = 1024
    """Picture width in pixels."""
    max_sequence_length: Tokens = 512
    """Tokens that a prompt may have, with those that the pipeline puts around it."""


class GuidedImageConfig(FlowImageConfig):
    """Options of a family some of whose networks read a guidance as an input.

    It is a condition like the text: the same number for student, critic and teacher, and for every later sampler.
    """

    authors_guidance: ClassVar[float]
    guidance_embedded: GuidanceScale | None = None
    """Guidance that the network reads, of all roles; `null` is the authors' where it reads one."""
    allow_cfg_on_distilled: bool = False
    """Allow guidance between two predictions of a network that reads one already."""

    @property
    def embedded(self) -> float:
        """The number for a network that reads a guidance."""
        return self.authors_guidance if self.guidance_embedded is None else self.guidance_embedded

    @property
    def call_arguments(self) -> Mapping[str, Any]:
        return {"guidance_scale": self.embedded}
