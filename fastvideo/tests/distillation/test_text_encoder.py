"""A text encoder is loaded whole or refused; its settings tell it from others; prompts are cleaned and counted fast."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvideo.distillation.adapters.diffusers.conditioner import check_whole
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import wan_config, wan_folder

PROMPTS = ("a green seven moving up", "red three")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "pipeline"))


def untie(folder: Path) -> None:
    """Say what published Wan checkpoints say; they store ``shared.weight`` alone."""
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))


def encoded(folder: Path) -> Tensor:
    conditioner = WanFamily(wan_config(folder)).conditioner
    return conditioner.encode_prompts(PROMPTS).of(conditioner.key)["prompt_embeds"]


def test_a_checkpoint_that_says_untied_and_stores_one_table_is_read_as_tied(pipeline: Path) -> None:
    tied = encoded(pipeline)
    untie(pipeline)
    with safe_open(pipeline / "text_encoder" / "model.safetensors", "pt") as stored:
        assert "encoder.embed_tokens.weight" not in stored.keys()  # noqa: SIM118
    assert torch.equal(encoded(pipeline), tied)
    assert not torch.equal(tied[0], tied[1])


@pytest.mark.parametrize("table", [torch.zeros, torch.randn])
def test_an_encoder_whose_table_of_words_was_left_unset_is_refused(pipeline: Path, table: object) -> None:
    """The state in which transformers 5.0 to 5.2 leave such a checkpoint."""
    encoder = WanFamily(wan_config(pipeline)).conditioner.text_encoder
    check_whole(encoder, (), str(pipeline))
    shape = encoder.shared.weight.shape
    encoder.encoder.embed_tokens = nn.Embedding(*shape, _weight=table(*shape))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"without encoder\.embed_tokens\.weight.*5\.0, 5\.1 and 5\.2 are known"):
        check_whole(encoder, (), str(pipeline))


def test_a_table_of_its_own_that_is_in_the_files_is_taken(pipeline: Path) -> None:
    file = pipeline / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    own = torch.randn_like(weights["shared.weight"])
    save_file({**weights, "encoder.embed_tokens.weight": own}, file, {"format": "pt"})
    encoder = WanFamily(wan_config(pipeline)).conditioner.text_encoder
    encoder.encoder.embed_tokens = nn.Embedding(*own.shape, _weight=own)
    check_whole(encoder, (), str(pipeline))


@pytest.mark.parametrize("lost", ["shared.weight", "encoder.final_layer_norm.weight"])
def test_an_encoder_that_lacks_weights_is_refused(pipeline: Path, lost: str) -> None:
    file = pipeline / "text_encoder" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"loaded without .*{lost.split('.')[-2]}"):
        encoded(pipeline)


def test_settings_are_those_of_the_files_and_not_of_their_place(pipeline: Path, whole: Path) -> None:
    settings = WanFamily(wan_config(whole)).conditioner.text_settings
    assert settings == WanFamily(wan_config(pipeline)).conditioner.text_settings
    assert settings["encoder"] == "UMT5EncoderModel"
    assert settings["width"] == 16
    assert all(settings[name] for name in ("encoder_config", "encoder_weights", "tokenizer", "max_sequence_length"))
    file = pipeline / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["shared.weight"][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    changed = WanFamily(wan_config(pipeline, max_sequence_length=7)).conditioner.text_settings
    different = {name for name in settings if settings[name] != changed[name]}
    assert different == {"encoder_weights", "max_sequence_length"}
    shutil.rmtree(pipeline / "text_encoder")
    gone = WanFamily(wan_config(pipeline)).conditioner.text_settings
    assert gone == {**settings, "encoder_config": None, "encoder_weights": None}


def test_held_texts_replace_the_encoder_and_released_weights_are_gone(pipeline: Path) -> None:
    conditioner = WanFamily(wan_config(pipeline)).conditioner
    expected = conditioner.encode_prompts(PROMPTS).of(conditioner.key)["prompt_embeds"]
    assert conditioner.encoder_bytes > 10_000
    conditioner.release_encoder()
    assert conditioner.encoder_bytes == 0
    texts = dict(zip(PROMPTS, WanFamily(wan_config(pipeline)).conditioner.encode_texts(PROMPTS), strict=True))
    assert [len(text) for text in texts.values()] == conditioner.token_counts(PROMPTS)
    shutil.rmtree(pipeline / "text_encoder")
    fresh = WanFamily(wan_config(pipeline, prompt_cache_mib=0)).conditioner
    fresh.hold_texts(texts)
    assert fresh.missing_texts([*PROMPTS, "a red five", "a red five"]) == ["a red five"]
    found = fresh.encode_prompts(PROMPTS).of(fresh.key)["prompt_embeds"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="cannot load 'text_encoder'"):
        fresh.encode_prompts(["a red five"])


def test_kept_texts_are_encoded_once_and_stay_whatever_the_limit(pipeline: Path) -> None:
    conditioner = WanFamily(wan_config(pipeline, prompt_cache_mib=0)).conditioner
    conditioner.keep_texts(PROMPTS)
    conditioner.release_encoder()
    conditioner.encode_prompts([*PROMPTS, PROMPTS[0]])
    assert conditioner.encoder_bytes == 0
    assert not conditioner.texts_fit(PROMPTS)
    assert WanFamily(wan_config(pipeline)).conditioner.texts_fit(PROMPTS)


def test_tokens_are_counted_as_the_tokenizer_does(pipeline: Path) -> None:
    conditioner = WanFamily(wan_config(pipeline)).conditioner
    prompts = ["", "a", *PROMPTS, "a " * 20]
    conditioner.encode_prompts(PROMPTS[:1])  # leaves padding set in the tokenizer
    assert conditioner.token_counts(prompts) == [len(conditioner.tokenizer(prompt).input_ids) for prompt in prompts]


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=40))
@example("a  cat \t &amp; it's `<b>`\x1b[31m")
def test_plain_prompts_are_cleaned_as_all_others(prompt: str) -> None:
    """The short way for printable ASCII gives what ftfy gives."""
    conditioner = WanFamily(wan_config(Path("tiny"), height=32, num_frames=9)).conditioner
    slow = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
    assert conditioner.clean_prompt(prompt) == slow
