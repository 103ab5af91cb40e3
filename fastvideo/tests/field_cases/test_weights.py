"""Weights as people have them: LoRA files where a model is expected, and text encoders of published checkpoints."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvideo.cli import main
from fastvideo.inference.loading import load_model

TENSORS = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 4)}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "pytorch_lora_weights.safetensors")
    return tmp_path


def test_a_file_as_initial_weights(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lora / "pytorch_lora_weights.safetensors"
    command = ["distill", "--config", "tiny_wan_dmd2", "--output", str(tmp_path / "run")]
    assert main([*command, "--init-student-from", str(file)]) == 2
    assert "roles.student.init_from: " in (message := capsys.readouterr().err)
    assert "lora.init_from (to train it on) or loras (to merge it)" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_as_a_model(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "--config", "tiny_wan_dmd2", "--output", str(tmp_path / "run")]
    assert main([*command, "--roles.teacher.path", str(lora)]) == 2
    assert "it holds a LoRA, which goes into a role's `loras`" in capsys.readouterr().err
    assert main(["generate", str(lora), "--prompt", "a seven"]) == 2
    assert "`fastvideo merge`" in capsys.readouterr().err


def test_prompts_count_for_an_encoder_that_says_untied(tmp_path: Path) -> None:
    """Published Wan checkpoints say so and store one table."""
    folder = shutil.copytree(str(files("fastvideo").joinpath("tiny/weights/pipeline")), tmp_path / "pipeline")
    config = Path(folder) / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    prompts = ["a green seven moving up and left", "a red one moving down"]
    untied, tied = (load_model(str(path)).adapter.conditioner for path in (folder, "tiny"))
    one, other = untied.encode_prompts(prompts).of(untied.key)["prompt_embeds"]
    assert (one - other).abs().max() > 0.1
    assert torch.equal(one, tied.encode_prompts(prompts).of(tied.key)["prompt_embeds"][0])
