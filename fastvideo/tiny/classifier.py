"""The judge of the tiny world: a small frozen network that reads digit, colour and direction from a video."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FRAMES = 9


class Logits(NamedTuple):
    """Unnormalised scores: digit [B, 10], colour [B, 7], direction [B, 8]."""

    digit: torch.Tensor
    colour: torch.Tensor
    direction: torch.Tensor


@dataclass(frozen=True)
class ClassifierConfig:
    """Size of the network: channels of its first convolution and of its features."""

    width: int = 16
    features: int = 64


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.SiLU())


class TinyClassifier(nn.Module):
    """Convolutions over each frame; "what" is pooled over space and time, "where" keeps both; then three heads."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.stem = _conv(3, w, stride=2)
        self.conv1 = _conv(w, 2 * w)
        self.conv2 = _conv(2 * w, 4 * w, stride=2)
        self.conv3 = _conv(4 * w, 6 * w)
        self.where = nn.Conv2d(4 * w, 2, 1)
        self.hidden = nn.Linear(6 * w + FRAMES * 2 * 64, 2 * config.features)
        self.penultimate = nn.Linear(2 * config.features, config.features)
        self.digit = nn.Linear(config.features, len(DIGITS))
        self.colour = nn.Linear(config.features, len(COLOURS))
        self.direction = nn.Linear(config.features, len(DIRECTIONS))

    def features(self, videos: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, 64] of videos [B, 3, 9, 32, 32] in [-1, 1]; the space of the Frechet distance."""
        batch, channels, frames, height, width = videos.shape
        x = videos.transpose(1, 2).reshape(batch * frames, channels, height, width)
        x = self.conv2(self.conv1(self.stem(x)))
        # Three of nine frames show digit and colour; motion needs all of them.
        seen = x.view(batch, frames, *x.shape[1:])[:, ::4].flatten(0, 1)
        what = self.conv3(seen).amax(dim=(2, 3)).view(batch, -1, self.conv3[0].out_channels).mean(dim=1)
        where = F.silu(self.where(x)).reshape(batch, -1)
        x = F.silu(self.hidden(torch.cat([what, where], dim=1)))
        return F.silu(self.penultimate(x))

    def heads(self, features: torch.Tensor) -> Logits:
        """Scores of features [B, 64]."""
        return Logits(self.digit(features), self.colour(features), self.direction(features))

    def forward(self, videos: torch.Tensor) -> Logits:
        """Scores of videos [B, 3, 9, 32, 32] in [-1, 1]."""
        return self.heads(self.features(videos))

    @torch.no_grad()
    def read(self, videos: torch.Tensor) -> torch.Tensor:
        """The most likely (digit, colour, direction) of each video: int64 [B, 3]."""
        return torch.stack([scores.argmax(dim=1) for scores in self(videos)], dim=1)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TinyClassifier:
        """The frozen classifier saved in `folder`, in eval mode."""
        config = ClassifierConfig(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
        with torch.random.fork_rng(devices=[]):  # the first draws of its layers are thrown away
            model = cls(config)
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return model.eval().requires_grad_(False)
