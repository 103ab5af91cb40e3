"""Training of the judge of the tiny world, and its accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastvideo.inference.progress import tracked
from fastvideo.tiny.classifier import Logits, TinyClassifier
from fastvideo.tiny.world import LOOKS, TinyWorld, WorldSample
from tools.tiny_world.recipe import ClassifierRecipe


def train_classifier(recipe: ClassifierRecipe) -> TinyClassifier:
    """A classifier trained on videos of the train split; frozen, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # module constructors only know the global generator
        model = TinyClassifier(recipe.model)
        look = nn.Linear(recipe.model.features, LOOKS)
    parameters = [*model.parameters(), *look.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    videos = TinyWorld("train").batches(recipe.steps * recipe.batch_size, recipe.seed, recipe.batch_size)
    for sample in tracked(videos, "classifier", total=recipe.steps):
        features = model.features(augment(sample.videos, recipe.noise, generator))
        loss = classification_loss(model.heads(features), sample, recipe.label_smoothing)
        loss = loss + recipe.look_weight * F.mse_loss(look(features), sample.look)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def augment(videos: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Noise of random strength up to `noise` on [B, 3, T, H, W] in [-1, 1]; about half of the videos get none."""
    strength = (2.0 * torch.rand(len(videos), 1, 1, 1, 1, generator=generator) - 1.0).clamp_min(0.0)
    return videos + noise * strength * torch.randn(videos.shape, generator=generator)


def classification_loss(scores: Logits, sample: WorldSample, smoothing: float) -> torch.Tensor:
    truth = (sample.digit, sample.colour, sample.direction)
    losses = [F.cross_entropy(s, t, label_smoothing=smoothing) for s, t in zip(scores, truth, strict=True)]
    return torch.stack(losses).sum()


def accuracy(model: TinyClassifier, sample: WorldSample, videos: torch.Tensor | None = None) -> dict[str, float]:
    """Accuracy of digit, colour and direction; `videos` replaces those of the sample."""
    read = model.read(sample.videos if videos is None else videos)
    truth = torch.stack([sample.digit, sample.colour, sample.direction], dim=1)
    right = (read == truth).double().mean(dim=0).tolist()
    return dict(zip(("digit", "colour", "direction"), right, strict=True))
