"""HunyuanVideo 1.5 over diffusers: ``HunyuanVideo15Transformer3DModel``, ``AutoencoderKLHunyuanVideo15``, Qwen2.5-VL.

The network is rectified flow natively; its time counts to 1000. Beside the latents it has places for given frames that
stay empty, and it gets no tokens of an image: by the whole batch it tells videos of images from others. Words between
quotation marks are read by a second encoder, of letters (ByT5). Both texts are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT, count_tokens
from fastvideo.distillation.adapters.diffusers.flow import FlowAdapter, FlowFolder, Mu, parameters_of
from fastvideo.distillation.adapters.diffusers.flow_config import StockCall, guiding
from fastvideo.distillation.adapters.diffusers.flow_texts import MASK, FlowTexts, count_written
from fastvideo.distillation.adapters.diffusers.packing import Packing
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, PipelineSpec, full_config, library_class
from fastvideo.distillation.adapters.diffusers.videos import FlowVideoConfig, ScaledVideoCodec, Volumes
from fastvideo.distillation.noise import GuidanceValue
from fastvideo.distillation.types import UserError
from fastvideo.ranges import Frames, Pixels, Tokens

GLYPHS, GLYPH_MASK = "glyph_embeds", "glyph_mask"
"""Names of the quoted text in a condition, and of its mask."""
LETTERS = 256
"""Tokens of the quoted text."""
UNUSED = ("attn.add_q_proj", "attn.to_add_out", "attn.norm_added_q", "ff_context")
"""Layers of the last block that make its text tokens, which nothing reads."""
GUIDER = "ClassifierFreeGuidance"
PLAIN = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
"""Options of a guider that does what guidance does here."""


class Hunyuan15Config(FlowVideoConfig):
    """Options of the HunyuanVideo 1.5 family."""

    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Pipeline",)
    packing: ClassVar[Packing] = Volumes(1)
    stock: ClassVar[StockCall] = StockCall(
        guidance=None, packed=True, images=False, sizes=("height", "width", "num_frames")
    )
    path: str
    """A diffusers HunyuanVideo 1.5 pipeline for videos from text: a folder, or a hub id."""
    height: Pixels = 480
    """Video height in pixels."""
    width: Pixels = 848
    """Video width in pixels."""
    num_frames: Frames = 121
    """Video frames; one more than a multiple of 4."""
    max_sequence_length: Tokens = 1000
    """Tokens that a prompt may have."""


class Hunyuan15Codec(ScaledVideoCodec):
    """``AutoencoderKLHunyuanVideo15``, called for each video alone, as its attention fits no batch, and in tiles of 256
    pixels on a side: whole, 121 frames of 480 x 848 take 140 GiB."""

    def ready(self, vae: Any) -> Any:
        vae.enable_slicing()
        vae.enable_tiling()
        return vae


class Hunyuan15Conditioner(FlowTexts[Hunyuan15Config]):
    """Qwen2.5-VL's tokens behind the template's head, and ByT5's of quoted text, both masked."""

    encodes_padding = False
    width_field = "text_embed_dim"

    @property
    def text_rows(self) -> int:
        return self.token_rows + LETTERS

    @property
    def stock_needs(self) -> Mapping[str, Any]:
        vae = library_class("diffusers", self.pipeline.spec.vae)
        with torch.device("meta"):
            return {"vae": vae.from_config(dict(self.pipeline.vae_config))}

    def clean_prompt(self, prompt: str) -> str:
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

        (chat,) = format_text_input([prompt], self._stock.system_message)
        written = self.tokenizers["tokenizer"].apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return str(written)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        dropped: int = self._stock.prompt_template_encode_start_idx
        texts = [self.clean_prompt(prompt) for prompt in prompts]
        return [count - dropped for count in count_written(self.tokenizers["tokenizer"], texts)]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

        super().check_prompts(prompts)
        quoted = {text: prompt for prompt in prompts if (text := extract_glyph_texts(prompt))}
        counts = count_tokens(self.tokenizers["tokenizer_2"], list(quoted)) if quoted else []
        for text, count in zip(quoted, counts, strict=True):
            if count > LETTERS:
                raise UserError(
                    f"prompt has {count} tokens between quotation marks, tokenizer_2 takes {LETTERS}: "
                    f"{quoted[text][:80]!r}"
                )

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        stock.tokenizer_max_length = self.config.max_sequence_length
        texts, mask, glyphs, quoted = stock.encode_prompt(prompts, self.device, batch_size=len(prompts))
        rows = []
        for text, used, letters, read in zip(texts, mask.bool(), glyphs, quoted.bool(), strict=True):
            below = nn.functional.pad(letters[read], (0, self.text_width - letters.shape[1]))
            missing = self.token_rows - int(used.sum()) if len(below) else 0
            rows.append(torch.cat([nn.functional.pad(text[used], (0, 0, 0, missing)), below]))
        return rows, ()

    def _tensors(self, texts: Tensor) -> dict[str, Tensor]:
        glyphs = texts[:, self.token_rows :, : self.pipeline.network_config()["text_embed_2_dim"]]
        return {**super()._tensors(texts), GLYPHS: glyphs, GLYPH_MASK: glyphs.ne(0).any(-1)}


class Hunyuan15Folder(FlowFolder[Hunyuan15Config]):
    """A HunyuanVideo 1.5 pipeline, whose guider says what guidance it was made for: 1 where it is distilled."""

    def __init__(self, pipeline: Pipeline[Hunyuan15Config], tokens: int, mu: Mu) -> None:
        super().__init__(pipeline, tokens, mu)
        kind = pipeline.index["guider"][1]
        guider = full_config(GUIDER, pipeline.source, "guider") if kind == GUIDER else {}
        odd = [f"{name} {guider[name]}" for name, plain in PLAIN.items() if guider and guider[name] != plain]
        if odd or not guider:
            found = f"{kind} ({', '.join(odd)})" if odd else kind
            raise UserError(f"the guider of {pipeline.config.path} is {found}: plain {GUIDER} is known")
        self.published_guidance = float(guider["guidance_scale"]) if guider["enabled"] else 1.0
        self.distilled = self.published_guidance == 1.0

    def check_guidance(self, guidance: GuidanceValue) -> None:
        if self.distilled and (wanted := guiding(guidance)):
            raise UserError(
                f"guidance {wanted}: {self.config.path} is distilled (guidance 1 in its guider) and "
                f"sampled without it, 1; take a checkpoint with guidance as the teacher"
            )

    def _parts(self, path: str | None) -> tuple[str, ...]:
        if self.pipeline.network_config(path)["use_meanflow"]:
            raise UserError(
                f"use_meanflow of the transformer in {path or self.config.path}: its second time is not read"
            )
        return super()._parts(path)

    def dead_parameters(self, network: Any) -> frozenset[str]:
        last = f"transformer_blocks.{len(network.transformer_blocks) - 1}"
        return parameters_of(network, ("image_embedder", *(f"{last}.{layer}" for layer in UNUSED)))


class Hunyuan15Adapter(FlowAdapter[Hunyuan15Config]):
    """The HunyuanVideo 1.5 family."""

    Config = Hunyuan15Config
    summary = "HunyuanVideo 1.5, videos from text: rectified flow, Qwen2.5-VL text, ByT5 for quoted text"
    supports = FlowAdapter.supports | {"frames"}
    time_units = 1000.0
    time_projection = ("time_embed.time_proj", 1000.0)
    _codec, _texts, _folder = Hunyuan15Codec, Hunyuan15Conditioner, Hunyuan15Folder
    _spec = PipelineSpec(
        network="HunyuanVideo15Transformer3DModel",
        vae="AutoencoderKLHunyuanVideo15",
        text_encoder="Qwen2_5_VLTextModel",
        time_embedding="time_embed.timestep_embedder",
        blocks="transformer_blocks",
        published_guidance=6.0,
    )

    def network_call(
        self, network: Any, x: Tensor, time: Tensor, own: Mapping[str, Tensor], shape: Sequence[int]
    ) -> Tensor:
        batch, channels, *sizes = shape
        given = x.new_zeros(batch, channels + 1, *sizes)
        return network(  # type: ignore[no-any-return]
            torch.cat([x, given], dim=1),
            self._input(network, time),
            own[TEXT],
            own[MASK],
            encoder_hidden_states_2=self._input(network, own[GLYPHS]),
            encoder_attention_mask_2=own[GLYPH_MASK],
            image_embeds=x.new_zeros(batch, 0, network.config.image_embed_dim),
            return_dict=False,
        )[0]
