"""Every number of the recipe that builds the tiny CogVideoX pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.tiny_world.recipe import ClassifierRecipe, SharpenRecipe, TextRecipe, VaeTraining


@dataclass(frozen=True)
class CogVideoXVaeRecipe(VaeTraining):
    """Size of the VAE, and training of its encoder towards the Wan VAE's latents.

    Attributes:
        widths: channels at 32, 16, 8 and 4 pixels a side; the first is small, as convolutions at full resolution
            dominate the cost of a step.
        groups: of every group normalisation.
        width_weight: of the squared error of the log-variance beside that of the mean.
    """

    widths: tuple[int, ...] = (8, 16, 32, 64)
    groups: int = 4
    steps: int = 1600
    width_weight: float = 0.02
    seed: int = 23


@dataclass(frozen=True)
class CogVideoXTransformerRecipe:
    """Size of the transformer, with rotary positions like CogVideoX-5B.

    Attributes:
        heads, head_width, layers: those of the Wan teacher, whose weights initialise it.
        time_width: of the blocks' time embedding.
        snr_shift: `snr_shift_scale` of the scheduler saved with it; 1 as for 5B.
    """

    heads: int = 4
    head_width: int = 48
    layers: int = 4
    time_width: int = 16
    snr_shift: float = 1.0
    seed: int = 24


@dataclass(frozen=True)
class ImitationRecipe:
    """Training of the transformer towards the Wan teacher's answers.

    Attributes:
        videos: of the train split.
        steps, batch_size, learning_rate, betas, weight_decay: AdamW; `warm_up` steps, then a cosine to zero.
        time_shift: of uniform times.
        empty_share, other_share: of captions that become empty, or any other.
        hidden_weight: of the squared error of the blocks' outputs.
        ema_decay: of the installed average.
    """

    videos: int = 8192
    steps: int = 2200
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warm_up: int = 50
    time_shift: float = 2.0
    empty_share: float = 0.12
    other_share: float = 0.13
    hidden_weight: float = 1.0
    gradient_norm: float = 1.0
    ema_decay: float = 0.995
    seed: int = 25


@dataclass(frozen=True)
class CogVideoXRecipe:
    """All parts of the recipe; `report_videos`: held-out videos behind each printed figure.

    Text has 8 tokens, the longest caption's: CogVideoX spends as much on a token of text as on one of video.
    """

    classifier: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    vae: CogVideoXVaeRecipe = field(default_factory=CogVideoXVaeRecipe)
    sharpen: SharpenRecipe = field(default_factory=lambda: SharpenRecipe(steps=2400, muon_rate=4e-3, adam_rate=2e-3))
    text: TextRecipe = field(default_factory=lambda: TextRecipe(max_length=8))
    transformer: CogVideoXTransformerRecipe = field(default_factory=CogVideoXTransformerRecipe)
    imitation: ImitationRecipe = field(default_factory=ImitationRecipe)
    report_videos: int = 2048
