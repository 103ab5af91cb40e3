"""Every number of the recipe that builds the tiny pipeline, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvideo.tiny.classifier import ClassifierConfig


@dataclass(frozen=True)
class ClassifierRecipe:
    """Training of the judge.

    Attributes:
        steps, batch_size, learning_rate: AdamW with a one-cycle learning rate.
        noise: highest standard deviation of the pixel noise added to half of the videos.
        label_smoothing: of all three cross-entropies.
        look_weight: of the mean squared error of a linear head that reads `WorldSample.look` from the features. It is
            dropped after training; it makes the features, the space of the Frechet distance, see size, place, speed and
            shade too. Blurred training videos would teach them to overlook the losses of few steps.
    """

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    noise: float = 0.02
    label_smoothing: float = 0.05
    look_weight: float = 24.0
    seed: int = 11


@dataclass(frozen=True)
class TextRecipe:
    """The frozen random text encoder; `max_length` is the prompt length in tokens, the end token included."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    max_length: int = 16
    seed: int = 12


@dataclass(frozen=True)
class TransformerRecipe:
    """Size of the Wan transformer; the `sft` method trains it.

    Attributes:
        channels: of the latents.
        heads, head_width, feed_forward, layers: as in Wan, smaller.
        frequency_width: of the sinusoidal time embedding.
        longest_axis: positions of the rotary embedding along each axis.
        shift: of the flow-matching scheduler saved with it.
    """

    channels: int = 16
    heads: int = 4
    head_width: int = 48
    feed_forward: int = 512
    layers: int = 4
    frequency_width: int = 64
    longest_axis: int = 32
    shift: float = 3.0
    seed: int = 14


@dataclass(frozen=True)
class VaeTraining:
    """Training of a VAE, or of a part of it.

    Attributes:
        steps, batch_size: length of training; more steps beat a larger batch.
        muon_rate, adam_rate: highest learning rates for convolution kernels and for everything else.
        warm_up: steps of linear warm-up; a cosine to zero follows.
        gradient_norm: bound of gradient clipping.
    """

    steps: int = 2400
    batch_size: int = 16
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    warm_up: int = 100
    gradient_norm: float = 1.0
    seed: int = 13


@dataclass(frozen=True)
class WeighedTraining(VaeTraining):
    """Training of a whole VAE.

    Attributes:
        ink_weight: a pixel of full ink counts 1 + this, black counts 1, as most of a frame is black.
        squared_weight: of the squared error beside the absolute error.
        kl_weight: of the KL divergence to a unit Gaussian, per latent element; it keeps the latents smooth.
        statistics_videos: videos from which the mean and the deviation of the latents are measured afterwards.
    """

    ink_weight: float = 3.0
    squared_weight: float = 4.0
    kl_weight: float = 5e-4
    statistics_videos: int = 2048


@dataclass(frozen=True)
class VaeRecipe(WeighedTraining):
    """Size and training of the VAE.

    Attributes:
        encoder_width, decoder_width, multipliers, blocks: channels at the first stage, their multiples at the three
            resolutions (16, 8 and 4 pixels a side), residual blocks per stage.
        short_frames, short_share: first frames of each video, and share of the first steps that sees these alone: one
            temporal chunk of four teaches as much as two at half the cost.
    """

    encoder_width: int = 16
    decoder_width: int = 24
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    short_frames: int = 5
    short_share: float = 0.6


@dataclass(frozen=True)
class SharpenRecipe(VaeTraining):
    """Training of the decoder alone, with fixed latents; weights as in :class:`VaeRecipe`.

    Attributes:
        single_share: share of the first steps that decodes first frames alone, at a tenth of the cost.
    """

    steps: int = 2100
    single_share: float = 0.0
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    ink_weight: float = 3.0
    squared_weight: float = 8.0
    seed: int = 15


@dataclass(frozen=True)
class TinyRecipe:
    """All parts of the recipe; `report_videos`: held-out videos behind each printed figure."""

    classifier: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    sharpen: SharpenRecipe = field(default_factory=SharpenRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    report_videos: int = 2048
