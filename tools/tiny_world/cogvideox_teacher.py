"""Distil the shipped Wan teacher into the tiny CogVideoX teacher.

Both share latents and the meaning of velocity, so the Wan teacher's velocity is a target without the noise of a video's
own. Matching the corresponding blocks too replaces several thousand steps on videos by a few hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter, CogVideoXConfig
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.noise import add_noise, shift_time
from fastvideo.distillation.types import Condition
from fastvideo.inference.progress import tracked
from fastvideo.tiny.captions import COLOURS, DIGITS, DIRECTIONS, Attributes, caption_of
from fastvideo.tiny.latents import LatentSet, cached_latents
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world.cogvideox_recipe import CogVideoXRecipe, ImitationRecipe
from tools.tiny_world.cogvideox_start import start_from_wan
from tools.tiny_world.teacher import install_network, sampling
from tools.tiny_world.train_vae import warmed_cosine

Adapter = CogVideoXAdapter | WanFamily
GUIDANCE = 2.0  # the Wan teacher's; of 80 digits 0.95 are right with 12 steps, and 0.68 at guidance 1


def all_captions() -> list[str]:
    """The empty prompt and all captions of the tiny world."""
    named = [Attributes(d, c, m) for d in _open(DIGITS) for c in _open(COLOURS) for m in _open(DIRECTIONS)]
    return ["", *(caption_of(attributes) for attributes in named)]


def _open(words: Sequence[str]) -> list[int | None]:
    return [None, *range(len(words))]


def train_teacher(out: Path, recipe: CogVideoXRecipe) -> dict[str, float]:
    """Train the transformer in `out`/pipeline and install it; returns the last squared error of a velocity."""
    pipeline, length = out / "pipeline", recipe.text.max_length
    ours = CogVideoXAdapter(CogVideoXConfig(path=str(pipeline), max_sequence_length=length))
    wan = WanFamily(WanFamilyConfig())
    network: Any = ours.folder.load_network()
    source: Any = wan.folder.load_network().requires_grad_(False)
    start_from_wan(network, source, ours.folder.grid)
    data = cached_latents(ours.codec, TinyWorld("train"), recipe.imitation.videos, recipe.imitation.seed, out / "cache")
    student, teacher = Network(ours, network, network.transformer_blocks), Network(wan, source, source.blocks)
    error = imitate(student, teacher, Draws.of(data, recipe.imitation))
    install_network(network, pipeline, sampling(GUIDANCE, recipe.text))
    return {"velocity_error": error}


class Network:
    """A network with its family, all embedded captions, and its blocks' last outputs for the video.

    Args:
        adapter: its family.
        network: the weights.
        blocks: modules whose outputs :attr:`hidden` keeps; the first of several outputs is the video's.
    """

    def __init__(self, adapter: Adapter, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.adapter, self.network, self.blocks = adapter, network, blocks
        self.hidden: list[Tensor] = []
        embedded = adapter.conditioner.encode_prompts(all_captions()).of(adapter.conditioner.key)
        self.captions = {name: tensor.clone() for name, tensor in embedded.items()}

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden.append(output[0] if isinstance(output, tuple) else output)

    def velocity(self, x_t: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        """Velocity for captions by their index in `all_captions`, int64 [B]."""
        self.hidden.clear()
        chosen = {name: tensor[caption] for name, tensor in self.captions.items()}
        condition = Condition({self.adapter.conditioner.key: chosen})
        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.enter_context(block.register_forward_hook(self._keep))
            return self.adapter.velocity(self.network, x_t, t, condition)


@dataclass(frozen=True)
class Draws:
    """Draws of noisy latents, times and captions."""

    latents: Tensor
    captions: Tensor
    recipe: ImitationRecipe
    generator: torch.Generator

    @staticmethod
    def of(data: LatentSet, recipe: ImitationRecipe) -> Draws:
        place = {caption: index for index, caption in enumerate(all_captions())}
        captions = torch.tensor([place[caption] for caption in data.captions])
        return Draws(data.latents, captions, recipe, torch.Generator().manual_seed(recipe.seed))

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """`x_t` [B, 16, 3, 4, 4], `t` [B], captions int64 [B]."""
        count, generator = self.recipe.batch_size, self.generator
        row = torch.randint(len(self.latents), (count,), generator=generator)
        x0 = self.latents[row]
        noise = torch.randn(x0.shape, generator=generator)
        t = shift_time(torch.rand(count, generator=generator), self.recipe.time_shift).clamp(0.001, 0.999)
        return add_noise(x0, noise, t), t, self._captions(self.captions[row])

    def _captions(self, own: Tensor) -> Tensor:
        """Empty a share of the captions and replace another by any: guidance needs both."""
        share = torch.rand(len(own), generator=self.generator)
        other = torch.randint(len(all_captions()), own.shape, generator=self.generator)
        empty = share < self.recipe.empty_share
        replaced = share < self.recipe.empty_share + self.recipe.other_share
        return torch.where(empty, 0, torch.where(replaced, other, own))


def imitate(student: Network, teacher: Network, draws: Draws) -> float:
    """Train `student` in place towards `teacher`; its weights become their moving average.

    Returns the last squared error of a velocity.
    """
    recipe, parameters = draws.recipe, list(student.network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    share = warmed_cosine(recipe.warm_up, recipe.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in tracked(range(recipe.steps), "teacher", total=recipe.steps):
        error, hidden = imitation_errors(student, teacher, *draws.next())
        optimizer.zero_grad()
        (error + recipe.hidden_weight * hidden).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, recipe.gradient_norm)
        optimizer.step()
        schedule.step()
        keep = min(recipe.ema_decay, (step + 1) / (step + 20))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return error.item()


def imitation_errors(
    student: Network, teacher: Network, x_t: Tensor, t: Tensor, caption: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared errors of the velocity, and of the blocks' outputs after layer normalisation."""
    with torch.no_grad():
        wanted = teacher.velocity(x_t, t, caption)
    error = (student.velocity(x_t, t, caption) - wanted).square().mean()
    pairs = zip(student.hidden, teacher.hidden, strict=True)
    return error, torch.stack([(_normal(s) - _normal(h)).square().mean() for s, h in pairs]).mean()


def _normal(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:])
