"""Families whose network is a ``UNet2DConditionModel`` on a variance-preserving table: Stable Diffusion and SDXL.

A still is a video of one frame. The network predicts noise or ``v`` (the checkpoint's scheduler says which) for a
sample of unit variance; :class:`~fastvideo.distillation.adapters.diffusers.discrete_vp.NoiseGrid` converts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid, noise_grid
from fastvideo.distillation.adapters.diffusers.image_codec import ImageCodec
from fastvideo.distillation.adapters.diffusers.pipeline import ConfigT
from fastvideo.distillation.adapters.diffusers.pipeline_texts import PipelineTexts
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.adapters.diffusers.stills import (
    ImageConfig,
    TextsFolder,
    UnsplitScaling,
    check_whole_sample,
)
from fastvideo.distillation.types import Condition, UserError
from fastvideo.ranges import Tokens

SCHEDULER = "DDIMScheduler"
"""Class that reads the checkpoint's noise levels, and takes the same timesteps as its own scheduler."""
SAID_BY_FILES = {"v_pred": 'prediction_type="v_prediction"', "ztsnr": "rescale_betas_zero_snr=True"}
"""Empty tensors of a whole checkpoint that say how its network was trained, and the scheduler's option for it."""


class UNetConfig(ImageConfig):
    """Options of a family with a UNet."""

    max_sequence_length: Tokens = 77
    """Tokens that a prompt may have, start and end included: the length to which its tokenizers pad."""


class UNetTexts(PipelineTexts[ConfigT]):
    """Texts that a UNet's cross-attention reads."""

    @property
    def text_width(self) -> int:
        return int(self.pipeline.network_config()["cross_attention_dim"])


class UNetFolder(TextsFolder[ConfigT]):
    """A pipeline with a UNet."""

    @property
    def grid(self) -> NoiseGrid:
        """The noise levels that the network was trained on."""
        return noise_grid(self.pipeline.source, SCHEDULER)

    @property
    def noisiest(self) -> float:
        return self.grid.noisiest

    @cached_property
    def trained_side(self) -> int:  # type: ignore[override]
        vae = self.pipeline.vae_config
        return int(self.pipeline.network_config()["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))

    def teacher_times(self, steps: int) -> tuple[float, ...]:
        """The times of the timesteps that the checkpoint's spacing gives for so many steps."""
        return self.grid.times_of(self.grid.teacher_timesteps(steps))

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The UNet.

        Raises:
            UserError: for one that reads an image beside the noise (inpainting, editing).
        """
        taken, latents = self.pipeline.network_config(path)["in_channels"], self.pipeline.vae_config["latent_channels"]
        if taken != latents:
            raise UserError(
                f"the unet of {path or self.pipeline.source!r} takes {taken} channels, its latents have {latents}: "
                f"text-to-image checkpoints are read, none for inpainting or editing"
            )
        return super().load_network(path, dtype)

    def _stored(self, path: str) -> Mapping[str, Tensor]:
        """Tensors of a single file, without those that only say how its network was trained.

        Raises:
            UserError: for a file that names another prediction, or other noise levels, than the model's scheduler.
        """
        tensors, grid = super()._stored(path), self.grid
        fits = {"v_pred": grid.prediction == "v_prediction", "ztsnr": grid.noisiest == 1.0}
        said = [name for name in fits if name in tensors]
        if not all(fits[name] for name in said):
            options = ", ".join(SAID_BY_FILES[name] for name in said)
            raise UserError(
                f"{path} holds {' and '.join(said)}, so its network is one of {options}, and the scheduler of "
                f"{self.pipeline.source!r} is not: make a folder of the file with diffusers, which takes that from you "
                f"(pipe = ...Pipeline.from_single_file(FILE), pipe.scheduler.register_to_config({options}), "
                f"pipe.save_pretrained(FOLDER)), and give it as model.path"
            )
        return {name: tensor for name, tensor in tensors.items() if name not in fits}

    @property
    def head_width(self) -> int:
        """Of the first level with attention; diffusers calls the number of heads ``attention_head_dim`` here."""
        config = self.pipeline.network_config()
        heads, widths = config["attention_head_dim"], config["block_out_channels"]
        return int(widths[-1] // (heads[-1] if isinstance(heads, Sequence) else heads))


class UNetAdapter(DiffusersAdapter[ConfigT]):
    """A family with a UNet."""

    @cached_property
    def codec(self) -> ImageCodec:
        return ImageCodec(self._pipeline)

    @cached_property
    def folder(self) -> UNetFolder[ConfigT]:
        return UNetFolder(self._pipeline)

    @cached_property
    def scaling(self) -> UnsplitScaling:
        return UnsplitScaling(self._pipeline)

    @cached_property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels after each block on the way down; its tokens are the pixels of its map."""
        return tuple(self._pipeline.network_config()["block_out_channels"])

    @classmethod
    def network_time(cls, t: Tensor, config: ConfigT) -> Tensor:
        return noise_grid(resolve_pipeline(config.path, config.pipelines), SCHEDULER).timestep(t)

    def _added(self, own: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor] | None:
        """Conditions that the network adds to its time embedding, for latents ``x`` ``[B, C, 1, h, w]``."""
        return None

    def velocity(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, r: Tensor | None = None
    ) -> Tensor:
        check_whole_sample(type(self).__name__, t)
        grid, own = self.folder.grid, condition.of(self.conditioner.key)
        x = self._input(network, grid.network_input(x_t, t))
        with self._autocast(network, x_t), self._reading(network, None if r is None else t - r):
            (predicted,) = network(
                x.squeeze(2),
                grid.timestep(t),
                encoder_hidden_states=self._input(network, own[TEXT]),
                added_cond_kwargs=self._added(own, x),
                return_dict=False,
            )
        return grid.flow_velocity(x_t, x, t, predicted.float().unsqueeze(2))
