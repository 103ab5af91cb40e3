"""What families over a diffusers pipeline have in common: its parts, its prompts, its folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers_scaling import DiffusersScaling
from fastvideo.distillation.adapters.flow_map import add_head, load_head, reading
from fastvideo.distillation.adapters.kernels import choose_attention, compile_blocks
from fastvideo.distillation.adapters.loading import (
    PromptCache,
    component_hash,
    full_config,
    load_component,
    read_recipe,
    resolve_pipeline,
    write_pipeline,
)
from fastvideo.distillation.adapters.taps import Tokens
from fastvideo.distillation.config.base import AdapterConfig
from fastvideo.distillation.types import Condition, UserError


class PipelineConfig(AdapterConfig):
    """Options of every family over a diffusers pipeline."""

    height: PositiveInt = 32
    """Video height in pixels."""
    width: PositiveInt = 32
    """Video width in pixels."""
    num_frames: PositiveInt = 9
    """Video frames."""
    max_sequence_length: PositiveInt = 16
    """Tokens that a prompt may have."""
    prompt_for_negative: str = ""
    """The negative prompt, used wherever guidance is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the network's forward; weights, times, losses and differences stay float32."""
    attention_backend: str = "native"
    """Attention kernel, by its name in diffusers' dispatcher: `native` is torch's own, `flash` or `sage` need a
    package. It is printed at the start and never replaced by another."""
    compile_blocks: bool = False
    """Compile the network's repeated blocks (torch.compile): the first steps take a minute, the others less time."""
    prompt_cache: PositiveInt = 1024
    """Distinct prompts whose embeddings are kept, least recently used first out."""


def check_divisible(config: PipelineConfig, side: int, frames: int) -> None:
    """Check that sides are multiples of ``side`` and frames one more than a multiple of ``frames``.

    Raises:
        ValueError: for the first that is not, as pydantic's validators want it.
    """
    for name, size in (("height", config.height), ("width", config.width)):
        if size % side:
            raise ValueError(f"{name} must be a multiple of {side} (VAE factor {side // 2}, patch 2), got {size}")
    if config.num_frames % frames != 1:
        raise ValueError(f"num_frames must be one more than a multiple of {frames}, got {config.num_frames}")


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


class PipelineAdapter(DistillAdapter[ConfigT]):
    """A family whose weights are a diffusers pipeline folder; heavy parts are loaded on first use."""

    transformer_class: ClassVar[str]
    """Class of the denoising network, in diffusers."""
    vae_class: ClassVar[str]
    """Class of the video autoencoder, in diffusers."""
    text_encoder_class: ClassVar[str]
    """Class of the text encoder, in transformers."""
    time_embedding: ClassVar[str]
    """Module of the denoising network whose output is the time embedding: where a flow map's second time goes in."""
    supports = frozenset({"features", "flow_map", "jvp"})

    def __init__(self, config: ConfigT, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self.source = resolve_pipeline(config.path, self.pipelines)
        self._prompts = PromptCache(self._encode_text, config.prompt_cache)

    @property
    def text_length(self) -> int | None:
        return self.config.max_sequence_length

    @property
    def negative_prompt(self) -> str:
        return self.config.prompt_for_negative

    @cached_property
    def tokenizer(self) -> Any:
        """The pipeline's tokenizer."""
        return load_component(_class("transformers", "AutoTokenizer"), self.source, "tokenizer")

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The frozen text encoder, float32."""
        encoder = _class("transformers", self.text_encoder_class)
        return self._frozen(load_component(encoder, self.source, "text_encoder", dtype=torch.float32))

    @cached_property
    def vae(self) -> Any:
        """The frozen video autoencoder, float32."""
        autoencoder = _class("diffusers", self.vae_class)
        return self._frozen(load_component(autoencoder, self.source, "vae", torch_dtype=torch.float32))

    def _frozen(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _vae_config(self) -> Mapping[str, Any]:
        return full_config(_class("diffusers", self.vae_class), self.source, "vae")

    @cached_property
    def _network_config(self) -> Mapping[str, Any]:
        return full_config(_class("diffusers", self.transformer_class), self.source, "transformer")

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Heads times head width, for every layer: how diffusers' transformers name it."""
        config = self._network_config
        return (int(config["num_attention_heads"]) * int(config["attention_head_dim"]),) * int(config["num_layers"])

    def load_network(self, path: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The transformer in eval mode (published ones have no dropout), with a flow map's head."""
        source = self._resolved(path)
        transformer = _class("diffusers", self.transformer_class)
        network = load_component(transformer, source, "transformer", torch_dtype=dtype)
        self._set_kernels(network)
        load_head(network, self.time_embedding, Path(source))
        return network.to(self.device).eval()  # type: ignore[no-any-return]

    def joined(self, network: nn.Module, tokens: Tokens) -> Tokens:
        return self.scaling.join_tokens(network, tokens)

    def _set_kernels(self, network: nn.Module) -> None:
        choose_attention(network, self.config.attention_backend)
        if self.config.compile_blocks:
            compile_blocks(network)

    def _resolved(self, path: str | None) -> str:
        return self.source if path is None else resolve_pipeline(path, self.pipelines)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    @cached_property
    def scaling(self) -> DiffusersScaling:
        return DiffusersScaling(self.transformer_class, self.time_embedding, self._resolved, self._set_kernels)

    def add_flow_map(self, network: nn.Module) -> None:
        add_head(network, self.time_embedding)

    def _reading(self, network: nn.Module, span: Tensor | None) -> AbstractContextManager[None]:
        """Calls inside read ``span`` = ``t - r`` beside their times."""
        return reading(network, self.time_embedding, span)

    def _autocast(self, x_t: Tensor) -> torch.autocast:
        """Autocast as configured, but for a derivative: bfloat16 would leave mostly noise of it (arXiv 2410.11081)."""
        derived = unpack_dual(x_t).tangent is not None  # type: ignore[no-untyped-call]
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16" and not derived
        )

    @property
    def kernels(self) -> str:
        blocks = "compiled" if self.config.compile_blocks else "eager"
        return f"attention {self.config.attention_backend}, blocks {blocks}, {self.config.precision}"

    @classmethod
    def comfy_layer(cls, layer: str) -> str:
        """ComfyUI's name of a layer of the network; a ``UserError`` where it has none."""
        raise UserError(f"{cls.__name__}: ComfyUI has names of its own for Wan's layers alone")

    def clean_prompt(self, prompt: str) -> str:
        """What the family's pipeline makes of a prompt before it is tokenized."""
        return prompt

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            count = len(self.tokenizer(self.clean_prompt(prompt), truncation=False, verbose=False).input_ids)
            if count > self.config.max_sequence_length:
                raise UserError(
                    f"prompt has {count} tokens, the text encoder takes {self.config.max_sequence_length} "
                    f"(model.max_sequence_length): {prompt[:80]!r}"
                )

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds`` ``[B, max_sequence_length, D]``; padding is what the family's own pipeline makes of it."""
        self.check_prompts(self._prompts.missing(prompts))
        return Condition({"prompt_embeds": self._prompts(prompts, self.device)})

    def _tokens(self, prompt: str) -> Any:
        """Ids and mask ``[1, max_sequence_length]`` of one prompt, on the device."""
        length = self.config.max_sequence_length
        text = [self.clean_prompt(prompt)]
        return self.tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").to(self.device)

    @abstractmethod
    def _encode_text(self, prompt: str) -> Tensor:
        """Embedding ``[max_sequence_length, D]`` of one prompt."""

    def encode_extras(self, videos: Tensor, captions: Sequence[str]) -> Mapping[str, Tensor]:
        return {"text_embedding": self.encode_prompts(captions).tensors["prompt_embeds"]}

    @cached_property
    def codec_key(self) -> str:
        """SHA-256 of the VAE's config and weights."""
        return component_hash(self._vae_config, self.vae)

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """The posterior's mean, normalised."""
        return self.normalise(self.vae.encode(videos.to(self.device)).latent_dist.mode())

    @property
    def source_recipe(self) -> Mapping[str, Any]:
        return read_recipe(self.source)

    def save_pipeline(self, folder: Path, network: nn.Module, recipe: Mapping[str, Any]) -> None:
        """A folder that the pipeline's ``from_pretrained`` loads; everything but the transformer is copied."""
        write_pipeline(self.source, folder, network, recipe)


def _class(library: str, name: str) -> Any:
    """A class of a library that takes seconds to import, so only when it is needed."""
    return getattr(import_module(library), name)
