"""Every number of the recipe that builds the tiny CogVideoX pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvideo.tiny.recipe import ClassifierRecipe, SharpenRecipe, TextRecipe, VaeRecipe


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
    steps: int = 1500
    short_frames: int = 1
    short_share: float = 0.6
    seed: int = 23


@dataclass(frozen=True)
class CogVideoXTransformerRecipe:
    """Size of the transformer, which has rotary positions as CogVideoX-5B has; the `sft` method trains it.

    Attributes:
        heads, head_width, layers, time_width: as in CogVideoX, smaller.
        snr_shift: `snr_shift_scale` of the scheduler that is saved with it; 1 as for 5B.
    """

    heads: int = 4
    head_width: int = 48
    layers: int = 4
    time_width: int = 64
    snr_shift: float = 1.0
    seed: int = 24


@dataclass(frozen=True)
class CogVideoXRecipe:
    """All parts of the recipe; `report_videos` held-out videos stand behind each figure it prints."""

    classifier: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    vae: CogVideoXVaeRecipe = field(default_factory=CogVideoXVaeRecipe)
    sharpen: SharpenRecipe = field(default_factory=SharpenRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    transformer: CogVideoXTransformerRecipe = field(default_factory=CogVideoXTransformerRecipe)
    report_videos: int = 2048
