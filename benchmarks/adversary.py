"""Does an adversary pull a one-step sample where it should go? LADD's gradient beside DMD2's, before any training.

    python benchmarks/adversary.py

The student is the tiny teacher itself. Discriminator and critic learn on its samples first (200 and 60 updates at
2e-4, the rate of both in DMD2's tiny recipe with a discriminator; LADD's gives its heads 5e-3); then both gradients
are taken at one-step samples of other prompts, at several noise levels, and compared with the way to the end of the
guided teacher's trajectory from the same noise. Before that, how fast heads of several rates learn a student that
stands still: their loss on pairs that they have not seen. Last, how well heads see the prompt: trained to tell real
videos with their own prompts from the same ones with others'. 40 seconds of one core.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.features import features, widths_of
from fastvideo.distillation.methods.distribution_matching.discriminator import Discriminator, taps_at
from fastvideo.distillation.methods.distribution_matching.dmd2 import dmd_gradient
from fastvideo.distillation.methods.distribution_matching.gan import discriminator_loss, generator_loss
from fastvideo.distillation.noise import add_noise, velocity_target
from fastvideo.distillation.rollout import few_step
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.types import Condition
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tiny.world import TinyWorld

BATCH, BATCHES, STEPS = 32, 12, 24
LADDER = (1.0, 0.75, 0.5, 0.25)
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
RATE = 2e-4
RATES = (RATE, 1e-3, 5e-3)
UPDATES = (10, 30, 100)
SIGHT_UPDATES = 300
UNSEEN = 4
"""Batches whose samples end at each step of the ladder."""


class Bench:
    """The teacher as a student, with an adversary and a critic of its samples."""

    def __init__(self, model: LoadedModel) -> None:
        self.family, self.network = model.adapter, model.denoiser
        self.rng = torch.Generator().manual_seed(0)
        self.taps = taps_at((0.5, 0.75, 1.0), len(widths_of(self.family)))
        self.network.network.requires_grad_(False)

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.rng)

    def data(self, count: int, seed: int) -> tuple[Tensor, list[str]]:
        """Latents of real videos, and their captions."""
        world = TinyWorld("train").sample(count, seed)
        parts = [self.family.codec.encode(videos).float() for videos in world.videos.split(BATCH)]
        return torch.cat(parts), list(world.captions)

    def sample(self, like: Tensor, condition: Condition, stop: int) -> Tensor:
        velocity = partial(self.network.velocity, condition=condition)
        return few_step(velocity, self.noise(like), LADDER[: stop + 1], self.noise)

    def seen(self, x0: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        return features(self.network, add_noise(x0, noise, t), t, condition, self.taps)

    @torch.no_grad()
    def pairs(self, real: Tensor, captions: list[str]) -> list[tuple[Tensor, ...]]:
        """Features of noised real latents and samples, and their times, a batch each; rollouts end at every rung."""
        found: list[tuple[Tensor, ...]] = []
        for i, latents in enumerate(real.split(BATCH)):
            condition = self.family.conditioner.encode_prompts(captions[i * BATCH : (i + 1) * BATCH])
            t = torch.randn(BATCH, generator=self.rng).sigmoid().clamp(0.001, 0.999)
            noise, fake = self.noise(latents), self.sample(latents, condition, i % len(LADDER))
            found.append((*self.seen(latents, t, noise, condition), *self.seen(fake, t, noise, condition), t))
        return found

    @torch.no_grad()
    def exchanged(self, real: Tensor, captions: list[str]) -> list[tuple[Tensor, ...]]:
        """As :meth:`pairs`, of real videos with their own prompts and with others'."""
        found: list[tuple[Tensor, ...]] = []
        for i, latents in enumerate(real.split(BATCH)):
            own = captions[i * BATCH : (i + 1) * BATCH]
            condition = self.family.conditioner.encode_prompts(own)
            others = condition.map(lambda value: value.roll(1, 0))
            differ = torch.tensor([a != b for a, b in zip(own, own[-1:] + own[:-1], strict=True)])
            t, noise = torch.randn(BATCH, generator=self.rng).sigmoid().clamp(0.001, 0.999), self.noise(latents)
            both = (*self.seen(latents, t, noise, condition), *self.seen(latents, t, noise, others), t)
            found.append(tuple(each[differ] for each in both))
        return found

    @torch.no_grad()
    def prompts_seen(self, pairs: list[tuple[Tensor, ...]], updates: int, rate: float) -> float:
        """Share of the last pairs in which a video's own prompt has the higher logit, after training on the others."""
        with torch.enable_grad():
            heads = self.adversary(pairs[:-UNSEEN], updates, rate)
        count, right = len(self.taps), []
        for *seen, t in pairs[-UNSEEN:]:
            own, other = heads(seen[:count], t).mean(1), heads(seen[count:], t).mean(1)
            right.append((own > other).float())
        return float(torch.cat(right).mean())

    def adversary(self, pairs: list[tuple[Tensor, ...]], updates: int, rate: float = RATE) -> Discriminator:
        """A discriminator after ``updates`` on stored features."""
        torch.manual_seed(0)
        heads = Discriminator([widths_of(self.family)[tap] for tap in self.taps], 64)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, betas=(0.0, 0.99))
        for step in range(updates):
            loss = self.loss(heads, pairs[step % len(pairs)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return heads.requires_grad_(False)

    def loss(self, heads: Discriminator, pair: tuple[Tensor, ...]) -> Tensor:
        """The discriminator's loss on one batch of :meth:`pairs`; a coin has 1.386."""
        *features, t = pair
        count = len(self.taps)
        return discriminator_loss(heads(features[count:], t), heads(features[:count], t))

    @torch.no_grad()
    def unseen_loss(self, pairs: list[tuple[Tensor, ...]], updates: int, rate: float) -> float:
        """Mean loss on the last pairs, after training on the others."""
        with torch.enable_grad():
            heads = self.adversary(pairs[:-UNSEEN], updates, rate)
        return float(sum(self.loss(heads, pair) for pair in pairs[-UNSEEN:]) / UNSEEN)

    def critic(self, real: Tensor, captions: list[str], updates: int) -> Denoiser:
        """The teacher's copy after ``updates`` on one-step samples."""
        critic = Denoiser(self.family, copy.deepcopy(self.network.network).requires_grad_(True))
        optimizer = torch.optim.AdamW(critic.network.parameters(), lr=RATE, betas=(0.0, 0.999))
        for step in range(updates):
            at = step % BATCHES * BATCH
            condition = self.family.conditioner.encode_prompts(captions[at : at + BATCH])
            with torch.no_grad():
                fake = self.sample(real[at : at + BATCH], condition, 0)
            t, noise = torch.rand(BATCH, generator=self.rng).clamp(0.02, 0.98), self.noise(fake)
            u = critic.velocity(add_noise(fake, noise, t), t, condition)
            loss = (u - velocity_target(fake, noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return critic


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean over samples."""
    return float(cosine_similarity(a.flatten(1), b.flatten(1)).mean())


def report(name: str, pull: Callable[[Tensor], Tensor], way: Tensor) -> None:
    """Print how well a pull at each noise level leads along the way, and agrees with itself at other noise."""
    for time in TIMES:
        t = torch.full((BATCH,), time)
        first, other = pull(t), pull(t)
        size = float(first.square().mean().sqrt())
        along = (cosine(first, way) + cosine(other, way)) / 2
        print(
            f"{name} at {time}: along the way {along:+.2f}, two draws agree {cosine(first, other):+.2f}, rms {size:.4f}"
        )


def main() -> None:
    """Train adversary and critic, then compare."""
    torch.set_num_threads(1)
    bench = Bench(load_model("tiny"))
    family, network = bench.family, bench.network
    real, captions = bench.data(BATCH * BATCHES, 11)
    pairs = bench.pairs(real, captions)
    for rate in RATES:
        losses = ", ".join(f"{bench.unseen_loss(pairs, n, rate):.2f} after {n}" for n in UPDATES)
        print(f"heads at rate {rate}: loss on unseen pairs {losses} updates", flush=True)
    heads = bench.adversary(pairs, 200)
    critic = bench.critic(real, captions, 60)
    prompts = bench.data(BATCH, 77)[1]
    condition = family.conditioner.encode_prompts(prompts)
    negative = family.conditioner.encode_prompts([family.conditioner.negative_prompt] * BATCH)
    noise = bench.noise(real[:BATCH])
    with torch.no_grad():
        fake = few_step(partial(network.velocity, condition=condition), noise, LADDER[:1], bench.noise)
        guided = partial(network.guided_velocity, condition=condition, negative=negative, guidance=2.0)
        way = euler(guided, noise, tuple(1 - i / STEPS for i in range(STEPS))) - fake

    def adversarial(t: Tensor) -> Tensor:
        x0 = fake.clone().requires_grad_(True)
        generator_loss(heads(bench.seen(x0, t, bench.noise(x0), condition), t)).backward()
        assert x0.grad is not None
        return -BATCH * x0.grad

    @torch.no_grad()
    def matching(t: Tensor) -> Tensor:
        x_t = add_noise(fake, bench.noise(fake), t)
        teacher = network.x0_guided(x_t, t, condition, negative, 1.5)
        return -dmd_gradient(fake, real=teacher, fake=critic.x0(x_t, t, condition))

    report("adversary", adversarial, way)
    report("distribution matching", matching, way)
    exchanged = bench.exchanged(real, captions)
    for rate in RATES:
        share = bench.prompts_seen(exchanged, SIGHT_UPDATES, rate)
        print(f"heads at rate {rate}: {share:.2f} of unseen prompts told from others' after {SIGHT_UPDATES} updates")


if __name__ == "__main__":
    main()
