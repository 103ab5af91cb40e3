"""Parts of tiny pipelines: a tokenizer, text encoders, an autoencoder of images."""

from __future__ import annotations

from typing import Any

WORDS = ("a", "green", "red", "seven", "three", "moving", "up", "left", "blurry")
"""Vocabulary of the tiny text encoders."""
LENGTH = 8
"""Tokens of a prompt."""
CHAT = """{% for one in messages %}{% set said = one['content'] %}
{{ said if said is string else said[0]['text'] }} {% endfor %}"""
"""Template of a chat: all that is said, as texts or in parts."""


def word_tokenizer(length: int = LENGTH) -> Any:
    """A tokenizer of :data:`WORDS`, with an end and no start, that pads to ``length``. A chat is all that is said."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length,
        chat_template=CHAT,
    )  # fmt: skip


def clip(projected: bool, length: int = LENGTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=length, projection_dim=32, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder(scale: float, shift: float | None = None, levels: int = 2) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip


def qwen25_vl(heads: int = 2, layers: int = 2) -> Any:
    """Qwen2.5-VL with heads of 8 channels, and its eyes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        "hidden_size": 8 * heads, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 2, "vocab_size": 64, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 8 * heads,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3(*, lm_head: bool, layers: int = 3) -> Any:
    """Qwen3 of hidden size 16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return (Qwen3ForCausalLM if lm_head else Qwen3Model)(config)


def t5(width: int = 32, vocabulary: int = len(WORDS) + 3) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def qwen3_vl() -> Any:
    """Qwen3-VL of hidden size 16, with its eyes."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, **special))


def mistral3(layers: int = 30) -> Any:
    """Mistral 3 of hidden size 16, with its eyes."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=60)
    return Mistral3ForConditionalGeneration(config)


def gemma3(layers: int = 2) -> Any:
    """Gemma 3 of hidden size 16, with its eyes."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "sliding_window": 16, "query_pre_attn_scalar": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    special = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    return Gemma3ForConditionalGeneration(config)
