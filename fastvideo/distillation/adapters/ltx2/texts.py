"""LTX-2's texts: all layers of Gemma, through the pipeline's connectors, once for the video and once for its sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import TEXT
from fastvideo.distillation.adapters.diffusers.encoder_settings import weights_hash
from fastvideo.distillation.adapters.diffusers.flow_texts import FlowTexts
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline, library_class, load_config
from fastvideo.distillation.adapters.ltx2.config import LTX2Config
from fastvideo.distillation.types import UserError

AUDIO_TEXT = "audio_prompt_embeds"
"""Name in a condition of the text for the sound."""
CONNECTORS = "connectors"


def _class() -> Any:
    """The connectors' class in diffusers."""
    return library_class("diffusers.pipelines.ltx2", "LTX2TextConnectors")


def _config_of(pipeline: Pipeline[LTX2Config]) -> Mapping[str, Any]:
    return load_config(_class(), pipeline.source, CONNECTORS)


def connectors_of(pipeline: Pipeline[LTX2Config]) -> Any:
    """The pipeline's connectors, with weights as they are made."""
    return _class().from_config(_config_of(pipeline))


class LTX2Texts(FlowTexts[LTX2Config]):
    """Rows for the video, then as many for the sound. Connectors put registers where padding was: every row counts."""

    @property
    def text_rows(self) -> int:
        return 2 * self.token_rows

    @cached_property
    def _connectors(self) -> Mapping[str, Any]:
        return _config_of(self.pipeline)

    @property
    def widths(self) -> list[int]:
        """Channels of the texts for the video and for the sound."""
        names = ("connector_num_attention_heads", "connector_attention_head_dim")
        sizes = [[self._connectors[f"{part}_{name}"] for name in names] for part in ("video", "audio")]
        return [heads * channels for heads, channels in sizes]

    @property
    def text_width(self) -> int:
        return max(self.widths)

    @cached_property
    def text_encoder(self) -> nn.ModuleDict:
        """Gemma and the connectors, which have its dtype."""
        found = super().text_encoder
        dtype = next(found["text_encoder"].parameters()).dtype
        found[CONNECTORS] = self.pipeline.frozen(_class(), CONNECTORS, torch_dtype=dtype)
        return found

    @property
    def text_settings(self) -> Mapping[str, Any]:
        return {**super().text_settings, CONNECTORS: weights_hash(Path(self.pipeline.source) / CONNECTORS)}

    def clean_prompt(self, prompt: str) -> str:
        return prompt.strip()

    def _encoded(self, stock: Any, prompts: list[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        self._check_registers()
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.config.max_sequence_length}
        layers, mask, *_ = stock.encode_prompt(prompts, device=self.device, **options)
        video, audio, _ = stock.connectors(layers, mask, padding_side=stock.tokenizer.padding_side)
        wide = [nn.functional.pad(one, (0, self.text_width - one.shape[-1])) for one in (video, audio)]
        return torch.cat(wide, dim=1).unbind(), ()

    def _check_registers(self) -> None:
        """Padding is filled with whole sets of registers."""
        length = self.config.max_sequence_length
        for part in ("video", "audio"):
            registers = self._connectors[f"{part}_connector_num_learnable_registers"]
            if not registers:
                raise UserError(
                    f"model.path: {self.pipeline.source}: the {part} connector has no registers "
                    f"({part}_connector_num_learnable_registers in {CONNECTORS}/config.json), and the network would "
                    f"read the padding of prompts: LTX-2.0 and LTX-2.3 have 128"
                )
            if length % registers:
                below = max(length // registers, 1) * registers
                raise UserError(
                    f"model.max_sequence_length must be a multiple of the connectors' {registers} registers, such as "
                    f"{below} or {below + registers}, got {length}"
                )

    def _tensors(self, texts: Tensor) -> dict[str, Tensor]:
        length, (video, audio) = self.token_rows, self.widths
        return {TEXT: texts[:, :length, :video], AUDIO_TEXT: texts[:, length:, :audio]}
