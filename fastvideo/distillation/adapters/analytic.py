"""Distributions whose velocity is known exactly: the family that proves algorithms.

Every element of a sample is drawn independently from one Gaussian mixture; ``caption`` is a number that shifts its
means (the empty caption shifts by 0), so guidance has a closed form too. Formulas: rectified flow, ``alpha = 1 - t``,
``sigma = t``, ``v_t = alpha^2 s^2 + sigma^2``, ``y = x - alpha mu``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastvideo.distillation.abilities import FolderAbilities
from fastvideo.distillation.adapters.analytic_networks import (
    FrameConsistency,
    FrameDenoiser,
    Frames,
    GaussianConsistency,
    GaussianMeanVelocity,
    MixtureConsistency,
    MixtureDenoiser,
    Seen,
    SiteMLP,
    standardised,
)
from fastvideo.distillation.adapters.base import Codec, Conditioner, DistillAdapter, ModelFolder
from fastvideo.distillation.chunks import Context, Masked, Past, Piece, Span, masked_runs
from fastvideo.distillation.config.sections import AdapterConfig, Level
from fastvideo.distillation.features import Taps, Tokens, check_taps
from fastvideo.distillation.noise import velocity_to_x0
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import Number, PositiveFloat, PositiveInt

WEIGHTS = "network.safetensors"


MOST_NUMBERS = 2**26
"""Most numbers of one sample."""


class AnalyticConfig(AdapterConfig):
    """A Gaussian (one component) or a mixture."""

    level: ClassVar[Level] = "closed form"
    path: str = "denoiser"
    """`denoiser` (the exact velocity), `consistency` (the exact map to the end of the flow), `mean_velocity` (the exact
    flow map; one component only), `mlp` (a small network with random weights, to learn any of them), or a folder that a
    run of this family wrote."""
    means: tuple[Number, ...] = (0.7,)
    """Means of the components."""
    stds: tuple[PositiveFloat, ...] = (0.4,)
    """Standard deviations of the components."""
    weights: tuple[PositiveFloat, ...] = (1.0,)
    """Weights of the components; normalised."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 1, 4, 4)
    """``(C, F, H, W)`` of one sample."""
    correlation: float = Field(default=0.0, gt=-1.0, lt=1.0)
    """Correlation `a` of neighbouring frames, `a^2` of the next ones: AR(1); one component only."""

    pixels: tuple[tuple[Number, ...], ...] = ()
    """Matrix `A` ``[P, C]`` from latent channels to pixel channels: `decode` multiplies with it, `encode` with its
    pseudo-inverse. Families with different ones have different latent spaces; without it latents are pixels."""

    @model_validator(mode="after")
    def _same_length(self) -> AnalyticConfig:
        if self.pixels and any(len(row) != self.shape[0] for row in self.pixels):
            raise ValueError(f"pixels: every row has one number per latent channel ({self.shape[0]})")
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(f"shape: a sample has {math.prod(self.shape)} numbers, up to {MOST_NUMBERS} are expected")
        if self.correlation and len(self.means) > 1:
            raise ValueError(f"correlated frames have one component, not {len(self.means)}")
        if not len(self.means) == len(self.stds) == len(self.weights):
            raise ValueError(f"{len(self.means)} means, {len(self.stds)} stds and {len(self.weights)} weights")
        return self


CLASSES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "denoiser": (MixtureDenoiser, FrameDenoiser),
    "consistency": (GaussianConsistency, MixtureConsistency, FrameConsistency),
    "mean_velocity": (GaussianMeanVelocity,),
    "mlp": (SiteMLP,),
}
"""Classes of each kind of network, for distributions of several shapes."""


def build_network(kind: str, config: AnalyticConfig) -> nn.Module:
    """A network of that kind for the configured distribution.

    Raises:
        UserError: for an unknown kind, or one that the distribution does not have.
    """
    if kind not in CLASSES:
        raise UserError(f"analytic model {kind!r} is unknown; one of {', '.join(CLASSES)}")
    if kind == "mlp":
        return SiteMLP(config.shape[0])
    mean, std, components = config.means[0], config.stds[0], (config.means, config.stds, config.weights)
    if config.correlation and kind != "mean_velocity":
        frames = FrameDenoiser if kind == "denoiser" else FrameConsistency
        return frames(mean, std, config.correlation)
    if kind == "denoiser":
        return MixtureDenoiser(*components)
    if kind == "consistency":
        return GaussianConsistency(mean, std) if len(config.means) == 1 else MixtureConsistency(*components)
    if len(config.means) > 1 or config.correlation:
        raise UserError(f"analytic model {kind!r} needs one component, without correlation between frames")
    return GaussianMeanVelocity(mean, std)


class AnalyticCodec(Codec):
    """The identity, where a video is its own latents, or a linear map of the channels."""

    def __init__(self, config: AnalyticConfig, device: torch.device) -> None:
        self._shape, self._pixels, self.device = config.shape, config.pixels, device

    @property
    def latent_key(self) -> str:
        return f"linear {self._pixels}" if self._pixels else "identity"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._shape

    def _encode(self, videos: Tensor) -> Tensor:
        return _mixed(videos, torch.linalg.pinv(self._matrix(videos))) if self._pixels else videos

    def _decode(self, latents: Tensor) -> Tensor:
        return _mixed(latents, self._matrix(latents)) if self._pixels else latents

    def _matrix(self, like: Tensor) -> Tensor:
        return torch.tensor(self._pixels, dtype=like.dtype, device=like.device)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """Channels of ``[B, C, F, H, W]`` multiplied with a matrix ``[P, C]``."""
    return torch.einsum("pc,bcfhw->bpfhw", matrix, x)


class AnalyticConditioner(Conditioner):
    """Captions are numbers."""

    key = "analytic"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """``shift`` ``[B]``: the caption as a number."""
        try:
            shifts = [float(prompt) if prompt else 0.0 for prompt in prompts]
        except ValueError as error:
            raise UserError(f"a caption of the analytic family is a number that shifts the mean: {error}") from error
        return Condition({self.key: {"shift": torch.tensor(shifts, device=self.device)}})


class AnalyticFolder(ModelFolder, FolderAbilities):
    """Networks of the configured distribution, or a folder with one file."""

    def __init__(self, config: AnalyticConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        return tuple(1 - i / steps for i in range(steps))

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A network of the configured distribution, float32 always.

        Raises:
            UserError: for an unknown kind, or one that the distribution does not have.
        """
        kind, config = path or self.config.path, self.config
        if (Path(kind) / WEIGHTS).is_file():
            return self._read(Path(kind) / WEIGHTS)
        return build_network(kind, config).to(self.device)

    def _read(self, file: Path) -> nn.Module:
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(file, "pt") as opened:
            kind = opened.metadata()["kind"]
        network = build_network(kind, self.config)
        network.load_state_dict(load_file(file))
        return network.to(self.device)

    def add_flow_map(self, network: nn.Module) -> None:
        """Check that the network reads ``r`` already: the learned one does, an exact one cannot be extended.

        Raises:
            UserError: if it does not.
        """
        if not isinstance(network, GaussianMeanVelocity | SiteMLP):
            raise UserError(
                "the analytic family's networks of two times are 'mean_velocity' and 'mlp': give one of them as the "
                "path of the role that needs it"
            )

    def save(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any], *, slim: bool = False) -> None:
        """``network.safetensors`` (read back by :meth:`load_network`) and ``recipe.json``."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        kind = next(kind for kind, classes in CLASSES.items() if isinstance(network, classes))
        save_file(network.state_dict(), folder / WEIGHTS, metadata={"kind": kind})
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


class AnalyticAdapter(DistillAdapter[AnalyticConfig]):
    """Gaussians and mixtures."""

    Config = AnalyticConfig
    summary = "Gaussians and mixtures with exact velocity: the test bed for algorithms"
    supports = frozenset({"features", "flow_map", "jvp", "frame_times", "chunks", "frames"})

    @cached_property
    def codec(self) -> AnalyticCodec:
        return AnalyticCodec(self.config, self.device)

    @cached_property
    def conditioner(self) -> AnalyticConditioner:
        return AnalyticConditioner(self.device)

    @cached_property
    def folder(self) -> AnalyticFolder:
        return AnalyticFolder(self.config, self.device)

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {} if r is None else {"r": r}
        if isinstance(context, Past):
            context.check(x_t)
        if context is None or not isinstance(network, Frames):  # other frames are independent of a past
            return network(x_t, t, self._shift(condition), **options)  # type: ignore[no-any-return]
        if isinstance(context, Past):
            return network(x_t, t, self._shift(condition), _past_seen(context))  # type: ignore[no-any-return]
        return self._masked(network, x_t, t, condition, context)

    def _masked(self, network: Frames, x_t: Tensor, t: Tensor, condition: Condition, context: Masked) -> Tensor:
        """Chunk by chunk, each on the clean or noisy frames that it sees."""
        latents, times = x_t, t
        if context.clean is not None:
            latents, times = context.clean, torch.full_like(t, context.clean_time)
        chunks = []
        for run in masked_runs(x_t.shape[2], context.reach, forced=False):
            own, seen = slice(*run.queries), _masked_seen(latents, times, run.keys[:-1], run.queries[0])
            chunks.append(network(x_t[:, :, own], t[:, own], self._shift(condition), seen))
        return torch.cat(chunks, dim=2)

    def commit(self, network: nn.Module, past: Past, x0: Tensor, condition: Condition, t: float = 0.0) -> Past:
        """Remember a chunk as its latents and their times: what follows from them is computed at each call."""
        past.check(x0)
        return past.add(Piece(past.length, x0, ((x0, x0.new_full((len(x0), x0.shape[2]), t)),)))

    def _shift(self, condition: Condition) -> Tensor:
        return condition.of(self.conditioner.key)["shift"]

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """One tap: a constant, and two numbers per channel and component."""
        return (1 + 2 * self.config.shape[0] * len(self.config.means),)

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, taps: Taps, *, whole: bool = False
    ) -> tuple[Tensor | None, Tokens]:
        """One token per frame and place: ``1``, and ``y`` and ``y^2`` of each channel and component.

        ``y = (x_t - alpha mu) / sqrt(v_t)`` is the sample as the network's components see it. These are the sufficient
        statistics of a Gaussian, so the best discriminator between two of them is linear in the token.
        """
        check_taps(taps, self.feature_widths, type(self).__name__)
        source: Any = network
        mean, std = source.mean.reshape(-1), source.std.reshape(-1)
        y = standardised(x_t, t, self._shift(condition), mean, std).flatten(2, -2)  # [B, C, L, K]
        y = y.transpose(1, 2).flatten(2)
        tokens = torch.cat([torch.ones_like(y[..., :1]), y, y.square()], dim=-1)
        return self.velocity(network, x_t, t, condition) if whole else None, (tokens,) * len(taps)

    def data_of(self, noise: Tensor, condition: Condition) -> Tensor:
        """Exact data: the end of the flow from pure ``noise`` ``[B, C, F, H, W]``; independent if the noise is."""
        t = torch.ones(len(noise), dtype=torch.float32, device=self.device)
        end = build_network("consistency", self.config).to(self.device).requires_grad_(False)
        return velocity_to_x0(noise, end(noise, t, self._shift(condition)), t)


def _past_seen(past: Past) -> Seen | None:
    if not past.pieces:
        return None
    latents = torch.cat([piece.latents for piece in past.pieces], dim=2)
    times = torch.cat([piece.layers[0][1] for piece in past.pieces], dim=1)
    positions = [i for piece in past.pieces for i in range(piece.start, piece.start + piece.frames)]
    return Seen(latents, times, tuple(positions), past.length)


def _masked_seen(latents: Tensor, times: Tensor, spans: Sequence[Span], start: int) -> Seen | None:
    positions = [i for span in spans for i in range(*span)]
    return Seen(latents[:, :, positions], times[:, positions], tuple(positions), start) if positions else None
