"""Real classes at toy size: one factory per family, and bundles of analytic roles with known truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.base import AdapterConfig, DistillAdapter
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Batch, Condition, RawBatch

MEAN, STD = 0.7, 0.4
"""The truth that analytic teachers know: every element is drawn from N(MEAN, STD^2)."""

WORDS = ("a", "green", "red", "seven", "three", "moving", "up", "left", "blurry")


@dataclass(frozen=True)
class Call:
    """One network evaluation, as the network saw it."""

    network: nn.Module
    with_grad: bool
    x_t: Tensor
    t: Tensor
    condition: Condition
    output: Tensor


class SpyAdapter(AnalyticAdapter):
    """The analytic family, remembering every call."""

    def __init__(self, config: AnalyticConfig) -> None:
        super().__init__(config)
        self.calls: list[Call] = []

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = super().velocity(network, x_t, t, condition)
        if output.requires_grad:
            output.retain_grad()
        self.calls.append(Call(network, torch.is_grad_enabled(), x_t, t, condition, output))
        return output

    def of(self, handle: RoleHandle) -> list[Call]:
        """The calls of one role."""
        return [call for call in self.calls if call.network is handle.network]

    def grad_modes(self, handle: RoleHandle) -> str:
        """One letter per call of a role: ``g`` with gradient, ``n`` without."""
        return "".join("g" if call.with_grad else "n" for call in self.of(handle))


def spy(shape: tuple[int, int, int, int] = (1, 1, 4, 4)) -> SpyAdapter:
    """A recording analytic family whose truth is N(MEAN, STD^2)."""
    adapter = SpyAdapter(AnalyticConfig(means=(MEAN,), stds=(STD,), shape=shape))
    adapter.ensure_negative_conditioning()
    return adapter


def gaussian(adapter: AnalyticAdapter, kind: str, mean: float = MEAN, std: float = STD) -> nn.Module:
    """A ``denoiser`` or ``consistency`` network of N(mean, std^2)."""
    config = adapter.config.model_copy(update={"means": (mean,), "stds": (std,)})
    return AnalyticAdapter(config).load_network(kind)


def moments(handle: RoleHandle) -> tuple[float, float]:
    """Mean and standard deviation of a one-component network."""
    return float(handle.network.mean.detach()), float(handle.network.std.detach())


def analytic_batch(
    adapter: AnalyticAdapter, count: int, *, captions: Sequence[str] = (), seed: int = 5, latents: bool = True
) -> Batch:
    """A prepared batch of exact data: N(MEAN + caption, STD^2)."""
    captions = tuple(captions) or ("",) * count
    shift = adapter.encode_prompts(captions).tensors["shift"].view(-1, 1, 1, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    x0 = MEAN + shift + STD * torch.randn((count, *adapter.latent_shape), generator=generator)
    return adapter.prepare(RawBatch(captions, x0 if latents else None))


def train(
    method: DistillMethod[Any],
    batches: Callable[[int], Batch],
    steps: int,
    rates: Mapping[str, float],
    *,
    final_rate: float = 0.0,
) -> None:
    """A plain training loop: Adam with the given rates, decayed linearly to ``final_rate`` of them."""
    for role, rate in rates.items():
        handle = method.bundle[role]
        handle.optimizer = torch.optim.Adam(handle.parameters(), lr=rate, betas=(0.0, 0.999))
        handle.lr_scheduler = torch.optim.lr_scheduler.LinearLR(handle.optimizer, 1.0, final_rate, steps)
    for step in range(steps):
        for loss in method.losses(batches(step), step):
            loss.value.backward()
        for role in method.active_roles(step):
            method.bundle[role].step()


# ---------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What the adapter contract needs of one family."""

    make: Callable[[Path], DistillAdapter[Any]]
    """The adapter over tiny weights under the given folder."""
    prompts: tuple[str, str]
    """Two different prompts that it understands."""
    saved: Callable[[DistillAdapter[Any], Path], AdapterConfig] | None = None
    """The config that reads back what ``save_pipeline`` wrote; ``None`` for a family without a folder format."""


def analytic_family(folder: Path) -> AnalyticAdapter:
    """A mixture of two components over a non-square latent."""
    return AnalyticAdapter(AnalyticConfig(means=(-1.0, 1.0), stds=(0.3, 0.5), weights=(1, 2), shape=(2, 3, 4, 6)))


def wan_family(folder: Path) -> DistillAdapter[Any]:
    """A Wan pipeline with random weights: latents [4, 2, 2, 4], so no two dimensions can be confused."""
    from fastvideo.distillation.adapters.wan import WanAdapter

    return WanAdapter(wan_config(wan_folder(folder)))


def wan_config(folder: Path, **options: Any) -> Any:
    """16 x 32 pixels, 5 frames, prompts of up to 8 tokens."""
    from fastvideo.distillation.adapters.wan import WanConfig

    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    return WanConfig(path=str(folder), **{**size, **options})


def wan_folder(root: Path, latent_std: Sequence[float] = (0.5, 2.0, 1.5, 0.8)) -> Path:
    """A complete diffusers Wan pipeline of about 30 thousand parameters, built once under ``root``."""
    folder = root / "wan"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _wan_pipeline(latent_std).save_pretrained(folder)
    return folder


def _wan_pipeline(latent_std: Sequence[float]) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    channels = len(latent_std)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, in_channels=channels,
        out_channels=channels, text_dim=16, freq_dim=16, patch_size=(1, 2, 2), cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(channels)], latents_std=list(latent_std),
    )  # fmt: skip
    return WanPipeline(
        tokenizer=_word_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS) + 3, **sizes)).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


FAMILIES = {
    "analytic": Family(analytic_family, ("0.5", "-1")),
    "wan": Family(
        wan_family,
        ("a green seven moving up", "red three"),
        lambda adapter, folder: adapter.config.model_copy(update={"path": str(folder)}),
    ),
}


# ---------------------------------------------------------------------------------------------------- methods


LADDER = Ladder((1.0, 0.9, 0.75, 0.5))


@dataclass(frozen=True)
class Toy:
    """The toy config of one method, and which exact network its student has."""

    config: Mapping[str, Any]
    student: str = "denoiser"
    sampler: Ladder = LADDER
    """A ladder on which its sampler is exact for the exact student."""


TOYS = {
    "dmd2": Toy({"teacher_guidance": 1.0, "generator_update_interval": 2}, student="consistency"),
    "sft": Toy({"time_shift": 1.0, "caption_dropout": 0.5}, sampler=Ladder.uniform(400)),
}


def toy_bundle(
    method: type[DistillMethod[Any]], adapter: AnalyticAdapter, student: str, mean: float = MEAN, std: float = STD
) -> ModelBundle:
    """Every role that a method asks for: the truth, except that trainable ones start at N(mean, std^2)."""
    handles = []
    for role in (*method.trainable_roles, *method.frozen_roles):
        trained = role in method.trainable_roles
        kind = student if role == "student" else "denoiser"
        start = (mean, std) if trained else (MEAN, STD)
        handles.append(RoleHandle(role, adapter, gaussian(adapter, kind, *start), trainable=trained))
    return ModelBundle(handles)


def toy_method(
    name: str,
    adapter: AnalyticAdapter,
    *,
    mean: float = MEAN,
    std: float = STD,
    rng: RandomStreams | None = None,
    **options: Any,
) -> DistillMethod[Any]:
    """A registered method on analytic roles."""
    from fastvideo.distillation.builder import load_method

    cls, toy = load_method(name), TOYS.get(name, Toy({}))
    config = cls.Config(**{**toy.config, **options})
    return cls(config, toy_bundle(cls, adapter, toy.student, mean, std), LADDER, rng or RandomStreams(3))
