"""FLUX.2 klein and dev over diffusers: ``Flux2Transformer2DModel``, ``AutoencoderKLFlux2``, Qwen3 or Mistral 3.

The network is rectified flow natively. Its latents are 2 x 2 patches of the autoencoder's, normalised by the running
statistics of a batch norm. The text is three of the encoder's layers side by side, padding encoded like words. That of
dev also reads a guidance, which is a condition like the text. The shift of a teacher's schedule depends on the size of
the picture and on the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, Mu, image_grid, text_line
from fastvideo.distillation.adapters.diffusers.flow_config import GuidedImageConfig, StockCall
from fastvideo.distillation.adapters.diffusers.flow_texts import GUIDANCE, FlowTexts, count_written, embedded_guidance
from fastvideo.distillation.adapters.diffusers.image_codec import PatchifiedCodec
from fastvideo.distillation.adapters.diffusers.packing import Packing, Patches
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, PipelineSpec

AXES = 4
"""Axes of positions: time, row, column, place in the text."""
KLEIN, DEV = "Flux2KleinPipeline", "Flux2Pipeline"


class Flux2Config(GuidedImageConfig):
    """Options of the FLUX.2 family."""

    pipelines: ClassVar[tuple[str, ...]] = (KLEIN, DEV)
    stock: ClassVar[StockCall] = StockCall(negative=False)
    packing: ClassVar[Packing] = Patches(1)
    authors_guidance: ClassVar[float] = 4.0
    path: str
    """A diffusers FLUX.2 pipeline: a folder, or a hub id such as `black-forest-labs/FLUX.2-klein-base-4B`."""


class Flux2Conditioner(FlowTexts[Flux2Config]):
    """Three layers of Qwen3, or of Mistral 3, for the tokens of the chat template."""

    @property
    def _of_dev(self) -> bool:
        return bool(self.pipeline.index["_class_name"] == DEV)

    def clean_prompt(self, prompt: str) -> str:
        chat: list[Any] = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        if self._of_dev:
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            (chat,), options = format_input([prompt], self._stock.system_message), {}
        return str(self.tokenizers["tokenizer"].apply_chat_template(chat, tokenize=False, **options))

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        if not self._of_dev:
            return super().token_counts(prompts)
        return count_written(self.tokenizers["tokenizer"], [self.clean_prompt(prompt) for prompt in prompts])


class Flux2Folder(FlowFolder[Flux2Config]):
    """A FLUX.2 pipeline, of which one that reads a guidance is sampled without another."""

    def __init__(self, pipeline: Pipeline[Flux2Config], tokens: int, mu: Mu) -> None:
        super().__init__(pipeline, tokens, mu)
        if embedded_guidance(pipeline) is not None:
            self.published_guidance = 1.0


class Flux2Adapter(FlowAdapter[Flux2Config]):
    """The FLUX.2 family."""

    Config = Flux2Config
    summary = "FLUX.2 klein and dev, stills from text: rectified flow, three layers of Qwen3 or Mistral 3"
    time_projection = ("time_guidance_embed.time_proj", 1000.0)
    token_output = 1
    _codec, _texts, _folder = PatchifiedCodec, Flux2Conditioner, Flux2Folder
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
        guidance = own.get(GUIDANCE)
        return network(x, timestep=time, guidance=guidance, **given, return_dict=False)[0]  # type: ignore[no-any-return]
