"""``Exporter``: how other programs take the students of one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.parts import Parts
from fastvideo.distillation.types import UserError


@dataclass(frozen=True)
class StockSampler:
    """A diffusers scheduler that goes from time to time as a student's own sampler does.

    Asked for ``len(times)`` steps, it calls the network at the rectified-flow times ``times``. They may differ from the
    student's ladder, where no scheduler yields that ladder.
    """

    scheduler: Any
    times: tuple[float, ...]
    sigmas: tuple[float, ...] = ()
    """Noise levels that the pipeline has to be called with; none where the scheduler holds them."""


@dataclass(frozen=True)
class StreamingClasses:
    """Names by which FastVideo and SGLang load a family's streaming students."""

    pipeline: str
    network: str
    scheduler: str


def deviation(found: Sequence[float], times: Sequence[float]) -> float:
    """Largest difference between two ladders of the same length."""
    return max(abs(a - b) for a, b in zip(found, times, strict=True))


class Exporter:
    """Conventions of diffusers and ComfyUI for a family's students; this base has none to offer.

    Args:
        config: the family's options.
    """

    streaming: ClassVar[StreamingClasses | None] = None
    """Classes of the programs that stream; ``None`` for a family that none of them has."""

    network_part: str = "transformer"
    """Name of the network in the diffusers pipeline, before the layers' names in a LoRA file of it."""
    lora_layouts: tuple[str, ...] = ("diffusers", "peft")
    """Layouts of LoRA files whose programs have the family under :meth:`original_name`, by their names in
    ``export.lora.LAYOUTS``; ``comfy`` stands for whole networks under these names too."""
    call_options: tuple[str, ...] = ("height", "width", "num_frames", "max_sequence_length")
    """Options of the family that the diffusers pipeline is called with."""
    lora_loader: str = "load_lora_weights"
    """Method of the diffusers pipeline that loads a LoRA file."""
    makes_images: bool = False
    """The diffusers pipeline returns ``images`` and not ``frames``."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def stock_sampler(self, times: Sequence[float], kind: str) -> StockSampler:
        """The scheduler with which stock diffusers comes closest to a student's ladder ``times``.

        Args:
            times: the ladder.
            kind: the student's sampler, ``renoise`` or ``euler``.

        Raises:
            UserError: for a family without a diffusers pipeline, or a sampler that its schedulers do not have.
        """
        raise UserError(f"{type(self.config).__name__}: the family has no diffusers pipeline to export to")

    def guidance_arguments(self, guidance: GuidanceValue) -> dict[str, Any]:
        """Arguments of the diffusers pipeline's call for a standard guidance; 1 is none."""
        scales = [g for _, g in guidance] if isinstance(guidance, tuple) else [guidance]
        return dict(zip(("guidance_scale", "guidance_scale_2"), scales, strict=False))

    def stock_parts(self, guidance: GuidanceValue) -> Mapping[str, Any]:
        """Components of the diffusers pipeline for a standard guidance, by name, where its call takes none."""
        return {}

    def call_arguments(self, steps: int, guidance: GuidanceValue, sigmas: Sequence[float] = ()) -> dict[str, Any]:
        """Arguments of the diffusers pipeline's call, beside the prompt and :attr:`call_options`.

        Args:
            steps: of the sampler.
            guidance: in the standard convention.
            sigmas: of the :class:`StockSampler`.
        """
        levels = {"sigmas": list(sigmas)} if sigmas else {}
        return {"num_inference_steps": steps, **levels, **self.guidance_arguments(guidance)}

    def stock_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, F, H, W]`` in the layout that the diffusers pipeline takes."""
        return latents

    def latent_arguments(self, latents: Tensor, parts: Parts | None) -> dict[str, Tensor]:
        """Arguments of the diffusers pipeline's call that are latents ``[B, C, F, H, W]``, which may have parts."""
        return {"latents": self.stock_latents(latents)}

    def original_name(self, name: str) -> str:
        """Name of a module or parameter in the authors' own code, which ComfyUI and LightX2V use too.

        Raises:
            UserError: for one that their code does not have.
        """
        return name
