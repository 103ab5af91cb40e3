"""Training of the judge of the tiny world, and its accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvideo.inference.progress import tracked
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.recipe import ClassifierRecipe
from fastvideo.tiny.world import TinyWorld, WorldSample


def train_classifier(recipe: ClassifierRecipe) -> TinyClassifier:
    """A classifier trained on videos of the train split; frozen, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        model = TinyClassifier(recipe.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    videos = TinyWorld("train").batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)
    for sample in tracked(videos, "classifier", total=recipe.steps):
        loss = classification_loss(model, sample, augment(sample.videos, recipe, generator), recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def augment(videos: torch.Tensor, recipe: ClassifierRecipe, generator: torch.Generator) -> torch.Tensor:
    """Blur and noise of random strength per video, on [B, 3, T, H, W] in [-1, 1]; about half get none of either."""
    strength = (2.0 * torch.rand(2, len(videos), 1, 1, 1, 1, generator=generator) - 1.0).clamp_min(0.0)
    soft = F.avg_pool3d(videos, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    mixed = videos + recipe.blur * strength[0] * (soft - videos)
    return mixed + recipe.noise * strength[1] * torch.randn(videos.shape, generator=generator)


def classification_loss(
    model: TinyClassifier, sample: WorldSample, videos: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Sum of the three cross-entropies."""
    truth = (sample.digit, sample.colour, sample.direction)
    losses = [F.cross_entropy(s, t, label_smoothing=smoothing) for s, t in zip(model(videos), truth, strict=True)]
    return torch.stack(losses).sum()


def accuracy(model: TinyClassifier, sample: WorldSample, videos: torch.Tensor | None = None) -> dict[str, float]:
    """Share of videos whose digit, colour and direction are read right; `videos` replaces those of the sample."""
    read = model.read(sample.videos if videos is None else videos)
    truth = torch.stack([sample.digit, sample.colour, sample.direction], dim=1)
    right = (read == truth).double().mean(dim=0).tolist()
    return dict(zip(("digit", "colour", "direction"), right, strict=True))
