"""Every number of the recipe that builds the tiny CogVideoX pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from fastvideo.tiny.recipe import VaeRecipe


@dataclass(frozen=True)
class CogVideoXVaeRecipe(VaeRecipe):
    """Size and training of the VAE; the sizes of the Wan VAE that it inherits have no effect here.

    Attributes:
        widths: channels at 32, 16, 8 and 4 pixels a side. Convolutions at full resolution are what a step costs, so
            the first is small.
        groups: of every group normalisation.
        short_frames: the first steps see single frames, which this VAE codes as images; it cannot decode a clip of
            five frames (two latent frames would become eight).
    """

    widths: tuple[int, ...] = (8, 24, 48, 64)
    groups: int = 4
    steps: int = 3000
    short_frames: int = 1
    short_share: float = 0.3
    seed: int = 23
