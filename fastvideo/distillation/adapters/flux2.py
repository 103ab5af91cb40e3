"""FLUX.2 klein over diffusers: ``Flux2Transformer2DModel``, ``AutoencoderKLFlux2``, Qwen3.

The network is rectified flow natively. Its latents are 2 x 2 patches of the autoencoder's, normalised by the running
statistics of a batch norm. The text is three of the encoder's layers side by side, padding encoded like words. The
shift of a teacher's schedule depends on the size of the picture and on the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, image_grid, text_line
from fastvideo.distillation.adapters.diffusers.flow_config import FlowImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import FlowTexts
from fastvideo.distillation.adapters.diffusers.image_codec import PatchifiedCodec
from fastvideo.distillation.adapters.diffusers.packing import Packing, Patches
from fastvideo.distillation.adapters.diffusers.pipeline import PipelineSpec

AXES = 4
"""Axes of positions: time, row, column, place in the text."""


class Flux2Config(FlowImageConfig):
    """Options of the FLUX.2 klein family."""

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    stock: ClassVar[StockCall] = StockCall(negative=False)
    packing: ClassVar[Packing] = Patches(1)
    path: str
    """A diffusers FLUX.2 klein pipeline: a folder, or a hub id such as `black-forest-labs/FLUX.2-klein-base-4B`."""


class Flux2Conditioner(FlowTexts[Flux2Config]):
    """Three layers of Qwen3 for the tokens of the chat template."""

    def clean_prompt(self, prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        return str(self.tokenizers["tokenizer"].apply_chat_template(chat, tokenize=False, **options))


class Flux2Adapter(FlowAdapter[Flux2Config]):
    """The FLUX.2 klein family."""

    Config = Flux2Config
    summary = "FLUX.2 klein, stills from text: rectified flow, three layers of Qwen3"
    time_projection = ("time_guidance_embed.time_proj", 1000.0)
    token_output = 1
    _codec, _texts = PatchifiedCodec, Flux2Conditioner
    _spec = PipelineSpec(
        network="Flux2Transformer2DModel",
        vae="AutoencoderKLFlux2",
        text_encoder="Qwen3ForCausalLM",
        time_embedding="time_guidance_embed.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=4.0,
    )

    @staticmethod
    def mu(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """The authors' fit, which also depends on the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))

    def network_call(
        self, network: nn.Module, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        grid = image_grid(shape[3], shape[4], AXES, x.device)
        line = text_line(own[TEXT].shape[1], AXES, x.device)
        given = {"encoder_hidden_states": own[TEXT], "img_ids": grid, "txt_ids": line}
        return network(x, timestep=time, **given, return_dict=False)[0]  # type: ignore[no-any-return]
